"""Makes the Auto classes of transformers know the models and tokenizers of this project."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fairseq.huggingface.configuration import FairseqAlibiConfig
from fairseq.huggingface.modeling import FairseqAlibiForCausalLM
from fairseq.huggingface.tokenization import FairseqAlibiTokenizer

__all__ = ["register"]


def register() -> None:
    """Registers `fairseq_alibi`; calling it again changes nothing."""
    AutoConfig.register(FairseqAlibiConfig.model_type, FairseqAlibiConfig, exist_ok=True)
    AutoModelForCausalLM.register(FairseqAlibiConfig, FairseqAlibiForCausalLM, exist_ok=True)
    AutoTokenizer.register(
        FairseqAlibiConfig, slow_tokenizer_class=FairseqAlibiTokenizer, exist_ok=True
    )
