"""A template: rows and constants are found by equality, and what cannot be found is refused."""

from __future__ import annotations

import pytest
import torch
from served_models import decoder, permuted, write_template

from qcompile.checkpoint.writers.export_refusals import ExportError
from qcompile.checkpoint.writers.gguf_template import GgufTemplate, Place, _arrangement


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "float.gguf"
    return GgufTemplate(write_template(decoder(), path, [("rope_freqs.weight", torch.ones(4))]))


def test_permuted_rows_are_found(template):
    model = decoder()
    weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    place = template.places["model.layers.0.self_attn.q_proj.weight"]
    assert place.name == "blk.0.attn_q.weight" and torch.equal(place.arranged(weight), permuted(weight, 4))
    assert template.places["model.embed_tokens.weight"] == Place("token_embd.weight", None, 0.0)
    assert template.extra == ["rope_freqs.weight"] and template.architecture == "llama"
    assert template.name_of("lm_head.weight") == "output.weight" and template.name_of("other.weight") == ""


def test_logits_that_were_tied_get_a_place_and_nothing_else_does(tmp_path):
    tied = GgufTemplate(write_template(decoder(tied=True), tmp_path / "tied.gguf"))
    assert "lm_head.weight" not in tied.places
    assert tied.place_of("lm_head.weight", "model.embed_tokens.weight") == Place("output.weight", None, 0.0)
    with pytest.raises(ExportError, match="up_proj.bias: the template has no tensor for it"):
        tied.place_of("model.layers.0.mlp.up_proj.bias", "model.embed_tokens.weight")


def test_arrangements():
    ours = torch.randn(6, 8)
    ours[4] = ours[2]  # equal rows: each is used once
    order = torch.tensor([5, 4, 3, 2, 1, 0])
    rows, offset = _arrangement("a.weight", ours[order], ours, None)
    assert torch.equal(ours[rows], ours[order]) and sorted(rows.tolist()) == list(range(6)) and offset == 0
    gain = torch.randn(6)
    assert _arrangement("a.weight", gain + 1, gain, None) == (None, 1.0)
    like = Place("b", order, 0.0)
    assert torch.equal(_arrangement("a.bias", gain[order], gain, like)[0], order)
    with pytest.raises(ExportError, match="a.weight: the template holds it as .6, 8., neither in another order"):
        _arrangement("a.weight", ours * 2, ours, None)
    with pytest.raises(ExportError, match="neither in another order of rows nor with a constant"):
        _arrangement("a.bias", gain[order], gain, None)


def test_what_is_no_template_is_refused(tmp_path):
    with pytest.raises(ExportError, match="none.gguf is no file"):
        GgufTemplate(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(ExportError, match="cannot be read by transformers"):
        GgufTemplate(tmp_path / "bad.gguf")
