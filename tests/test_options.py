"""What the commands accept, and how they refuse."""

import pytest

from fairseq import options

README_COMMAND = (
    "data-bin/wikitext-103 --task language_modeling --save-dir checkpoints "
    "--arch transformer_lm_wiki103 --max-update 286000 --lr 1.0 --t-mult 2 "
    "--lr-period-updates 270000 --lr-scheduler cosine --lr-shrink 0.75 --warmup-updates 16000 "
    "--warmup-init-lr 1e-07 --stop-min-lr 1e-09 --optimizer nag --min-lr 0.0001 --clip-norm 0.1 "
    "--criterion adaptive_loss --max-tokens 9216 --update-freq 1 --tokens-per-sample 512 --seed 1 "
    "--sample-break-mode none --skip-invalid-size-inputs-valid-test --ddp-backend=legacy_ddp "
    "--fp16 --required-batch-size-multiple 1"
)


def train(command):
    return options.parse_args_and_arch(options.get_training_parser(), command.split())


def refused(command, capsys, parser=options.get_training_parser):
    with pytest.raises(SystemExit) as stopped:
        options.parse_args_and_arch(parser(), command.split())
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_the_published_training_command():
    args = train(README_COMMAND)
    assert (args.max_tokens, args.max_tokens_valid, args.fp16) == (9216, 9216, True)
    assert (args.lr, args.update_freq, args.clip_norm) == ([1.0], [1], 0.1)
    assert (args.decoder_layers, args.decoder_embed_dim, args.decoder_ffn_embed_dim) == (
        16, 1024, 4096,
    )  # fmt: skip
    assert (args.adaptive_input_cutoff, args.dropout) == ("20000,60000", 0.3)
    assert args.momentum == 0.99 and args.min_lr == 1e-4


def test_a_preset_fills_what_the_command_line_leaves_open():
    args = train("data --task language_modeling --arch transformer_lm_gpt --decoder-embed-dim 256")
    assert (args.decoder_input_dim, args.decoder_output_dim) == (256, 256)
    assert (args.decoder_ffn_embed_dim, args.activation_fn) == (3072, "gelu")


def test_lists_and_aliases():
    args = train(
        "data --task language_modeling --arch transformer_lm --lr 0.1,0.2 --update-freq [2,4] "
        "--max-sentences 7 --max-tokens-valid 20 --nval 3"
    )
    assert (args.lr, args.update_freq, args.batch_size) == ([0.1, 0.2], [2, 4], 7)
    assert (args.batch_size_valid, args.max_tokens_valid, args.max_valid_steps) == (7, 20, 3)


def test_both_spellings_of_the_launcher_s_rank(monkeypatch):
    base = "data --task language_modeling --arch transformer_lm "
    assert train(base + "--local_rank 2").device_id == 2
    assert train(base + "--local-rank=3").device_id == 3
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train(base).device_id == 1


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ("--fp61", " (did you mean --fp16?)"),
        ("--max-tokns 5", " (did you mean one of --max-tokens, --max-tokens-valid?)"),
        ("--use-plasma-vieww", ""),  # a flag that would be refused is no remedy
        ("--xyzzy", ""),
        ("--eval-bleu", " (an option of --task translation)"),
        ("--momentm 1", " (did you mean --momentum?)"),
        ("--context-window 3", " (an option of fairseq-eval-lm)"),
    ],
)
def test_what_an_unknown_flag_may_be(flags, hint, capsys):
    base = "data --task language_modeling --arch transformer_lm --optimizer nag "
    told = refused(base + flags, capsys).splitlines()[0]
    flag = flags.split()[0]
    expected = f"; {flag}{hint}" if hint else ""
    assert told.endswith(f"error: unrecognized arguments: {flags}{expected}")


