"""The context of a model, from its config, its tables of positions or its tokenizer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from qcompile.calibration.context_length import context_length, within_context


class Reader(nn.Module):
    """A model with a table of words and one of positions."""

    def __init__(self, limit, padding=None, words=50):
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=limit)
        self.words, self.positions = nn.Embedding(words, 4, padding_idx=0), nn.Embedding(limit, 4, padding_idx=padding)

    def get_input_embeddings(self):
        return self.words


def tokenizer(limit):
    return SimpleNamespace(model_max_length=limit)


@pytest.mark.parametrize(
    "name",
    ["max_position_embeddings", "n_positions", "max_target_positions", "max_sequence_length", "max_seq_len", "n_ctx",
     "seq_length"],
)  # fmt: skip
def test_configs_name_it_differently(name):
    model = SimpleNamespace(config=SimpleNamespace(**{name: 256}))
    assert context_length(model) == 256 and context_length(model, tokenizer(100)) == 256
    for part in ("text_config", "decoder", "llm_config"):
        inside = SimpleNamespace(config=SimpleNamespace(**{part: SimpleNamespace(**{name: 256})}))
        assert context_length(inside) == 256
        assert within_context(2048, inside) == 256 and within_context(64, inside) == 64
        inside.config.n_positions = 300
        assert context_length(inside) == 300 or name == "n_positions", "the whole counts before its parts"


@pytest.mark.parametrize("unknown", [None, -1, 0, "many", True, 10**30])
def test_the_tokenizer_counts_where_the_model_says_nothing(unknown):
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=unknown))
    assert context_length(model, tokenizer(128)) == 128 and context_length(nn.Linear(2, 2), tokenizer(128)) == 128
    assert context_length(model, tokenizer(10**30)) is None and context_length() is None
    assert within_context(2048, model) == 2048


def test_a_session_says_its_own():
    assert context_length(SimpleNamespace(max_length=77)) == 77


def test_rows_up_to_the_padding_row_are_no_positions():
    """As RoBERTa counts: 514 rows, positions begin behind row 1."""
    assert context_length(Reader(514, padding=1)) == 512
    assert context_length(Reader(512)) == 512
    types = Reader(512)
    types.words = nn.Sequential(nn.Embedding(2, 4, padding_idx=0), types.words)
    assert context_length(types) == 512, "a table of other rows is none of positions"
    assert context_length(Reader(50, words=50)) == 50, "the table of words is none of positions"
