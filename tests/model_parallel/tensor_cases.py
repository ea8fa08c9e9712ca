"""What started processes do in the tests of tensor parallelism; they import it by name."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from fairseq.criterions.adaptive_nll import adaptive_nll
from fairseq.distributed.fsdp import gather_whole, shard_model
from fairseq.distributed.groups import set_mesh
from fairseq.model_parallel.mesh import build_mesh
from fairseq.model_parallel.policies import register_policy
from fairseq.model_parallel.policies.llama import LlamaPolicy
from fairseq.model_parallel.policies.transformer_lm import TransformerLMPolicy
from fairseq.model_parallel.policy import HeadState, Layer, Policy
from fairseq.model_parallel.sharded_checkpoint import load_sharded, save_sharded
from fairseq.model_parallel.tensor_parallel import (
    apply_tensor_parallel,
    undo_tensor_parallel,
    whole_state_dict,
)
from fairseq.models import build_model
from fairseq.positions.methods import METHODS
from fairseq.registry import ARCHITECTURES

PAD = 1
TINY = {
    "decoder_layers": 2,
    "decoder_embed_dim": 32,
    "decoder_ffn_embed_dim": 64,
    "decoder_attention_heads": 4,
    "tokens_per_sample": 16,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
BANDS = {
    "decoder_input_dim": 32,
    "decoder_output_dim": 32,
    "adaptive_input_cutoff": "20,60",
    "adaptive_softmax_cutoff": "20,60",
    "adaptive_input_factor": 2.0,
    "adaptive_softmax_factor": 2.0,
    "adaptive_softmax_dropout": 0.0,
}
ADAPTIVE = {
    "adaptive_tied": {"tie_adaptive_weights": True, "tie_adaptive_proj": True},
    "adaptive_tied_tables": {"tie_adaptive_weights": True},
    "adaptive": {"tie_adaptive_weights": False, "tie_adaptive_proj": False},
}
PLAIN = {
    "shared": {"share_decoder_input_output_embed": True},
    "apart": {"share_decoder_input_output_embed": False, "decoder_normalize_before": False},
}


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


class Words:
    """As much of a dictionary as a model needs: 101 words, which no number of processes shares."""

    def __len__(self) -> int:
        return 101

    def pad(self) -> int:
        return PAD

    def eos(self) -> int:
        return 2


def language_model(kind: str, method: str = "alibi", **options: Any) -> Any:
    """Returns a language model of a kind of vocabulary."""
    torch.manual_seed(5)
    arch = "transformer_lm_wiki103" if kind in ADAPTIVE else "transformer_lm_gpt"
    own = {**BANDS, **ADAPTIVE[kind]} if kind in ADAPTIVE else PLAIN[kind]
    args = argparse.Namespace(arch=arch, **{**TINY, **own, "position_method": method, **options})
    ARCHITECTURES.preset_of(arch)(args)
    words = Words()
    model = build_model(args, SimpleNamespace(source_dictionary=words, target_dictionary=words))
    with torch.no_grad():
        for param in model.parameters():  # zeros and ones would hide mistakes
            param.add_(torch.randn_like(param), alpha=0.05)
    return model.eval()


def tokens_of(rows: int, length: int, seed: int, vocab_size: int) -> torch.Tensor:
    """Returns random ids without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocab_size, (rows, length), generator=generator)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (inputs, targets), (3, 9) each, with padding in one row."""
    tokens = tokens_of(3, 10, seed=2, vocab_size=101)
    tokens[1, 6:] = PAD
    return tokens[:, :-1].clone(), tokens[:, 1:].clone()


def lm_loss(model: Any) -> torch.Tensor:
    inputs, targets = batch()
    net_output = model(inputs)
    softmax = model.decoder.adaptive_softmax
    if softmax is not None:
        return adaptive_nll(softmax, net_output[0], targets.reshape(-1), pad=PAD, tail_pad=None)
    logits = net_output[0].flatten(0, 1)
    return F.cross_entropy(logits, targets.reshape(-1), ignore_index=PAD, reduction="sum")


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the whole gradients by name, in the layout of the whole model."""
    named = dict(model.named_parameters(remove_duplicate=False))
    found = {n: p.grad for n, p in named.items() if p.grad is not None}
    whole = gather_whole(found)
    record = vars(model).get("_tensor_parallel")
    if record is not None:
        present = {n: o for n, o in record.layout.orders.items() if n in whole}
        for name, order in present.items():
            whole[name] = whole[name][order.argsort()]
        for name in record.layout.reversed:
            whole[name] = whole[name].t()
    return whole


