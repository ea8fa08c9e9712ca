"""Models of transformers under ALiBi, over several processes against one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fairseq.huggingface import apply_alibi
from fairseq.model_parallel.layout import SequenceLayout
from fairseq.model_parallel.sequence_parallel import SequenceParallelContextManager

WORDS = 64
SIZES = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2() -> Any:
    config = GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=32, **SIZES)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def llama() -> Any:
    """Four heads of queries share two of keys."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **SIZES,
        )
    )


def bert() -> Any:
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        vocab_size=WORDS,
        pad_token_id=0,
    )
    return BertModel(config, add_pooling_layer=False)


def model_of(make: Any, **options: Any) -> Any:
    torch.manual_seed(2)
    model = make()
    apply_alibi(model, **options)
    return model.double().eval()


def batch_of(length: int = 13) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, WORDS, (2, length), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(tokens)
    mask[1, -4:] = 0
    labels = tokens.where(mask == 1, -100)
    labels[0, 2] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def packed_batch() -> dict[str, Any]:
    """Three documents in each row, told apart by positions that start again.

    transformers reads them as documents only where no cache is made.
    """
    batch: dict[str, Any] = batch_of(12) | {"use_cache": False}
    del batch["attention_mask"]
    starts = torch.tensor([0] * 5 + [5] * 4 + [9] * 3)
    batch["position_ids"] = (torch.arange(12) - starts).expand(2, -1)
    return batch


def is_one_process(model: Any, batch: Any, scheme: str, layout: str) -> str:
    """Returns what differs from one process, "" if nothing does."""
    model.zero_grad()
    expected = model(**batch)
    expected.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    size = dist.get_world_size()
    with SequenceParallelContextManager(model, size, ring_attn_func=scheme, layout=layout):
        output = model(**batch)
        output.loss.backward()
    padded = SequenceLayout(size, layout).padded(batch["input_ids"].size(1))
    if output.logits.size(1) != padded // size:
        return f"logits of {output.logits.size(1)} columns, not of its own"
    if abs(float(output.loss - expected.loss)) > 1e-5:
        return f"loss {output.loss} not {expected.loss}"
    for name, p in model.named_parameters():
        mean = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        dist.all_reduce(mean)
        if not torch.allclose(mean / size, grads[name], rtol=1e-4, atol=1e-6):
            return f"gradient of {name}: {mean / size} not {grads[name]}"
    return ""


def transformers_cases() -> dict[str, str]:
    found = {}
    size = dist.get_world_size()
    for make in (gpt2, llama):
        model = model_of(make)
        for scheme, layout in (
            ("allgather", "contiguous"),
            ("varlen_llama3", "zigzag"),
            ("ring", "zigzag"),
            ("batch_ring", "contiguous"),
            ("ulysses", "contiguous"),
        ):
            for kind, batch in (("padded", batch_of()), ("packed", packed_batch())):
                name = f"{make.__name__} {scheme} {layout} {kind}"
                found[name] = is_one_process(model, batch, scheme, layout)
    found["bypassed"] = bypassed_attention()
    found |= {f"logits {layout}": kept_logits(layout) for layout in ("contiguous", "zigzag")}
    for variant in ("symmetric", "split_heads"):
        encoder = model_of(bert, variant=variant)
        batch = {name: x for name, x in batch_of().items() if name != "labels"}
        expected = encoder(**batch).last_hidden_state
        with SequenceParallelContextManager(encoder, size, gather_outputs=True, layout="zigzag"):
            out = encoder(**batch).last_hidden_state
        is_seen = batch["attention_mask"].bool()
        is_same = torch.allclose(out[is_seen], expected[is_seen], rtol=1e-4, atol=1e-6)
        found[f"bert {variant}"] = "" if is_same else "another output"
    return found


def bypassed_attention() -> str:
    """Attention that is changed meanwhile would see this process's columns alone."""
    for name, message in (("sdpa", "without ALiBi"), ("alibi", "no attention of ALiBi")):
        model, said = model_of(gpt2), ""
        with SequenceParallelContextManager(model, dist.get_world_size()):
            model.config._attn_implementation = name
            try:
                model(**batch_of())
            except (ValueError, RuntimeError) as error:
                said = str(error)
        if message not in said:
            return f"{name}: {said!r}"
    return ""


def kept_logits(layout: str) -> str:
    """The last logits of a whole sequence whose length does not divide, wherever they lie."""
    model, batch = model_of(gpt2), batch_of()
    tokens = batch["input_ids"]
    size = dist.get_world_size()
    options = {"context_parallel_size": size, "gather_outputs": True, "layout": layout}
    for keep in (3, 0, torch.tensor([0, 5, 12])):
        expected = model(tokens, logits_to_keep=keep).logits
        with SequenceParallelContextManager(model, **options):
            found = model(tokens, logits_to_keep=keep).logits
        if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-6):
            return f"logits_to_keep {keep}: {found.shape}, not the same"
    return ""
