"""Every documented flag of every command: accepted and read by the code, or refused with a reason.

The tables are the original's documented command line, written down by hand; flags of newer upstream
versions are among them. A line is a flag, its other spellings, and a value other than its default.
"""

import dataclasses
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest

from fairseq import options
from fairseq.positions import PositionConfig
from fairseq.registry import COMPONENT_REGISTRIES, CRITERIONS, LR_SCHEDULERS, OPTIMIZERS
from fairseq_cli import export, score

ROOT = Path(__file__).parents[1]

COMMON = """
--no-progress-bar
--log-interval 7
--log-format json
--tensorboard-logdir events
--wandb-project p
--seed 7
--cpu
--bf16
--memory-efficient-bf16
--fp16
--memory-efficient-fp16
--fp16-no-flatten-grads
--fp16-init-scale 4
--fp16-scale-window 9
--fp16-scale-tolerance 0.5
--min-loss-scale 0.5
--threshold-loss-scale 2
--user-dir tests/golden
--empty-cache-freq 3
--all-gather-list-size 999
--log-file run.log
"""
COMMON_REFUSED = """
--azureml-logging
--tpu
--model-parallel-size 2
--quantization-config-path x
--profile
--reset-logging
--suppress-crashes
--use-plasma-view
--plasma-path x
--aim-repo x
--aim-run-hash x
--on-cpu-convert-precision
--amp
--amp-batch-retries 3
--amp-init-scale 3
--amp-scale-window 3
"""
DATASET = """
--num-workers 3
--skip-invalid-size-inputs-valid-test
--max-tokens 99
--batch-size|--max-sentences 9
--required-batch-size-multiple 3
--dataset-impl lazy
--data-buffer-size 3
--train-subset other
--valid-subset other
--validate-interval 3
--validate-interval-updates 3
--validate-after-updates 3
--fixed-validation-seed 3
--disable-validation
--max-tokens-valid 77
--batch-size-valid|--max-sentences-valid 7
--max-valid-steps|--nval 3
--curriculum 3
--gen-subset other
--num-shards 3
--shard-id 2
--combine-valid-subsets|--combine-val
--ignore-unused-valid-subsets
--grouped-shuffling
--update-ordered-indices-seed
"""
DATASET_REFUSED = """
--required-seq-len-multiple 2
--dataset-impl fasta
--update-epoch-batch-itr
"""
DISTRIBUTED = """
--distributed-world-size 3
--distributed-rank 2
--distributed-backend gloo
--distributed-init-method tcp://host:1
--distributed-port 5
--device-id|--local_rank|--local-rank 2
--distributed-no-spawn
--ddp-backend legacy_ddp
--bucket-cap-mb 3
--fix-batches-to-gpus
--find-unused-parameters
--broadcast-buffers
--heartbeat-timeout 60
--nprocs-per-node 3
--no-reshard-after-forward
--fp32-reduce-scatter
--cpu-offload
--distributed-num-procs 3
--ddp-comm-hook fp16
--gradient-as-bucket-view
--data-parallel ddp
--tensor-parallel-size 3
--sequence-parallel-size 3
--sequence-parallel-attention ring
--sequence-parallel-layout zigzag
--use-sharded-state
"""
DISTRIBUTED_REFUSED = """
--ddp-backend slow_mo
--fast-stat-sync
--slowmo-momentum 0.5
--slowmo-algorithm x
--localsgd-frequency 5
--slowmo-base-algorithm x
--pipeline-model-parallel
--pipeline-balance x
--pipeline-devices x
--pipeline-chunks 3
--pipeline-encoder-balance x
--pipeline-encoder-devices x
--pipeline-decoder-balance x
--pipeline-decoder-devices x
--pipeline-checkpoint always
--zero-sharding os
--not-fsdp-flatten-parameters
"""
OPTIMIZATION = """
--max-epoch 3
--max-update 3
--stop-time-hours 3
--clip-norm 3
--sentence-avg
--update-freq 3
--lr 3
--stop-min-lr 3
--skip-remainder-batch
--compile
"""
OPTIMIZATION_REFUSED = "--use-bmuf"
CHECKPOINT = """
--save-dir other
--restore-file other
--finetune-from-model other
--reset-dataloader
--reset-lr-scheduler
--reset-meters
--reset-optimizer
--optimizer-overrides "{'lr': 1}"
--save-interval 3
--save-interval-updates 3
--keep-interval-updates 3
--keep-last-epochs 3
--keep-best-checkpoints 3
--keep-interval-updates-pattern 3
--no-save
--no-epoch-checkpoints
--no-last-checkpoints
--no-save-optimizer-state
--best-checkpoint-metric ppl
--maximize-best-checkpoint-metric
--patience 3
--checkpoint-suffix x
--load-checkpoint-on-all-dp-ranks
--write-checkpoints-asynchronously|--save-async
--continue-once other
"""
CHECKPOINT_REFUSED = "--checkpoint-shard-count 2"
EMA = """
--store-ema
--ema-decay 0.5
--ema-start-update 3
--ema-seed-model other
--ema-update-freq 3
--ema-fp32
"""
TASK = """
--sample-break-mode eos
--tokens-per-sample 33
--output-dictionary-size 33
--self-target
--future-target
--past-target
--add-bos-token
--max-target-positions 33
--shorten-method truncate
--shorten-data-split-list train
--pad-to-fixed-length
--pad-to-fixed-bsz
"""
MODEL = """
--dropout 0.7
--attention-dropout 0.7
--activation-dropout 0.7
--relu-dropout 0.7
--adaptive-softmax-dropout 0.7
--adaptive-softmax-factor 3
--adaptive-input-factor 3
--decoder-layerdrop 0.7
--decoder-embed-dim 64
--decoder-output-dim 64
--decoder-input-dim 64
--decoder-ffn-embed-dim 64
--decoder-layers 3
--decoder-attention-heads 3
--min-params-to-wrap 3
--activation-fn tanh
--adaptive-softmax-cutoff 3,4
--adaptive-input-cutoff 3,4
--decoder-layers-to-keep 0,2
--decoder-normalize-before
--no-decoder-final-norm
--no-token-positional-embeddings
--share-decoder-input-output-embed
--adaptive-input
--tie-adaptive-weights
--tie-adaptive-proj
--decoder-learned-pos
--layernorm-embedding
--no-scale-embedding
--checkpoint-activations
--offload-activations
"""
MODEL_REFUSED = """
--character-embeddings
--character-filters x
--character-embedding-dim 3
--char-embedder-highway-layers 3
--quant-noise-pq 0.1
--quant-noise-pq-block-size 3
--quant-noise-scalar 0.1
--base-layers 1
--base-sublayers 2
--base-shuffle 0
"""
TRANSLATION = """
--source-lang|-s en
--target-lang|-t de
--left-pad-source
--left-pad-target
--max-source-positions 33
--max-target-positions 33
--upsample-primary 3
--truncate-source
--eval-bleu
--eval-bleu-args "{}x"
--eval-bleu-detok moses
--eval-bleu-detok-args "{}x"
--eval-tokenized-bleu
--eval-bleu-remove-bpe sentencepiece
--eval-bleu-print-samples
"""
TRANSLATION_REFUSED = """
--load-alignments
--num-batch-buckets 3
"""
ENCODER_DECODER = """
--dropout 0.7
--attention-dropout 0.7
--activation-dropout 0.7
--relu-dropout 0.7
--adaptive-softmax-dropout 0.7
--adaptive-softmax-factor 3
--encoder-layerdrop 0.7
--decoder-layerdrop 0.7
--encoder-embed-dim 64
--encoder-ffn-embed-dim 64
--encoder-layers 3
--encoder-attention-heads 3
--decoder-embed-dim 64
--decoder-output-dim 64
--decoder-ffn-embed-dim 64
--decoder-layers 3
--decoder-attention-heads 3
--min-params-to-wrap 3
--activation-fn tanh
--adaptive-softmax-cutoff 3,4
--encoder-layers-to-keep 0,2
--decoder-layers-to-keep 0,2
--encoder-normalize-before
--decoder-normalize-before
--no-decoder-final-norm
--no-token-positional-embeddings
--share-decoder-input-output-embed
--share-all-embeddings
--encoder-learned-pos
--decoder-learned-pos
--layernorm-embedding
--no-scale-embedding
--checkpoint-activations
--offload-activations
--position-method rotary
--encoder-alibi-variant symmetric
--cross-attention-bias aligned
--attention-backend reference
"""
ENCODER_DECODER_REFUSED = """
--encoder-embed-path x
--decoder-embed-path x
--no-cross-attention
--cross-self-attention
--quant-noise-pq 0.1
--quant-noise-pq-block-size 3
--quant-noise-scalar 0.1
"""
SCORE = """
--sys|-s x
--ref|-r y
--order|-o 3
--ignore-case
--sacrebleu
--sentence-bleu
--chrf
"""
EVALUATION = """
--path other
--post-process|--remove-bpe subword_nmt
--model-overrides "{'dropout': 0}"
"""
EVALUATION_REFUSED = """
--quiet
--results-path x
"""
EVAL_LM = """
--output-word-probs
--output-word-stats
--context-window 3
--softmax-batch 3
"""
GENERATE_OUTPUT = """
--quiet
--results-path x
"""
GENERATION = """
--beam 3
--nbest 3
--max-len-a 0.5
--max-len-b 33
--min-len 3
--match-source-len
--unnormalized
--lenpen 0.5
--unkpen 0.5
--score-reference
--prefix-size 3
--no-repeat-ngram-size 3
--sampling
--sampling-topk 3
--sampling-topp 0.5
--temperature 0.5
--diverse-beam-groups 3
--diverse-beam-strength 0.3
--diversity-rate 0.3
--lm-path x
--lm-weight 0.3
--retain-dropout
--retain-dropout-modules "['x']"
--print-alignment soft
--cache-error 0.3
"""
GENERATION_REFUSED = """
--no-early-stop
--no-beamable-mm
--replace-unk
--sacrebleu
--constraints
--print-step
--iter-decode-eos-penalty 0.5
--iter-decode-max-iter 3
--iter-decode-force-max-iter
--iter-decode-with-beam 3
--iter-decode-with-external-reranker
--retain-iter-history
--decoding-format vote
--no-seed-provided
"""
INTERACTIVE = """
--buffer-size 3
--input x
"""
PREPROCESS = """
--source-lang|-s en
--target-lang|-t de
--trainpref x
--validpref x
--testpref x
--align-suffix x
--alignfile x
--destdir x
--thresholdsrc 3
--thresholdtgt 3
--srcdict x
--tgtdict x
--nwordssrc 3
--nwordstgt 3
--dataset-impl raw
--joined-dictionary
--only-source
--padding-factor 3
--workers 3
--dict-only
"""
# What the flag changes beside its own setting.
FOLLOWING = {
    "--max-tokens": {"max_tokens_valid"},
    "--batch-size": {"batch_size_valid"},
    "--memory-efficient-fp16": {"fp16"},
    "--memory-efficient-bf16": {"bf16"},
    "--offload-activations": {"checkpoint_activations"},
    "--encoder-embed-dim": {"decoder_embed_dim", "decoder_output_dim"},
    "--encoder-ffn-embed-dim": {"decoder_ffn_embed_dim"},
    "--decoder-embed-dim": {"decoder_input_dim", "decoder_output_dim"},
    "--adaptive-softmax-cutoff": {"adaptive_input_cutoff"},
    "--no-decoder-final-norm": {"decoder_normalize_before"},
}
SHARED = COMMON + DATASET + DISTRIBUTED
SHARED_REFUSED = COMMON_REFUSED + DATASET_REFUSED + DISTRIBUTED_REFUSED
ACCEPTED = {
    "train": SHARED + OPTIMIZATION + CHECKPOINT + EMA + TASK + MODEL,
    "train translation": TRANSLATION + ENCODER_DECODER,
    "score": SCORE,
    "eval-lm": SHARED + EVALUATION + EVAL_LM + TASK,
    "validate": SHARED + EVALUATION + TASK,
    "generate": SHARED + EVALUATION + GENERATE_OUTPUT + GENERATION + CHECKPOINT + TASK,
    "interactive": SHARED + EVALUATION + GENERATION + CHECKPOINT + INTERACTIVE + TASK,
    "preprocess": COMMON + PREPROCESS,
}
REFUSED = {
    "train": "\n".join([SHARED_REFUSED, OPTIMIZATION_REFUSED, CHECKPOINT_REFUSED, MODEL_REFUSED]),
    "train translation": TRANSLATION_REFUSED + ENCODER_DECODER_REFUSED,
    "score": "",
    "eval-lm": SHARED_REFUSED + EVALUATION_REFUSED,
    "validate": SHARED_REFUSED + EVALUATION_REFUSED,
    "generate": "\n".join([SHARED_REFUSED, GENERATION_REFUSED, CHECKPOINT_REFUSED]),
    "interactive": "\n".join(
        [SHARED_REFUSED, EVALUATION_REFUSED, GENERATION_REFUSED, CHECKPOINT_REFUSED]
    ),
    "preprocess": COMMON_REFUSED,
}
PARSERS = {
    "train": options.get_training_parser,
    "train translation": options.get_training_parser,
    "score": score.get_parser,
    "eval-lm": options.get_eval_lm_parser,
    "validate": options.get_validation_parser,
    "generate": options.get_generation_parser,
    "interactive": options.get_interactive_generation_parser,
    "preprocess": options.get_preprocessing_parser,
}
BASE = {
    "train": "data --arch transformer_lm",
    "train translation": "data --task translation --arch transformer",
    "score": "--ref x",
    "eval-lm": "data",
    "validate": "data",
    "generate": "data --task language_modeling",
    "interactive": "data --task language_modeling",
    "preprocess": "",
}
# What every command takes along of how a model was trained ...
OF_A_RUN = """
        --validate-after-updates --fixed-validation-seed --disable-validation --max-tokens-valid
        --batch-size-valid --max-valid-steps --curriculum --combine-valid-subsets
        --ignore-unused-valid-subsets --grouped-shuffling --update-ordered-indices-seed
        --ddp-backend --bucket-cap-mb --fix-batches-to-gpus --find-unused-parameters
        --broadcast-buffers --heartbeat-timeout --no-reshard-after-forward --fp32-reduce-scatter
        --cpu-offload --ddp-comm-hook --gradient-as-bucket-view
        --data-parallel
"""
# ... among it what fairseq-eval-lm and fairseq-validate heed ...
OF_SHARING = """
        --tensor-parallel-size --sequence-parallel-size
        --sequence-parallel-attention --sequence-parallel-layout
"""
# ... and of where its checkpoints went.
OF_CHECKPOINTS = """
        --save-dir --restore-file --finetune-from-model --reset-dataloader --reset-lr-scheduler
        --reset-meters --reset-optimizer --optimizer-overrides --save-interval
        --save-interval-updates --keep-interval-updates --keep-last-epochs
        --keep-best-checkpoints --keep-interval-updates-pattern --no-save
        --no-epoch-checkpoints --no-last-checkpoints --no-save-optimizer-state
        --best-checkpoint-metric --maximize-best-checkpoint-metric --patience
        --load-checkpoint-on-all-dp-ranks --write-checkpoints-asynchronously --continue-once
"""
# Accepted because command lines carry them from one command to the next; listed in the document.
CAME_ALONG = {
    "preprocess": """
        --no-progress-bar --log-interval --log-format --tensorboard-logdir --wandb-project --seed
        --cpu --bf16 --memory-efficient-bf16 --fp16 --memory-efficient-fp16 --fp16-no-flatten-grads
        --fp16-init-scale --fp16-scale-window --fp16-scale-tolerance --min-loss-scale
        --threshold-loss-scale --empty-cache-freq --all-gather-list-size
    """,
    "train": "--gen-subset --num-shards --shard-id",
    "eval-lm": f"""
        --seed --tensorboard-logdir --wandb-project --empty-cache-freq --all-gather-list-size
        --fp16-no-flatten-grads --fp16-init-scale --fp16-scale-window --fp16-scale-tolerance
        --min-loss-scale --threshold-loss-scale
        --skip-invalid-size-inputs-valid-test --required-batch-size-multiple
        --train-subset --valid-subset --validate-interval --validate-interval-updates
        {OF_A_RUN}
        --max-target-positions
    """,
    "validate": f"""
        --tensorboard-logdir --wandb-project --empty-cache-freq
        --fp16-no-flatten-grads --fp16-init-scale --fp16-scale-window --fp16-scale-tolerance
        --min-loss-scale --threshold-loss-scale --post-process
        --gen-subset --num-shards --shard-id
        --train-subset --validate-interval --validate-interval-updates
        {OF_A_RUN}
    """,
    "generate": f"""
        --tensorboard-logdir --wandb-project --empty-cache-freq --all-gather-list-size
        --fp16-no-flatten-grads --fp16-init-scale --fp16-scale-window --fp16-scale-tolerance
        --min-loss-scale --threshold-loss-scale
        --train-subset --valid-subset --validate-interval --validate-interval-updates
        {OF_A_RUN}
        {OF_SHARING}
        {OF_CHECKPOINTS}
        --max-target-positions
    """,
    "interactive": f"""
        --tensorboard-logdir --wandb-project --empty-cache-freq --all-gather-list-size
        --fp16-no-flatten-grads --fp16-init-scale --fp16-scale-window --fp16-scale-tolerance
        --min-loss-scale --threshold-loss-scale
        --train-subset --valid-subset --validate-interval --validate-interval-updates
        {OF_A_RUN}
        {OF_SHARING}
        {OF_CHECKPOINTS}
        --gen-subset --num-shards --shard-id --required-batch-size-multiple --dataset-impl
        --log-interval --log-format --no-progress-bar --num-workers --data-buffer-size
        --sample-break-mode --tokens-per-sample --self-target --future-target --past-target
        --max-target-positions --shorten-method --shorten-data-split-list
        --pad-to-fixed-length --pad-to-fixed-bsz
    """,
}


