"""One call spreads a model over processes, under a launcher and from a plain script.

What parallelformers 1.2.7 had wrong or lacked, and the test that would have caught it, here where
no file is named:

* inference only: test_parallelize_training.py;
* GPUs and NCCL only: every test here and in test_tensor_parallel.py;
* the model pickled for each process: test_weights_travel_once; no files in parts: test_files_in_
  parts_are_read_in_another_layout in test_tensor_parallel.py;
* errors of a process, or of the script, hang: test_errors_of_workers_..., test_an_error_of_one_...,
  test_an_error_of_the_script_..., test_torchrun.py;
* threads mix up calls: test_threads_may_call_at_the_same_time;
* environment, fixed ports, one job, no torchrun: test_nothing_is_left_in_the_environment,
  test_two_models_at_a_time, test_under_a_launcher_...;
* classes stay patched, `cpu()` gives nothing back: test_weights_lie_with_..., test_model_to_...;
* fused layouts, heads that do not divide, grouped keys and values: test_fused_projections_...,
  test_what_cannot_be_cut_... and llama in test_tensor_parallel.py;
* state of heads (slopes, learned biases): test_losses_and_gradients_of_language_models, bloom, mpt
  and gpt2_alibi there, test_policy.py;
* whole embeddings, whole scores: test_each_process_holds_its_share_..., test_no_process_has_the_
  scores_... there;
* sampling alike by luck: test_workers_sample_alike_... in test_parallelize_training.py;
* no numbers compared: test_models_of_transformers in test_tensor_parallel.py.
"""

import multiprocessing
import os
import sys
import threading
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import parallelize_cases
import pytest
import tensor_cases
import torch
from parallel_launch import findings, launch
from parallelize_cases import Block, BlockPolicy, block_model
from torch import nn

from fairseq.model_parallel import workers
from fairseq.model_parallel.parallelize import parallelize


@pytest.fixture(scope="module", autouse=True)
def preload():
    multiprocessing.set_forkserver_preload([parallelize_cases.__name__])


@pytest.fixture(scope="module")
def gpt2():
    """A model, what it gives in one process, and what two workers gave; then it is whole again."""
    model = tensor_cases.hugging_face_model("gpt2")
    inputs = tensor_cases.padded()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    environment = dict(os.environ)
    found = {"before": before, "model": model}
    with torch.no_grad():
        found["wanted"] = (model(**inputs).logits, model.generate(**inputs, **options))
    with parallelize(model, num_gpus=2, seed=1) as handle:
        found["left"] = [p.untyped_storage().nbytes() for p in model.parameters()]
        found["shapes"] = [p.shape for p in model.parameters()]
        output = model(**inputs)
        found["got"] = (output.logits, model.generate(**inputs, **options))
        found["type"], found["cache"] = type(output).__name__, output.past_key_values
        found["memory"] = (model.memory_allocated(), handle.memory_reserved())
        threads = [
            threading.Thread(target=lambda: results.append(model.generate(**inputs, **options)))
            for _ in range(4)
        ]
        results: list[torch.Tensor] = []
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found["threads"] = results
        sampled = model.generate(**inputs, do_sample=True, max_new_tokens=4, pad_token_id=1)
        found["sampled"] = sampled
    found["environment"] = (environment, dict(os.environ))
    return found


def test_a_plain_script_gets_the_results_of_one_process(gpt2):
    logits, text = gpt2["got"]
    torch.testing.assert_close(logits, gpt2["wanted"][0], rtol=0, atol=1e-5)
    assert text.tolist() == gpt2["wanted"][1].tolist()
    assert gpt2["type"] == "CausalLMOutputWithCrossAttentions"
    assert gpt2["cache"] is None  # the heads of one worker are no use to the script
    assert gpt2["sampled"].shape == (2, 11)


def test_weights_lie_with_the_workers_and_come_back(gpt2):
    assert max(gpt2["left"]) == 4  # bytes
    model = gpt2["model"]
    assert gpt2["shapes"] == [param.shape for param in model.parameters()]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, gpt2["before"][name])
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "forward" not in vars(model) and "generate" not in vars(model)
    assert type(model).forward is type(tensor_cases.hugging_face_model("gpt2")).forward


def test_threads_may_call_at_the_same_time(gpt2):
    assert len(gpt2["threads"]) == 4
    for text in gpt2["threads"]:
        assert text.tolist() == gpt2["wanted"][1].tolist()


def test_memory_of_each_worker(gpt2):
    allocated, reserved = gpt2["memory"]
    assert list(allocated) == list(reserved) == ["cpu:0", "cpu:1"]
    assert all(text.endswith(" MiB") for text in (*allocated.values(), *reserved.values()))


def test_nothing_is_left_in_the_environment(gpt2):
    before, after = gpt2["environment"]
    assert before == after


def test_errors_of_workers_are_passed_on_and_do_not_hang():
    model = block_model()
    x = torch.randn(2, 6)
    wanted = model(x)["x"]
    parallelize(model, num_gpus=2, custom_policies=BlockPolicy, verbose=True)
    torch.testing.assert_close(model(x)["x"], wanted)
    with pytest.raises(RuntimeError, match=r"(?s)worker 0: .*ValueError: no such thing"):
        model(x, trouble="everywhere")
    torch.testing.assert_close(model(x)["x"], wanted)  # they go on
    assert model(x)["past_key_values"] is None
    with pytest.raises(RuntimeError, match="worker 1: it was ended by SIGKILL"):
        model(x, trouble="killed")
    with pytest.raises(RuntimeError, match="the workers have ended; call parallelize again"):
        model(x)
    with pytest.raises(RuntimeError, match="a worker has died with its part of the weights"):
        model.cpu()
    assert "forward" not in vars(model)


