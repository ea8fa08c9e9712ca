"""Text to batches: dictionaries, files of token ids, blocks, batches, iterators.

Names are imported when they are first used, so that what needs no torch loads none.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULE_OF = {
    "Dictionary": "dictionary",
    "TruncatedDictionary": "dictionary",
    "IndexedCachedDataset": "indexed_dataset",
    "IndexedDataset": "indexed_dataset",
    "IndexedRawTextDataset": "indexed_dataset",
    "MMapIndexedDataset": "indexed_dataset",
    "FairseqDataset": "fairseq_dataset",
    "ConcatDataset": "concat_dataset",
    "TokenBlockDataset": "token_block_dataset",
    "MonolingualDataset": "monolingual_dataset",
    "LanguagePairDataset": "language_pair_dataset",
    "LMContextWindowDataset": "context_windows",
    "LMInferenceDataset": "inference_dataset",
    "TruncateDataset": "shorten_dataset",
    "RandomCropDataset": "shorten_dataset",
    "CountingIterator": "iterators",
    "EpochBatchIterator": "iterators",
    "GroupedIterator": "iterators",
    "ShardedIterator": "iterators",
}
_MODULES = ("data_utils", "dictionary", "indexed_dataset", "iterators")

__all__ = sorted([*_MODULE_OF, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fairseq.data.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fairseq.data' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fairseq.data.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
