"""Tokens per second of generation, beside transformers' `generate` on a model of the same size.

Both models have random weights and as many layers, heads, channels and words; transformers' is a
GPT-2. Both continue the same prompts by the same number of tokens, in turns, in this process; each
is run once before. What is printed is the best of the repetitions, and the ratio of the two.

    python scripts/bench_generate.py --size small
    python scripts/bench_generate.py --size large --new-tokens 24 --repeat 2
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from fairseq.data.dictionary import Dictionary
from fairseq.generation.layout import lay_out_for_generation
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.search import Sampling
from fairseq.sequence_generator import SequenceGenerator

SIZES: dict[str, dict[str, int]] = {
    "small": {"layers": 6, "width": 128, "heads": 4, "words": 4000},
    "large": {"layers": 12, "width": 1536, "heads": 16, "words": 32000},
}
MODES = ("greedy", "beam", "sampling")


class _Task:
    def __init__(self, num_words: int) -> None:
        words = Dictionary()
        for number in range(num_words - len(words)):
            words.add_symbol(f"w{number}")
        self.source_dictionary = self.target_dictionary = words


def own_model(size: dict[str, int], backend: str) -> TransformerLanguageModel:
    """Returns this project's model, with ALiBi."""
    width = size["width"]
    cfg = argparse.Namespace(
        decoder_layers=size["layers"],
        decoder_embed_dim=width,
        decoder_input_dim=width,
        decoder_output_dim=width,
        decoder_ffn_embed_dim=4 * width,
        decoder_attention_heads=size["heads"],
        decoder_normalize_before=True,
        share_decoder_input_output_embed=True,
        activation_fn="gelu",
        tokens_per_sample=512,
        attention_backend=backend,
    )
    model = TransformerLanguageModel.build_model(cfg, _Task(size["words"]))
    model.eval()
    lay_out_for_generation([model])
    return model


def their_model(size: dict[str, int]) -> Any:
    """Returns a GPT-2 of transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(
        n_layer=size["layers"],
        n_embd=size["width"],
        n_head=size["heads"],
        vocab_size=size["words"],
        n_positions=1024,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def own_run(
    model: TransformerLanguageModel, prompts: list[list[int]], args: argparse.Namespace, mode: str
) -> Callable[[], object]:
    """Returns what continues the prompts once."""
    # Outputs as long as sources are: so each row gets as many new tokens, however long its prompt.
    sources = [prompt + [4] * args.new_tokens for prompt in prompts]
    generator = SequenceGenerator(
        [model],
        model.decoder.dictionary,
        beam_size=args.beam if mode == "beam" else 1,
        max_len_b=max(map(len, sources)),
        match_source_len=True,
        search_strategy=Sampling(topk=50) if mode == "sampling" else None,
    )
    sample = {"net_input": {"src_tokens": padded(sources)}}
    return lambda: generator.generate(None, sample, prefix_tokens=padded(prompts))


def padded(rows: list[list[int]]) -> torch.Tensor:
    """Returns rows of ids as one tensor, padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [1] * (width - len(row)) for row in rows])


def their_run(
    model: Any, prompts: list[list[int]], args: argparse.Namespace, mode: str
) -> Callable[[], object]:
    """Returns what continues the prompts once; shorter ones are padded on the left."""
    width = max(map(len, prompts))
    rows = torch.tensor([[1] * (width - len(prompt)) + prompt for prompt in prompts])
    options: dict[str, Any] = {"num_beams": args.beam} if mode == "beam" else {}
    if mode == "sampling":
        options = {"do_sample": True, "top_k": 50}

    def run() -> object:
        with torch.inference_mode():
            return model.generate(
                rows,
                attention_mask=rows.ne(1).long(),
                max_new_tokens=args.new_tokens,
                min_new_tokens=args.new_tokens,
                **options,
            )

    return run


def seconds(run: Callable[[], object]) -> float:
    """Returns how long a call takes."""
    started_at = time.perf_counter()
    run()
    return time.perf_counter() - started_at


def compare(args: argparse.Namespace) -> None:
    """Prints a line for each way of choosing tokens and each number of rows."""
    size = SIZES[args.size]
    own = own_model(size, args.attention_backend)
    theirs = None if args.alone else their_model(size)
    count = sum(parameter.numel() for parameter in own.parameters())
    print(f"{args.size}: {count / 1e6:.1f} M parameters, {size}, prompt {args.prompt}")
    draw = torch.Generator().manual_seed(0)
    print("mode      rows  ours tokens/s  transformers tokens/s  ratio")
    for mode in args.modes.split(","):
        for num_rows in map(int, args.rows.split(",")):
            lengths = [args.prompt - (row % 2) * args.pad for row in range(num_rows)]
            prompts = [
                torch.randint(4, size["words"], (length,), generator=draw).tolist()
                for length in lengths
            ]
            runs = [own_run(own, prompts, args, mode)]
            if theirs is not None:
                runs.append(their_run(theirs, prompts, args, mode))
            for run in runs:
                run()
            times = [[seconds(run) for run in runs] for _ in range(args.repeat)]
            best = [min(each) for each in zip(*times, strict=True)]
            rates = [num_rows * args.new_tokens / each for each in best]
            ratio = f"{rates[0] / rates[1]:.2f}" if len(rates) > 1 else "-"
            other = f"{rates[1]:.1f}" if len(rates) > 1 else "-"
            print(f"{mode:9} {num_rows:4}  {rates[0]:13.1f}  {other:>21}  {ratio:>5}", flush=True)


def main() -> None:
    """Reads the command line and compares."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="of the models")
    parser.add_argument("--modes", default=",".join(MODES), help="greedy, beam, sampling")
    parser.add_argument("--rows", default="1,8", help="prompts in a batch")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--pad", type=int, default=0, help="every other prompt is shorter by this")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--beam", type=int, default=5, help="beams in mode beam")
    parser.add_argument("--repeat", type=int, default=3, help="runs, of which the best counts")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--attention-backend", default="auto", help="of this project's model")
    parser.add_argument("--alone", action="store_true", help="do not run transformers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    compare(args)


if __name__ == "__main__":
    main()
