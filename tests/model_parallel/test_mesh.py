"""How processes are shared out, without starting any."""

from types import SimpleNamespace

import pytest

from fairseq.model_parallel.mesh import data_parallel_size
from fairseq.model_parallel.run import set_up_mesh, settle_data_parallel


@pytest.mark.parametrize(
    ("world_size", "tensor", "sequence", "data"),
    [(1, 1, 1, 1), (4, 2, 1, 2), (4, 1, 4, 1), (24, 2, 3, 4), (8, 2, 2, 2)],
)
def test_what_the_other_axes_leave_is_data_parallel(world_size, tensor, sequence, data):
    sizes = {"tensor_parallel_size": tensor, "sequence_parallel_size": sequence}
    assert data_parallel_size(world_size, **sizes) == data


def test_a_product_that_does_not_fit_shows_the_arithmetic():
    expected = (
        r"--tensor-parallel-size 2 x --sequence-parallel-size 3 = 6 processes .* 8 of this run "
        r"\(8 / 6 = 1\.33333\); start a multiple of 6, such as torchrun --nproc-per-node 6"
    )
    with pytest.raises(ValueError, match=expected):
        data_parallel_size(8, tensor_parallel_size=2, sequence_parallel_size=3)
    with pytest.raises(ValueError, match=r"--tensor-parallel-size is 0; it must be 1 or more"):
        data_parallel_size(8, tensor_parallel_size=0)


def settings(**changes):
    distributed = {
        "ddp_backend": "pytorch_ddp",
        "data_parallel": None,
        "tensor_parallel_size": 1,
        "sequence_parallel_size": 1,
        **changes,
    }
    return SimpleNamespace(
        common=SimpleNamespace(cpu=True, bf16=changes.get("bf16", False)),
        distributed_training=SimpleNamespace(**distributed),
        criterion=SimpleNamespace(ddp_backend="pytorch_ddp"),
        model=SimpleNamespace(adaptive_softmax_cutoff=changes.get("cutoff")),
    )


def test_one_process_cannot_share_weights():
    with pytest.raises(ValueError, match=r"= 2 processes .* the 1 of this run \(1 / 2 = 0\.5\)"):
        set_up_mesh(settings(tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("changes", "backend"),
    [
        ({}, "pytorch_ddp"),
        ({"data_parallel": "ddp"}, "pytorch_ddp"),
        ({"data_parallel": "ddp", "ddp_backend": "no_c10d"}, "no_c10d"),
        ({"data_parallel": "ddp", "cutoff": "20,60"}, "legacy_ddp"),
        ({"data_parallel": "ddp", "tensor_parallel_size": 2}, "legacy_ddp"),
        ({"tensor_parallel_size": 2}, "legacy_ddp"),
        ({"tensor_parallel_size": 2, "ddp_backend": "fully_sharded"}, "fully_sharded"),
        ({"tensor_parallel_size": 2, "bf16": True}, "fully_sharded"),
        ({"tensor_parallel_size": 2, "bf16": True, "data_parallel": "ddp"}, "legacy_ddp"),
        ({"data_parallel": "fsdp2", "ddp_backend": "legacy_ddp"}, "fully_sharded"),
    ],
)
def test_data_parallel_names_a_backend(changes, backend):
    cfg = settings(**changes)
    settle_data_parallel(cfg)
    assert cfg.distributed_training.ddp_backend == backend
    assert cfg.criterion.ddp_backend == backend


def test_flags_that_contradict_each_other():
    with pytest.raises(ValueError, match="--data-parallel ddp contradicts --ddp-backend fully_sh"):
        settle_data_parallel(settings(data_parallel="ddp", ddp_backend="fully_sharded"))
