"""Which position method a file means."""

from __future__ import annotations

import argparse

import pytest

from fairseq.checkpoint.position_method import position_method_of


@pytest.mark.parametrize(
    ("state", "name", "is_certain"),
    [
        ({"alibi": {"position_method": "rotary"}, "cfg": {"model": {}}}, "rotary", True),
        ({"cfg": {"model": {"max_tokens": 9216}}}, "alibi", True),
        ({"cfg": {"model": {"max_tokens": None, "decoder_learned_pos": True}}}, "alibi", True),
        ({"cfg": {"model": {}}}, "sinusoidal", True),
        ({"cfg": {"model": {"decoder_learned_pos": False}}, "args": None}, "sinusoidal", True),
        ({"cfg": {"model": {"decoder_learned_pos": True}}}, "learned", True),
        (
            {
                "cfg": {
                    "model": {"decoder_learned_pos": True, "no_token_positional_embeddings": True}
                }
            },
            "none",
            True,
        ),
        ({"args": argparse.Namespace(max_tokens=512)}, "alibi", False),
        ({"cfg": {"model": argparse.Namespace(max_tokens=512)}}, "alibi", False),
        ({"model": {}}, "alibi", False),
    ],
)
def test_the_method_is_read_from_the_file(state, name, is_certain):
    method = position_method_of(state)
    assert (method.name, method.is_certain) == (name, is_certain)
