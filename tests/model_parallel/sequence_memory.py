"""A sequence that does not fit into one process's memory, and does into four."""

from __future__ import annotations

import resource
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_models import build

from fairseq.model_parallel import block_attention
from fairseq.model_parallel.sequence_parallel import SequenceParallelContextManager

LENGTH, WORDS, MIB = 2048, 50, 1 << 20
ROOM = 120 * MIB
"""What a process may allocate beyond what it holds at first.

Eight layers of width 160 keep about 2,100 numbers for each token in float32: 140 MiB for one
process, 35 MiB for each of four; weights and their gradients take 19 MiB.
"""


def trains_in_little_memory() -> dict[str, Any]:
    """Returns what one process says with this little room, and the losses of four.

    Of one process with all the room it wants, too, the first loss.
    """
    model = _model()
    tokens = torch.randint(4, WORDS, (1, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    batch = {"net_input": {"src_tokens": tokens[:, :-1]}, "target": tokens[:, 1:]}
    block_attention.TILE_ELEMENTS = 1 << 18
    limit = _data_bytes() + ROOM
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    alone = ""
    if dist.get_rank() == 0:
        try:
            _step(model, batch)
        except RuntimeError as error:
            alone = str(error)
    model.zero_grad()
    losses = []
    with SequenceParallelContextManager(
        model, dist.get_world_size(), ring_attn_func="ring", layout="zigzag"
    ) as sequence:
        part = sequence.cut(batch)
        for _ in range(2):
            losses.append(float(sequence.total(_step(model, part))))
            with torch.no_grad():
                for param in model.parameters():
                    dist.all_reduce(param.grad)
                    param -= 0.1 * param.grad
                    param.grad = None
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with_room = float(_step(_model(), batch)) if dist.get_rank() == 0 else 0.0
    return {"alone": alone, "losses": losses, "with room": with_room}


def _model() -> Any:
    torch.manual_seed(0)
    return build(
        "transformer_lm",
        WORDS,
        decoder_layers=8,
        decoder_embed_dim=160,
        decoder_ffn_embed_dim=640,
        decoder_attention_heads=4,
        dropout=0.0,
        attention_dropout=0.0,
        tokens_per_sample=LENGTH,
    )


def _step(model: Any, part: Any) -> torch.Tensor:
    logits = model(**part["net_input"])[0].flatten(0, 1)
    loss = F.cross_entropy(logits, part["target"].flatten(), reduction="sum") / LENGTH
    loss.backward()
    return loss.detach()


def _data_bytes() -> int:
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData"))
