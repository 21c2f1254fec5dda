"""ONNX: every form against the module, a whole decoder with its cache, and refusals."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from torch import nn
from zoo import build, example

import qcompile
import qcompile.codegen.onnx.tracing.onnx_linear
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.codegen.onnx.tracing.onnx_linear import NoOnnxForm, OnnxLinear, two_ways
from qcompile.codegen.onnx.verify_outputs import ExportMismatch, unrounded
from qcompile.generation.onnx_session import FolderError, Session
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import random_signs
from qcompile.numerics.rounding import quantize_tensor


def linear(form, act, columns, bias=True, signs=False):
    torch.manual_seed(0)
    q = quantize_tensor(torch.randn(24, columns), Format.parse(form), clip=True)  # of both signs, without zero points
    tensors = dict(codes=q.stored(), scale=q.scale, zero=q.zero, group_scale=q.group_scale)
    tensors["bias"] = torch.randn(24) if bias else None
    tensors["signs"] = random_signs(columns, 0).float() if signs else None
    return QuantLinear(columns, 24, q.format, Format.parse(act) if act else None, tensors)


FORMS = [
    ("int8/row", "int8/row"), ("int8/row", ""), ("int4/group32", ""), ("int4/group32/zero", ""),
    ("int4/group32/floatzero", ""), ("int4/group32/zero/dual", "int8/row"), ("int4/group32", "int4/row"),
    ("int4/group32/zero/dual", "int4/row"), ("int4/row", ""), ("int8/row", "int8/tensor"),
    ("int4/group32/zero/dual", "int8/tensor"), ("int4/group32/dual", "int8/row"), ("int4/group32/dual", "int4/row"),
    ("int8/row", "int8/row/zero"), ("int8/row", "int8/tensor/zero"), ("int4/group32/zero", "int8/row/zero"),
    ("int4/group32/dual", "int8/row/zero"), ("int4/group32", "int4/tensor/zero"),
    ("int2/group32/zero", ""), ("int2/group16", ""), ("int2/group32/floatzero", ""), ("int2/group64", "int8/row"),
]  # fmt: skip


@pytest.mark.parametrize("form,act", FORMS)
@pytest.mark.parametrize("columns,bias,signs", [(80, False, False), (96, True, True)])
def test_forms(form, act, columns, bias, signs, tmp_path):
    model = nn.Sequential(linear(form, act, columns, bias, signs))
    x = torch.randn(2, 3, columns)
    x[1, 2] = 0  # its step would be zero
    x[0, 0], x[0, 1] = x[0, 0].abs(), -x[0, 1].abs() - 1  # of one sign: ranges with zero points end at zero
    for portable in (False, True):
        if portable and ("floatzero" in form or "int2" in form):
            with pytest.raises(NoOnnxForm, match="DequantizeLinear"):
                qcompile.export_onnx(model, tmp_path / "m", example=x, contrib_ops=False)
            continue
        with torch.no_grad(), unrounded(model, lambda site, portable=portable: portable and two_ways(site)):
            error = float((OnnxLinear(model[0], portable)(x) - model(x)).abs().max())
        assert error < 1e-4
        place = tmp_path / str(portable)
        report = qcompile.export_onnx(model, place, example=x, contrib_ops=not portable, progress=False)
        assert report.numbers["onnx relative error"] < 1e-3 and report.numbers["onnx relative error as run"] < 0.05
    assert isinstance(model[0], QuantLinear)


@pytest.mark.parametrize("recipe", [None, "int8", "w4a16", "w4a8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decoder_generates_the_same(name, recipe, tmp_path):
    model = build(name)
    if recipe:
        qcompile.quantize(model, recipe, [example(name)], progress=False)
    qcompile.export_onnx(model, tmp_path / "m", progress=False)
    ids = torch.tensor([[5, 9, 17, 33]])
    want = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 4:].tolist()
    assert list(Session(tmp_path / "m").stream(ids, 12)) == want


def test_a_text_beyond_the_tables_is_refused(tmp_path):
    qcompile.export_onnx(build("llama"), tmp_path / "m", progress=False)
    session = Session(tmp_path / "m")
    ids = torch.randint(3, 128, (1, 64))
    assert session(input_ids=ids).shape == (1, 64, 128)
    with pytest.raises(FolderError, match="65 tokens: .* end at 64"):
        session(input_ids=torch.cat([ids, ids[:, :1]], 1))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "gemma3", "falcon", "bloom", "gemma2"])
def test_runs_unchanged_in_onnxruntime_genai(name, tmp_path):
    """One row and two, against `generate` of the quantized model."""
    import onnxruntime_genai as genai

    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():  # what layers add must outweigh the token, or it repeats for ever
            if parameter.ndim == 2 and parameter is not model.get_input_embeddings().weight:
                parameter.mul_(20 if name == "bloom" else 6)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    qcompile.quantize(model, "w4a16", [example(name)], progress=False)
    qcompile.export_onnx(model, tmp_path / "m", accuracy_level=1, progress=False)
    if tied:  # the file has one table for both, in codes
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(model.get_output_embeddings().weight)
    assert json.loads((tmp_path / "m/genai_config.json").read_text())["search"]["past_present_share_buffer"]
    for rows in ([[5, 9, 17, 33]], [[5, 9, 17, 33], [90, 8, 51, 70]]):
        want = model.generate(
            torch.tensor(rows), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        ).tolist()
        assert len(set(want[0][4:])) > 2, "a text that says the same token for ever proves little"
        parameters = genai.GeneratorParams(folder := genai.Model(str(tmp_path / "m")))
        parameters.set_search_options(max_length=16, min_length=16, batch_size=len(rows))
        generator = genai.Generator(folder, parameters)
        generator.append_tokens(np.array(rows, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert [[int(t) for t in generator.get_sequence(i)] for i in range(len(rows))] == want


def test_encoder(tmp_path):
    report = qcompile.export_onnx(build("bert"), tmp_path / "m", "int8", example=example("bert"), progress=False)
    assert report.numbers["onnx relative error"] < 0.05


def test_refusals(tmp_path):
    with pytest.raises(NoOnnxForm, match="(?s)2 sites.*0: fp8.*1: int3"):
        qcompile.export_onnx(
            nn.Sequential(linear("fp8/row", "", 24), linear("int3/group32/zero", "", 24)), tmp_path / "m"
        )
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        qcompile.export_onnx(nn.Sequential(linear("int8/row", "", 24)), tmp_path / "full", example=torch.randn(2, 24))
    with pytest.raises(FolderError, match="no model.onnx"):
        Session(tmp_path / "full")
    assert os.listdir(tmp_path) == ["full"]


def test_a_wrong_export_leaves_nothing(tmp_path, monkeypatch):
    real = qcompile.codegen.onnx.tracing.onnx_linear.to_blocks

    def wrong(source):
        codes, scales, zeros = real(source)
        return codes, scales * 1.1, zeros

    monkeypatch.setattr(qcompile.codegen.onnx.tracing.onnx_linear, "to_blocks", wrong)
    model = nn.Sequential(linear("int4/group32", "", 64))
    with pytest.raises(ExportMismatch, match="differs from the module"):
        qcompile.export_onnx(model, tmp_path / "m", example=torch.randn(2, 64))
    assert os.listdir(tmp_path) == []