def test_an_error_of_one_worker_ends_the_others_that_wait_for_it(monkeypatch):
    monkeypatch.setattr(workers, "_SECONDS_FOR_THE_OTHERS", 0.5)
    model = block_model()
    handle = parallelize(model, num_gpus=2, custom_policies=BlockPolicy)
    with pytest.raises(RuntimeError, match=r"(?s)worker 1: .*ValueError: only here"):
        model(torch.randn(2, 6), trouble="error")
    assert not handle._pool.is_running


def test_an_error_of_the_script_ends_the_workers_and_gives_the_weights_back():
    model = block_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (
        pytest.raises(KeyError, match="somewhere in the script"),
        parallelize(model, num_gpus=2, custom_policies=BlockPolicy) as handle,
    ):
        processes = list(handle._pool._processes)
        raise KeyError("somewhere in the script")
    assert not any(process.is_alive() for process in processes)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


SCRIPT = """
import sys, time
from parallelize_cases import BlockPolicy, block_model
from fairseq.model_parallel.parallelize import parallelize
from fairseq.model_parallel.workers import free_port

if __name__ == "__main__":
    handle = parallelize(
        block_model(), num_gpus=2, custom_policies=BlockPolicy, master_addr="localhost",
        master_port=free_port(), init_method="fork",
    )
    print(*(process.pid for process in handle._pool._processes), flush=True)
    time.sleep(float(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("is_killed", [False, True])
def test_workers_end_with_the_script(tmp_path, start_process, is_killed):
    (tmp_path / "script.py").write_text(SCRIPT)
    here = Path(__file__).parent
    paths = [str(here.parents[1]), str(here), os.environ.get("PYTHONPATH", "")]
    process = start_process(
        [sys.executable, "script.py", "600" if is_killed else "0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    workers_ids = process.stdout.readline().split()
    assert len(workers_ids) == 2
    if is_killed:
        process.kill()
    assert process.wait(60) == (-9 if is_killed else 0)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers_ids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_model_to_ends_it_and_moves_the_model():
    model = block_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own_forward = Block.forward
    handle = parallelize(model, num_gpus=2, custom_policies=[BlockPolicy])
    processes = list(handle._pool._processes)
    assert all(process.is_alive() for process in processes)
    model.to(torch.float64)
    assert not any(process.is_alive() for process in processes)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name].double())
    assert model.blocks[1].up.weight is model.blocks[0].up.weight
    assert Block.forward is own_forward
    assert model(torch.randn(2, 6).double())["x"].dtype == torch.float64
    handle.close()


def test_two_models_at_a_time():
    models = [block_model(), block_model()]
    with torch.no_grad():
        models[1].blocks[0].down.bias.add_(1.0)
    x = torch.randn(2, 6)
    wanted = [model(x)["x"] for model in models]
    handles = [parallelize(m, num_gpus=2, custom_policies=BlockPolicy, seed=5) for m in models]
    results = [model(x) for model in models]
    for result, expected in zip(results, wanted, strict=True):
        torch.testing.assert_close(result["x"], expected)
    assert torch.equal(results[0]["noise"], results[1]["noise"])  # the same seed
    for handle in handles:
        handle.close()


def test_weights_travel_once():
    model = nn.Linear(1000, 1000)  # 4 MB
    sizes = [len(ForkingPickler.dumps(model)) for _ in range(4)]
    assert max(sizes) < 10_000
    assert model.weight.is_shared()


def test_what_is_refused_in_a_plain_script():
    with pytest.raises(ValueError, match="8 inner channels cannot be shared by 3 processes"):
        parallelize(block_model(), num_gpus=3, custom_policies=BlockPolicy)
    with pytest.raises(ValueError, match="custom_policies are for layers of class Block, but Lin"):
        parallelize(nn.Linear(2, 2), custom_policies=BlockPolicy)
    with pytest.raises(ValueError, match="init_method is 'file'; it must be one of forkserver"):
        parallelize(block_model(), custom_policies=BlockPolicy, num_gpus=2, init_method="file")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="num_gpus is 2, but 0 GPUs are visible"):
            parallelize(block_model(), custom_policies=BlockPolicy, num_gpus=2, backend="nccl")


def test_under_a_launcher_the_model_trains_in_place(tmp_path):
    launch(2, {"in_place": parallelize_cases.in_place}, tmp_path)
    first, second = findings(tmp_path, "in_place", 2)
    assert first["seeds"] == second["seeds"]
    for found in (first, second):
        assert found["losses"][1] == pytest.approx(found["losses"][0], rel=2e-6)
        assert found["worst"] < 1e-4 and found["moved"] < 1e-4
        assert found["is_cut"] and found["plain_again"]
        assert "mesh has the axes ('dp', 'tp')" in found["refused"]["mesh"]
        assert "num_gpus is 7, but 2 processes" in found["refused"]["num_gpus"]
        assert found["dtype"] == "torch.float16"
    assert list(first["figures"][0]) == ["cpu:0"]
