"""A GGUF file of a quantized model: transformers reads it and computes the same; llama.cpp's own types of the rest."""

from __future__ import annotations

import gguf
import pytest
import torch
import transformers
from served_models import decoder, ids, quantized, write_template

import qcompile
from qcompile.api import export_model
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.writers import gguf_file
from qcompile.checkpoint.writers.export_refusals import ExportError
from qcompile.checkpoint.writers.gguf_file import write_gguf
from qcompile.checkpoint.writers.gguf_template import GgufTemplate
from qcompile.passes import FoldNorm, Fuse, Quantize, Rotate, Untie
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import Rule


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    extra = [("rope_freqs.weight", torch.arange(16).float() + 1)]
    return GgufTemplate(write_template(decoder(), tmp_path_factory.mktemp("gguf") / "float.gguf", extra))


def read(path):
    return transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)


@pytest.mark.parametrize(
    "weight, kind", [("int8/group32/f16", "Q8_0"), ("int4/group32/f16", "Q4_0"), ("int4/group32/floatzero/f16", "Q4_1")]
)
def test_transformers_computes_the_same(tmp_path, template, weight, kind):
    model = quantized(weight, clip=True)
    assert write_gguf(model, template, tmp_path / "out.gguf") == 7
    reader = gguf.GGUFReader(str(tmp_path / "out.gguf"))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == kind and types["output_norm.weight"] == "F32"
    assert types["token_embd.weight"] == "F32" and types["rope_freqs.weight"] == "F32"
    assert reader.fields["general.file_type"].contents() == getattr(gguf.LlamaFileType, f"MOSTLY_{kind}")
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    with torch.no_grad():
        difference = float((read(tmp_path / "out.gguf")(ids()).logits - model(ids()).logits).abs().max())
    assert difference == 0.0 if kind != "Q4_1" else difference < 1e-4


def test_a_mixed_file_of_q4_k(tmp_path, template):
    rules = (Rule("*.down_proj.*", weight="int4/group32/k6"), Rule("lm_head.*", weight="int8/group32/f16"))
    model = quantized("int4/group32/f16", rules=rules, clip=True)
    write_gguf(model, template, tmp_path / "out.gguf")
    reader = gguf.GGUFReader(str(tmp_path / "out.gguf"))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.attn_q.weight"]) == ("Q4_K", "Q4_0")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    with torch.no_grad():
        assert torch.equal(read(tmp_path / "out.gguf")(ids()).logits, model(ids()).logits)


def test_a_file_of_q4_k_says_so(tmp_path, template):
    rules = (Rule("*.down_proj.*", weight="int4/group32/k6"), Rule("*", keep=True))
    write_gguf(quantized("int4/group32/f16", rules=rules), template, tmp_path / "out.gguf")
    fields = gguf.GGUFReader(str(tmp_path / "out.gguf")).fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_S