def test_a_flag_of_another_task_or_command_is_told_as_that(tmp_path, capsys):
    told = refused("data --save-dir x", capsys, options.get_eval_lm_parser)
    assert told.splitlines()[0].endswith("--save-dir (an option of fairseq-train)")
    told = refused("data --sample-break-mode eos", capsys, options.get_generation_parser)
    assert "--sample-break-mode (an option of --task language_modeling)" in told
    settings = tmp_path / "config.yaml"
    settings.write_text("max_epoch: 3\n")
    told = refused(f"data --config {settings}", capsys, options.get_eval_lm_parser)
    assert "sets 'max_epoch', which is no option here (an option of fairseq-train)" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tpu", "--tpu is not supported"),
        ("--use-bmuf", "--use-bmuf is not supported"),
        ("--ddp-backend slow_mo", "--ddp-backend slow_mo is not supported"),
        ("--zero-sharding os", "use --ddp-backend fully_sharded"),
        ("--quant-noise-pq 0.1", "--quant-noise-pq is not supported"),
        ("--character-embeddings", "--character-embeddings is not supported"),
        ("--base-layers 1", "--base-layers is not supported"),
        ("--optimizer lamb", "--optimizer lamb is not supported"),
        ("--bpe bytes", "--bpe bytes is not supported"),
        ("--scoring wer", "--scoring wer is not supported"),
        ("--pipeline-model-parallel", "--pipeline-model-parallel is not supported"),
        ("--quantization-config-path x", "quantization is not provided"),
        ("--use-plasma-view", "--use-plasma-view is not supported"),
        ("--max-tokns 5", "did you mean one of --max-tokens"),
        ("--optimizer adan", "unknown optimizer 'adan'; known are adam"),
        ("--fp16 --bf16", "--fp16 and --bf16 exclude each other"),
    ],
)
def test_what_is_not_there_is_refused(flags, message, capsys):
    base = "data --task language_modeling --arch transformer_lm "
    assert message in refused(base + flags, capsys)


def test_needed_options_are_named(capsys):
    assert "--arch is needed" in refused("data --task language_modeling", capsys)
    printed = refused("--task language_modeling --arch transformer_lm", capsys)
    assert "are required: data" in printed
    assert "known are transformer_lm_gpt," in refused("data --arch transformer_lm_gtp", capsys)


def test_defaults_may_be_left_out():
    parser = options.get_validation_parser()
    args = options.parse_args_and_arch(
        parser, ["data", "--path", "x.pt", "--max-tokens", "64"], suppress_defaults=True
    )
    assert vars(args) == {"data": "data", "path": "x.pt", "max_tokens": 64}


def test_eval_lm_has_neither_architecture_nor_checkpoint_options(capsys):
    parser = options.get_eval_lm_parser
    args = options.parse_args_and_arch(parser(), ["data", "--path", "x.pt", "--context-window=3"])
    assert (args.context_window, args.gen_subset, args.distributed_world_size) == (3, "test", 1)
    assert "--save-dir" in refused("data --save-dir x", capsys, parser)


def test_a_plug_in_s_names_and_options(tmp_path, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "plug_in_for_options"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from fairseq.criterions import FairseqCriterion, register_criterion\n"
        "from fairseq.models import register_model_architecture\n"
        "@register_criterion('criterion_of_plug_in')\n"
        "class PlugIn(FairseqCriterion):\n"
        "    @staticmethod\n"
        "    def add_args(parser):\n"
        "        parser.add_argument('--sharpness', type=float, default=2.0)\n"
        "@register_model_architecture('transformer_lm', 'arch_of_plug_in')\n"
        "def preset(args):\n"
        "    args.decoder_layers = getattr(args, 'decoder_layers', 3)\n"
    )
    args = train(
        f"data --user-dir {folder} --task language_modeling --arch arch_of_plug_in "
        "--criterion criterion_of_plug_in --sharpness 4"
    )
    assert (args.sharpness, args.decoder_layers) == (4.0, 3)


@pytest.mark.parametrize(
    "make",
    [
        options.get_preprocessing_parser,
        options.get_training_parser,
        options.get_eval_lm_parser,
        options.get_validation_parser,
        options.get_extrapolate_parser,
        options.get_diagnose_parser,
        options.get_doctor_parser,
    ],
)
def test_help_needs_nothing_else(make, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["command", "--help"])
    with pytest.raises(SystemExit) as stopped:
        options.parse_args_and_arch(make(), ["--help"])
    assert stopped.value.code == 0
    assert "usage: command" in capsys.readouterr().out