def compared(whole: nn.Module, loss_of: Callable[[Any], torch.Tensor]) -> dict[str, Any]:
    """Cuts a copy of a model; returns the losses, worst gradient, and what was cut."""
    cut = copy.deepcopy(whole)
    apply_tensor_parallel(cut, mesh())
    losses = [loss_of(model) for model in (whole, cut)]
    for loss in losses:
        loss.backward()
    wanted, got = gradients(whole), gradients(cut)
    assert wanted.keys() == got.keys(), wanted.keys() ^ got.keys()
    scale = max(float(g.abs().max()) for g in wanted.values())
    # Relative to each gradient's own size, so that a small one cannot hide behind others.
    worst = {
        n: float((got[n] - g).abs().max() / (g.abs().max() + 1e-3 * scale))
        for n, g in wanted.items()
    }
    state = whole_state_dict(cut)
    same = all(torch.equal(state[n], t) for n, t in whole.state_dict().items())
    own = {id(p): p for p in cut.parameters()}.values()
    own_elements = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in own)
    undo_tensor_parallel(cut)
    restored = all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True)
    )
    return {
        "losses": [loss.item() for loss in losses],
        "worst": max(worst.items(), key=lambda item: item[1]),
        "same_state": same,
        "restored": restored and loss_of(cut).item() == losses[0].item(),
        "share": own_elements / sum(p.numel() for p in whole.parameters()),
    }


def language_models() -> dict[str, Any]:
    """Every position method with a plain model, every kind of vocabulary with ALiBi."""
    found = {
        f"shared {name}": compared(language_model("shared", name), lm_loss) for name in METHODS
    }
    for kind in ["apart", *ADAPTIVE]:
        found[f"{kind} alibi"] = compared(language_model(kind), lm_loss)
    learned = language_model("apart", alibi_learned_slopes=True)
    found["learned slopes"] = compared(learned, lm_loss)
    return found


def hugging_face_model(name: str, **options: Any) -> Any:
    """Returns a tiny model with random weights."""
    import transformers

    torch.manual_seed(3)
    common = {"vocab_size": 99, "attn_implementation": options.pop("attention", "eager")}
    made = {
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=24, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, **common, **options,
        ),
        "bert": lambda: transformers.BertConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **common,
        ),
        "roberta": lambda: transformers.RobertaConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **common,
        ),
        "bloom": lambda: transformers.BloomConfig(
            hidden_size=24, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, **common,
        ),
        "mpt": lambda: transformers.MptConfig(
            d_model=24, n_layers=2, n_heads=4, max_seq_len=32, **common,
        ),
        "opt": lambda: transformers.OPTConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=4, ffn_dim=40,
            max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.0, bos_token_id=0,
            eos_token_id=0, **common,
        ),
        "llama": lambda: transformers.LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
            intermediate_size=40, bos_token_id=0, eos_token_id=0, **common,
        ),
    }  # fmt: skip
    config = made[name.removesuffix("_alibi")]()
    is_masked = name in ("bert", "roberta")
    auto = transformers.AutoModelForMaskedLM if is_masked else transformers.AutoModelForCausalLM
    model = auto.from_config(config)
    if name.endswith("_alibi"):
        from fairseq.huggingface import apply_alibi

        apply_alibi(model)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)
    return model.eval()


HUGGING_FACE = (
    "gpt2",
    "gpt2_alibi",
    "llama_alibi",
    "bert",
    "roberta",
    "bloom",
    "mpt",
    "opt",
    "llama",
)


def padded() -> dict[str, torch.Tensor]:
    """Returns a batch (2, 7) with padding on the left of one row."""
    tokens = tokens_of(2, 7, seed=4, vocab_size=99)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, PAD), "attention_mask": mask}


def hugging_face(name: str) -> dict[str, Any]:
    """Logits, gradients, and greedy generation with a cache."""
    model = hugging_face_model(name)
    inputs = padded()

    def loss_of(each: Any) -> torch.Tensor:
        return each(**inputs, labels=inputs["input_ids"]).loss

    found = compared(model, loss_of)
    cut = copy.deepcopy(model)
    apply_tensor_parallel(cut, mesh())
    with torch.no_grad():
        logits = [each(**inputs).logits for each in (model, cut)]
        found["logits"] = float((logits[0] - logits[1]).abs().max())
        if name not in ("bert", "roberta"):
            options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
            texts = [each.generate(**inputs, **options) for each in (model, cut)]
            found["texts"] = [text.tolist() for text in texts]
    return found


def all_hugging_face() -> dict[str, Any]:
    return {name: hugging_face(name) for name in HUGGING_FACE}


def incremental() -> dict[str, Any]:
    """Greedy decoding with the keys of one's own heads cached, against whole passes."""
    found = {}
    for kind in ("shared", "adaptive_tied"):
        whole = language_model(kind)
        cut = copy.deepcopy(whole)
        apply_tensor_parallel(cut, mesh())
        found[kind] = [greedy(whole, None), greedy(cut, {})]
    return found


