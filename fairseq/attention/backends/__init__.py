"""How attention is computed; the table of backends."""

from __future__ import annotations

import difflib

from fairseq.attention.backends.augmented import AugmentedBackend
from fairseq.attention.backends.auto import AutoBackend
from fairseq.attention.backends.base import AttentionBackend, Prepared
from fairseq.attention.backends.flash import FlashBackend
from fairseq.attention.backends.flex import FlexBackend
from fairseq.attention.backends.reference import ReferenceBackend
from fairseq.attention.backends.sdpa import SdpaBackend
from fairseq.attention.backends.triangular import TriangularBackend
from fairseq.attention.backends.windowed import WindowedBackend

__all__ = ["BACKENDS", "AttentionBackend", "Prepared", "get_backend"]

BACKENDS: dict[str, type[AttentionBackend]] = {
    backend.name: backend
    for backend in (
        AutoBackend,
        ReferenceBackend,
        SdpaBackend,
        AugmentedBackend,
        TriangularBackend,
        WindowedBackend,
        FlexBackend,
        FlashBackend,
    )
}


def get_backend(name: str) -> AttentionBackend:
    """Returns a new backend; each keeps the masks of the model it serves.

    Raises:
        ValueError: no backend has that name.
    """
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, n=1)
        known = ", ".join([*near, *(other for other in BACKENDS if other not in near)])
        raise ValueError(f"--attention-backend: unknown backend {name!r}; known are {known}")
    return BACKENDS[name]()
