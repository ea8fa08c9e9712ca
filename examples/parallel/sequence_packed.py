"""A Hugging Face model with ALiBi, trained on packed documents that two processes share.

    torchrun --nproc-per-node 2 examples/parallel/sequence_packed.py

Positions that start again tell documents apart; they travel with the tokens, so that it makes no
difference where a row is cut. Needs transformers: `pip install -e '.[hf]'`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from tiny import meet_others
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from fairseq.huggingface import apply_alibi
from fairseq.model_parallel.sequence_parallel import SequenceParallelContextManager

LENGTHS = (30, 21, 12)
"""Tokens of the documents in each row; 63 in all, which no even number divides."""


def packed_rows(step: int) -> dict[str, torch.Tensor]:
    """Returns two rows of documents, the same in every process."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    first_words = torch.repeat_interleave(torch.tensor([5, 40, 70]), torch.tensor(LENGTHS))
    tokens = (first_words + 3 * positions + step) % 96
    labels = tokens.where(positions > 0, -100)  # no document predicts the next one's start
    both = {"input_ids": tokens, "labels": labels, "position_ids": positions}
    return {name: x.expand(2, -1) for name, x in both.items()}


def main() -> None:
    meet_others(2)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, bos_token_id=0)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    apply_alibi(model)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    with SequenceParallelContextManager(wrapped, dist.get_world_size(), ring_attn_func="ring"):
        for step in range(5):
            loss = wrapped(**packed_rows(step)).loss  # that of the whole rows, in every process
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if dist.get_rank() == 0:
                print(f"step {step}: loss {loss.item():.5f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