def greedy(model: Any, state: dict[str, Any] | None) -> list[list[int]]:
    tokens = tokens_of(2, 4, seed=9, vocab_size=101)
    with torch.no_grad():
        for _ in range(6):
            output = model(tokens, incremental_state=state)
            scores = model.get_normalized_probs((output[0][:, -1:], None), log_probs=True)
            tokens = torch.cat([tokens, scores[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens.tolist()


def dropout() -> dict[str, Any]:
    """What is dropped: in the residual stream, in the inner layer, and in attention."""
    model = language_model("apart", decoder_layers=1, decoder_normalize_before=True)
    cut = copy.deepcopy(model).train()
    layer = cut.decoder.layers[0]
    for module in (layer.dropout_module, layer.activation_dropout_module):
        module.p = 0.5
    layer.self_attn.dropout_module.p = 0.5
    with torch.no_grad():
        layer.fc1.bias.fill_(9.0)  # so that every zero there was dropped
    apply_tensor_parallel(cut, mesh())
    seen: dict[str, list[torch.Tensor]] = {"inner": [], "heads": [], "out": []}
    layer.fc2.register_forward_pre_hook(lambda m, x: seen["inner"].append(local(x[0]) == 0))
    layer.self_attn.out_proj.register_forward_pre_hook(
        lambda m, x: seen["heads"].append(local(x[0]))
    )
    layer.register_forward_hook(lambda m, x, y: seen["out"].append(y.detach()))
    for _ in range(2):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            cut(batch()[0])
    return {name: [t.clone() for t in tensors] for name, tensors in seen.items()}


def local(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "to_local", lambda: tensor)().detach()


def recomputed() -> dict[str, Any]:
    """With dropout, gradients of layers whose activations are computed again in the backward."""
    found = []
    for options in ({}, {"checkpoint_activations": True}):
        model = language_model("shared", dropout=0.3, attention_dropout=0.3, **options).train()
        apply_tensor_parallel(model, mesh())
        torch.manual_seed(4)
        lm_loss(model).backward()
        found.append({n.replace("._checkpointed", ""): g for n, g in gradients(model).items()})
    worst = max(float((found[0][n] - g).abs().max()) for n, g in found[1].items())
    return {"worst": worst, "largest": max(float(g.abs().max()) for g in found[0].values())}


def refused() -> dict[str, str]:
    """What cannot be cut, and what is said about it; the model stays as it was."""
    models = {
        "heads": (language_model("shared", decoder_attention_heads=1), None),
        "width": (language_model("shared", decoder_ffn_embed_dim=63), None),
        "groups": (hugging_face_model("llama"), Ungrouped),
        "unnamed": (language_model("shared"), Misspelt),
        "nothing": (language_model("shared"), Elsewhere),
        "unknown": (nn.Linear(2, 2), None),
        "argument": (language_model("shared"), WrongArgument),
    }
    found = {}
    for name, (model, policy) in models.items():
        before = {n: p.clone() for n, p in model.named_parameters()}
        try:
            apply_tensor_parallel(model, mesh(), policy)
            found[name] = "not refused"
        except ValueError as error:
            found[name] = str(error)
        after = dict(model.named_parameters())
        assert before.keys() == after.keys()
        assert all(torch.equal(after[n], p) for n, p in before.items())
    return found


class Ungrouped(LlamaPolicy):
    @staticmethod
    def heads(config: Any) -> dict[str, int]:
        return {"query heads": 8, "key-value heads": 3}


class Misspelt(TransformerLMPolicy):
    @staticmethod
    def mlp_in() -> list[Layer]:
        return [Layer(weight="fcl.weight")]


class Elsewhere(TransformerLMPolicy):
    @staticmethod
    def original_layer_class() -> type[nn.Module]:
        return nn.LSTM


class WrongArgument(TransformerLMPolicy):
    @staticmethod
    def replace_arguments(config: Any, world_size: int) -> dict[str, Any]:
        return {"self_attn.number_of_heads": 2}


class OwnBlock(nn.Module):
    """A layer of somebody's own: fused by parts, slopes in a buffer, an optional gate."""

    def __init__(self, fused: str) -> None:
        super().__init__()
        self.fused = fused
        self.num_heads, self.width = 4, 5
        self.qkv = nn.Linear(20, 60)
        self.out = nn.Linear(20, 20)
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], self.num_heads, 3, self.width)
        if self.fused == "parts":
            shape = (*x.shape[:2], 3, self.num_heads, self.width)
        fused = self.qkv(x).view(shape).movedim(2 if self.fused == "parts" else 3, 0)
        q, k, v = fused.transpose(2, 3)  # (B, H, T, K) each
        distance = torch.arange(x.size(1)).view(-1, 1) - torch.arange(x.size(1))
        bias = -self.slopes.view(-1, 1, 1) * distance.abs()
        attended = torch.softmax(q @ k.transpose(-1, -2) + bias, -1) @ v
        return x + self.out(attended.transpose(1, 2).flatten(2))


class OwnModel(nn.Module):
    def __init__(self, fused: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(OwnBlock(fused) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class CountingBlock(OwnBlock):
    """Takes the place of a block while its model is cut."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CountingBlock.calls += 1
        return super().forward(x)


class CountingLinear(nn.Linear):
    """What a rule's `replace` makes of a linear map."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CountingLinear.calls += 1
        return super().forward(x)


def counting(found: nn.Module) -> nn.Module:
    found.__class__ = CountingLinear
    return found


class OwnPolicy(Policy):
    @staticmethod
    def original_layer_class() -> type[nn.Module]:
        return OwnBlock

    @staticmethod
    def heads(config: Any) -> dict[str, int]:
        return {"heads": 4}

    @staticmethod
    def replace_arguments(config: Any, world_size: int) -> dict[str, Any]:
        return {"num_heads": 4 // world_size}

    @staticmethod
    def replace_modules() -> dict[str, type[nn.Module]]:
        return {"OwnBlock": CountingBlock}

    @staticmethod
    def attn_out() -> list[Layer]:
        return [Layer(weight="out.weight", bias="out.bias", replace=counting)]

    @staticmethod
    def mlp_in() -> list[Layer]:
        return [Layer(weight="gate.weight", ignore_checker=True)]

    @staticmethod
    def head_state() -> list[HeadState]:
        return [HeadState(buffer="slopes")]


class ByParts(OwnPolicy):
    @staticmethod
    def attn_qkv() -> list[Layer]:
        return [Layer(weight="qkv.weight", bias="qkv.bias", n_fused=3, layout="parts")]


class ByHeads(OwnPolicy):
    @staticmethod
    def attn_qkv() -> list[Layer]:
        return [Layer(weight="qkv.weight", bias="qkv.bias", n_fused=3, layout="heads")]


def own_models() -> dict[str, Any]:
    """Both layouts of an ordinary fused Linear, with slopes in a buffer."""
    found = {}
    for fused, policy in (("parts", ByParts), ("heads", ByHeads)):
        torch.manual_seed(8)
        model = OwnModel(fused)
        register_policy(policy)
        x = torch.randn(2, 6, 20)
        found[fused] = compared(model, lambda each, x=x: each(x).square().sum())
        found[f"{fused} calls"] = min(CountingBlock.calls, CountingLinear.calls)
        cut, other = copy.deepcopy(model), copy.deepcopy(model)
        apply_tensor_parallel(cut, mesh())
        found[f"{fused} classes"] = [type(m.blocks[0]).__name__ for m in (cut, other)]
        undo_tensor_parallel(cut)
        found[f"{fused} classes"].append(type(cut.blocks[0]).__name__)
    return found


def trained_once(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Takes a step; returns the whole parameters."""
    optimizer.zero_grad()
    lm_loss(model).backward()
    optimizer.step()
    return {n: t.clone() for n, t in gather_whole(dict(model.state_dict())).items()}


def adam(model: Any) -> Any:
    # Where a gradient is zero but for rounding, a small epsilon would make whole steps of it.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2, foreach=False)


def sharded_files(folder: str) -> dict[str, Any]:
    """Two steps with tp 2 x fsdp2 2, the second after a change to tp 4, against one process."""
    wanted = language_model("adaptive_tied")
    wanted_adam = adam(wanted)
    steps = [trained_once(wanted, wanted_adam) for _ in range(2)]
    grid = build_mesh(4, tensor_parallel_size=2)
    set_mesh(grid)
    try:
        first = language_model("adaptive_tied")
        apply_tensor_parallel(first, grid.submesh("tp"))
        shard_model(first, grid.group("dp"), torch.device("cpu"))
        optimizer = adam(first)
        once = trained_once(first, optimizer)
        save_sharded(folder, first, optimizer)
    finally:
        set_mesh(None)
    refused = ""
    second = language_model("adaptive_tied")
    apply_tensor_parallel(second, mesh())
    optimizer = adam(second)
    load_sharded(folder, second, optimizer)
    twice = trained_once(second, optimizer)
    fused = hugging_face_model("gpt2")
    apply_tensor_parallel(fused, mesh())
    try:
        save_sharded(folder + ".refused", fused)
    except ValueError as error:
        refused = str(error)
    return {
        "differences": [
            max(float((got[n] - t).abs().max()) for n, t in step.items() if t.is_floating_point())
            for step, got in zip(steps, (once, twice), strict=True)
        ],
        "refused": refused,
    }
