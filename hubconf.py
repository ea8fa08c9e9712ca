"""What `torch.hub` finds here: the published checkpoints by name, tokenizers and encodings."""

import argparse
import functools

from fairseq.checkpoint.download import PUBLISHED
from fairseq.data import encoders
from fairseq.models.transformer_lm import TransformerLanguageModel

dependencies = ["numpy", "torch", "tqdm", "yaml"]

for _name in PUBLISHED:
    globals()[_name] = functools.partial(TransformerLanguageModel.from_pretrained, _name)


def bpe(name: str, **settings: object) -> object:
    """Returns a subword encoding by name; settings are those of its flags."""
    from fairseq.registry import BPES

    return _encoding(BPES, encoders.build_bpe, name, settings)


def tokenizer(name: str, **settings: object) -> object:
    """Returns a tokenizer by name; settings are those of its flags."""
    from fairseq.registry import TOKENIZERS

    return _encoding(TOKENIZERS, encoders.build_tokenizer, name, settings)


def _encoding(registry, build, name, settings):
    registry.find(name)
    config = registry.dataclass_of(name)
    section = argparse.Namespace(_name=name) if config is None else config(name, **settings)
    return build(section)