def test_rotated_and_untied_models_get_logits_of_their_own(tmp_path):
    tied = GgufTemplate(write_template(decoder(tied=True), tmp_path / "tied.gguf"))
    model = decoder(tied=True)
    passes = (Untie(), FoldNorm(), Rotate(), Quantize("int8/group32/f16", None, lm_head="int8/group32/f16"), Fuse())
    qcompile.quantize(model, Recipe("r", passes), progress=False)
    assert write_gguf(model, tied, tmp_path / "out.gguf") == 8
    with torch.no_grad():
        assert torch.equal(read(tmp_path / "out.gguf")(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("dtype, kind", [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_float_tables_are_stored_without_rounding(tmp_path, template, dtype, kind):
    model = quantized("int8/group32/f16", dtype=dtype)
    model.model.embed_tokens.weight[0, 0] = 2.0**-24 if dtype == torch.float16 else 2.0**-60
    write_gguf(model, template, tmp_path / "out.gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(str(tmp_path / "out.gguf")).tensors}
    table = found["token_embd.weight"]
    assert table.tensor_type.name == kind
    values = torch.from_numpy(gguf.quants.dequantize(table.data, table.tensor_type))
    assert torch.equal(values, model.model.embed_tokens.weight.float())


def test_a_file_that_reads_otherwise_is_refused(tmp_path, template, monkeypatch):
    blocks_of = gguf_file.blocks_of

    def wrong(site, linear):
        kind, blocks = blocks_of(site, linear)
        blocks[0, 5] ^= 1
        return kind, blocks

    monkeypatch.setattr(gguf_file, "blocks_of", wrong)
    for weight in ("int8/group32/f16", "int4/group32/floatzero/f16"):
        with pytest.raises(ExportError, match=r"q_proj: gguf reads"):
            write_gguf(quantized(weight), template, tmp_path / "out.gguf")
    rules = (Rule("*.down_proj.*", weight="int4/group32/k6"), Rule("*", keep=True))
    with pytest.raises(ExportError, match=r"down_proj: gguf reads"):
        write_gguf(quantized("int4/group32/f16", rules=rules), template, tmp_path / "out.gguf")


def test_export_needs_the_template_and_reads_it_first(tmp_path):
    with pytest.raises(ExportError, match="export to gguf needs a template.*Fix: give template="):
        qcompile.export(quantized("int8/group32/f16"), tmp_path / "out", to="llama.cpp", progress=False)
    with pytest.raises(ExportError, match="compressed-tensors takes no template"):
        qcompile.export(quantized("int8/row"), tmp_path / "out", template="a.gguf", progress=False)
    path = write_template(decoder(), tmp_path / "float.gguf")
    qcompile.export(quantized("int8/group32/f16"), tmp_path / "out", to="gguf", template=path, progress=False)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.gguf", "README.md", "qcompile-report.json"}
    assert "llama-server -m out/model.gguf" in (tmp_path / "out/README.md").read_text()


def test_export_to_a_file_writes_that_file_alone_and_no_other(tmp_path, monkeypatch):
    path, out = write_template(decoder(), tmp_path / "float.gguf"), tmp_path / "new" / "out.gguf"
    options = dict(to="llama.cpp", template=path, progress=False)
    report = qcompile.export(decoder(), out, "gguf-q4_k", [ids()], **options)
    assert [p.name for p in out.parent.iterdir()] == ["out.gguf"] and "8 weights read back" in str(report)
    formats = {"int4/group32/k6", "int4/group32/floatzero/f16", "int8/group32/f16"}
    assert {site.weight for site in report.sites} == formats
    with pytest.raises(CheckpointError, match="out.gguf exists and is not empty"):
        qcompile.export(decoder(), out, "gguf-q8_0", **options)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ExportError, match="folder.gguf is a folder. Fix: name a file in it"):
        qcompile.export(decoder(), tmp_path / "folder.gguf", "gguf-q8_0", **options)

    def fails(*arguments):
        raise ExportError("differs")

    monkeypatch.setattr(gguf_file, "_compare", fails)
    with pytest.raises(ExportError, match="differs"):
        qcompile.export(decoder(), out.with_name("other.gguf"), "gguf-q8_0", **options)
    assert [p.name for p in out.parent.iterdir()] == ["out.gguf"]


def test_a_template_of_another_model_is_refused_before_work(tmp_path, monkeypatch):
    quantize = []
    monkeypatch.setattr(export_model, "quantize", lambda *a, **k: quantize.append(a))
    path, other = write_template(decoder(), tmp_path / "float.gguf"), decoder()
    other.model.layers[0].mlp.down_proj = torch.nn.Linear(512, 128, bias=False)
    with pytest.raises(ExportError, match=r"down_proj.weight: the template holds it as \[128, 256\], .* as \[128, 512"):
        qcompile.export(other, tmp_path / "o", "gguf-q8_0", to="gguf", template=path, progress=False)
    other.model.layers = torch.nn.ModuleList()
    with pytest.raises(ExportError, match="the model as nothing: it is of another model"):
        qcompile.export(other, tmp_path / "o", "gguf-q8_0", to="gguf", template=path, progress=False)
    assert not quantize and not (tmp_path / "o").exists()
