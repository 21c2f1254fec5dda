"""Reports: text for a terminal and plain data."""

from __future__ import annotations

import json

import pytest
import torch
from zoo import build, example

import qcompile
from qcompile.numerics.format import Format
from qcompile.recipe.report import Certificate, KVConstants, PassReport, PrefixValues, Report, SiteReport


def quantized(name="llama", recipe="int8"):
    model = build(name)
    return model, qcompile.quantize(model, recipe, [example(name)], progress=False)


def site(name, quantized=True, reason=""):
    report = SiteReport(name, 6, 8, reason=reason, bytes_before=192, bytes_after=192)
    if quantized:
        report.set_quantized(Format("int8"), None, 72)
    return report


def test_report_is_data():
    _, report = quantized()
    data = json.loads(json.dumps(report.to_json()))
    assert len(data["sites"]) == 15 and data["bytes_after"] < data["bytes_before"]
    assert "15 of 15 sites" in str(report)


def test_text():
    report = Report("mine", [site("a"), site("b"), site("c", False, "too small"), site("d", False, "too small")])
    report.sites[0].kernel = {"rows 1": "fast"}
    report.sites[0].output_error, report.sites[1].output_error = (0.02, 0.01), (0.04, 0.03)
    report.seconds, report.peak_bytes, report.metrics = 1.25, 3_000_000, {"perplexity": 12.3456}
    entry = PassReport("Quantize", ["a", "b"], notes=["a note"])
    entry.skip("c", "too small", "linear_2")
    report.passes, report.breaks = [entry], ["a print at model.py:3"]
    report.certificates = [Certificate("Rotate", 1e-6, 1e-3, "float32"), Certificate("Fold", 1, 1e-3, "float32", "add")]
    assert str(report).splitlines() == [
        "recipe mine: 2 of 4 sites quantized, 0.0 MB -> 0.0 MB of linear weights, 1.2 s, peak 3.0 MB",
        "     1 x  weight int8/row" + " " * 20 + " act float" + " " * 7 + " rows 1: fast",
        "     1 x  weight int8/row" + " " * 20 + " act float" + " " * 7 + " ",
        "  output error of 2 sites, mean: 3.00e-02 rounded to nearest, 2.00e-02 as chosen; largest 3.00e-02 at b",
        "     2 x  float: too small (c, d)",
        "  pass Quantize: 2 done, 1 skipped",
        "       a note",
        "       skipped 1: too small (c @ linear_2)",
        "  law Rotate: holds (1.0e-06 <= 1e-03, float32)",
        "  law Fold: BROKEN, undone; first at add (1.0e+00 <= 1e-03, float32)",
        "  graph break: a print at model.py:3",
        "  perplexity: 12.35",
    ]


def test_bytes_and_skipped_sites():
    report = Report("mine", [site("a"), site("b", False, "kept")])
    assert (report.bytes_before, report.bytes_after) == (384, 264)
    assert [s.name for s in report.skipped] == ["b"] and report.sites[0].quantized
    assert (report.sites[0].weight, report.sites[0].act, report.sites[0].reason) == ("int8/row", "float", "")


def test_many_places_are_counted_not_listed():
    report = Report("mine", [site(f"s{i}", False, "kept") for i in range(9)])
    assert "9 x  float: kept (s0, s1, s2, and 6 more)" in str(report)


def test_metrics_are_written(tmp_path):
    report = Report("mine", metrics={"kl": 0.5})
    report.write(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["metrics"] == {"kl": 0.5}


def test_tensors_are_not_data():
    entry = PassReport("QuantizeKV", changed={"b", "a"}, constants=KVConstants(centers=(torch.ones(2, 4),)))
    (data,) = Report("mine", passes=[entry]).to_json()["passes"]
    assert "constants" not in data and data["changed"] == ["a", "b"]
    assert entry.constants.centers, "the report itself keeps them"


def test_the_later_constants_win():
    one, two = (torch.ones(1),), (torch.zeros(1),)
    prefix = PrefixValues(torch.tensor([1]), one, one, torch.zeros(1, 1, 3))
    first, second = PassReport("A", constants=KVConstants(one, one)), PassReport("B", constants=KVConstants(two))
    found = Report("mine", passes=[first, second, PassReport("C", constants=KVConstants(prefix=prefix))]).constants
    assert found.centers is two and found.key_scales is one and found.prefix is prefix and found.value_scales == ()


@pytest.mark.parametrize("error,holds", [(0.0, True), (1e-3, True), (1.1e-3, False), (float("inf"), False)])
def test_a_certificate_holds_up_to_its_tolerance(error, holds):
    assert Certificate("x", error, 1e-3, "float32").holds == holds