def rows(table):
    """Yields (spellings, [value] or [])."""
    for line in table.splitlines():
        if line:
            spellings, *value = shlex.split(line)
            yield spellings.split("|"), value


def cases(tables):
    for command, table in tables.items():
        for spellings, value in rows(table):
            for flag in spellings:
                yield pytest.param(command, flag, value, id=f"{command} {flag}")


def parse(command, arguments):
    parser = PARSERS[command]()
    if command == "preprocess":
        return options.parse_args(parser, arguments)
    if command == "score":
        return parser.parse_args(arguments)
    return options.parse_args_and_arch(parser, arguments)


@pytest.fixture(scope="module")
def defaults():
    return {name: vars(parse(name, base.split())) for name, base in BASE.items()}


@pytest.mark.parametrize(("command", "flag", "value"), list(cases(ACCEPTED)))
def test_accepted(command, flag, value, defaults, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("fairseq.utils.import_user_module", lambda args: None)
    found = vars(parse(command, [*BASE[command].split(), flag, *value]))
    before = defaults[command]
    changed = {name for name, value in found.items() if value != before.get(name)}
    main = next(spellings[0] for spellings, _ in rows(ACCEPTED[command]) if flag in spellings)
    own = main[2:].replace("-", "_")
    assert changed - FOLLOWING.get(main, set()) == {own}


@pytest.mark.parametrize(("command", "flag", "value"), list(cases(REFUSED)))
def test_refused(command, flag, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(command, [*BASE[command].split(), flag, *value])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert f"{flag} " in printed and "is not supported: " in printed


@pytest.mark.parametrize("command", [name for name in PARSERS if name != "train translation"])
def test_no_other_flag_of_the_original_s_sections_is_there(command):
    """What the parser knows beyond the tables is this project's own, and named here."""
    parser = PARSERS[command]()
    documented = {"--help", "-h", "-a", "--arch", "--config", "--task", "--cpu-half"}
    documented |= {"--" + name.replace("_", "-") for name in COMPONENT_REGISTRIES}
    for table in (ACCEPTED[command], REFUSED[command]):
        documented |= {flag for spellings, _ in rows(table) for flag in spellings}
    if command in ("eval-lm", "validate", "generate", "interactive"):
        documented |= {"--position-method"}
        fields = dataclasses.fields(PositionConfig)
        documented |= {"--" + field.name.replace("_", "-") for field in fields}
    assert set(parser.known_flags()) - documented == set()


def settings_of(registry, name):
    config = registry.dataclass_of(name)
    for field in dataclasses.fields(config) if config is not None else ():
        if field.name != "_name" and not field.metadata.get("unsupported"):
            yield field.name


def read_in(text):
    """Returns the names that some code in a text reads as an attribute."""
    attributes = re.findall(r"\.(\w+)\b(?!\s*=[^=])", text)
    return {*attributes, *re.findall(r"(?:getattr|_setting)\([^()]*?\"(\w+)\"", text)}


def test_every_accepted_setting_is_read_somewhere():
    """A setting that no code reads cannot have an effect."""
    folders = (ROOT / "fairseq", ROOT / "fairseq_cli")
    text = "\n".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    names = set()
    for command, table in ACCEPTED.items():
        flags = {spellings[0] for spellings, _ in rows(table)}
        flags -= set(CAME_ALONG.get(command, "").split())
        names |= {flag[2:].replace("-", "_") for flag in flags}
    # These two are read for either side, as f"threshold{side}".
    names -= {limit + side for limit in ("threshold", "nwords") for side in ("src", "tgt")}
    # And these for encoder and decoder, as f"{side}_ffn_embed_dim".
    names -= {"encoder_ffn_embed_dim", "encoder_layers_to_keep"}
    assert names - read_in(text) == set()


@pytest.mark.parametrize(
    ("registry", "name"), [(r, name) for r in (OPTIMIZERS, LR_SCHEDULERS) for name in r]
)
def test_every_setting_of_a_component_is_read_by_it(registry, name):
    text = "".join(
        inspect.getsource(sys.modules[c.__module__]) for c in registry[name].__mro__[:-1]
    )
    assert set(settings_of(registry, name)) - read_in(text) - {"tpu"} == set()


@pytest.mark.parametrize("name", list(CRITERIONS))
def test_every_setting_of_a_criterion_reaches_its_constructor(name):
    parameters = set(inspect.signature(CRITERIONS[name].__init__).parameters)
    parameters |= read_in(inspect.getsource(CRITERIONS[name]))
    assert set(settings_of(CRITERIONS, name)) <= parameters


def test_flags_that_come_along_are_listed_in_the_document():
    text = (ROOT / "docs/compatibility.md").read_text()
    section = text.partition("## Flags that come along")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| fairseq-([\w-]+) \| (.+?) \|$", section, flags=re.MULTILINE)
    listed = {command: set(re.findall(r"`(--[\w-]+)`", flags)) for command, flags in rows}
    expected = {command: set(flags.split()) for command, flags in CAME_ALONG.items()}
    assert listed == expected


@pytest.mark.parametrize("command", list(CAME_ALONG))
def test_flags_that_come_along_are_accepted(command):
    accepted = {spellings[0] for spellings, _ in rows(ACCEPTED[command])}
    assert set(CAME_ALONG[command].split()) <= accepted


# Flag, where its value is kept, and a value.
EXPORT = [
    *(("--path", "path", "x"), ("--output", "output", "y"), ("--dict", "dict", "d")),
    *(("--to", "to", "hf"), ("--to", "to", "safetensors")),
    *(("--from", "source", "hf"), ("--from", "source", "safetensors")),
]


@pytest.mark.parametrize(("flag", "name", "value"), EXPORT)
def test_flags_of_export(flag, name, value):
    """Either --to or --from is given, so the command line differs by flag."""
    parser = export.get_parser()
    base = ["--path", "x", "--output", "y", "--dict", "d"]
    direction = [] if flag in ("--to", "--from") else ["--to", "hf"]
    found = vars(parser.parse_args([*base, *direction, flag, value]))
    assert found[name] == value
    assert f"args.{name}" in inspect.getsource(export)
    known = {spelling for action in parser._actions for spelling in action.option_strings}
    assert known == {row[0] for row in EXPORT} | {"-h", "--help"}
