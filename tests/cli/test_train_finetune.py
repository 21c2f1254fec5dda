"""`qcompile finetune` and `qcompile train`, end to end on a tiny local model."""

from __future__ import annotations

import json
import shutil

import pytest

from qcompile.training.fit import CURVE, LOSSES

SHORT = ["--steps", 3, "--save-every", 2, "--batch", 2, "--length", 16]


def test_finetune_writes_a_merged_model_that_others_read(folder, tmp_path, call):
    out = call("finetune", folder, tmp_path / "q", "--rank", 4, "--lr", 1e-2, *SHORT)
    losses = {
        line.split()[0]: float(line.split()[-1]) for line in out.splitlines() if line[:9] in ("trained  ", "settled  ")
    }
    assert losses["trained"] == pytest.approx(losses["settled"], abs=2e-4)
    assert "parameters of adapters" in out and (tmp_path / "q" / "qcompile.json").exists()
    work = tmp_path / "q.training"
    assert len(json.loads((work / LOSSES).read_text())) == 3 and (work / CURVE).exists()
    assert (work / "adapter" / "adapter_config.json").exists()
    assert "perplexity" in call("eval", tmp_path / "q", "--windows", 1, "--length", 64)


def test_an_earlier_run_is_not_overwritten_and_can_be_resumed(folder, tmp_path, call, fail):
    (tmp_path / "q.training" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "q.training" / "checkpoint-2" / "trainer_state.json").touch()
    assert "is of an earlier run. Fix: --resume" in fail("finetune", folder, tmp_path / "q", *SHORT)
    shutil.rmtree(tmp_path / "q.training")
    out = call("finetune", folder, tmp_path / "q", "--resume", "--rank", 4, *SHORT)
    assert "settled" in out


def test_bad_input_before_the_model_is_loaded(tmp_path, fail):
    assert "recipe 'int8' does not train. Fix: qcompile quantize" in fail(
        "train", "no/model", tmp_path / "o", "-r", "int8"
    )
    assert "unknown recipe" in fail("finetune", "no/model", tmp_path / "o", "-r", "w5")


def test_a_short_text_is_refused_with_its_length(folder, tmp_path, fail):
    (tmp_path / "short.txt").write_text("the a of is in to and " * 20)
    error = fail("finetune", folder, tmp_path / "o", "--text", tmp_path / "short.txt", "--length", 16)
    assert "the text has 8 windows of 16 tokens, and training needs 32" in error
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.training").exists()


@pytest.mark.parametrize("recipe", ["int4-train", "small-galore"])
def test_train_writes_a_settled_model(recipe, folder, tmp_path, call):
    if recipe == "small-galore":
        data = json.loads(call("recipes", "q-galore"))
        data["passes"][0]["rank"] = 8
        recipe = tmp_path / "small.json"
        recipe.write_text(json.dumps(data))
    out = call("train", folder, tmp_path / "q", "-r", recipe, "--lr", 1e-2, *SHORT)
    if recipe == "int4-train":
        assert "rows 32 (option): fixed_point_linear (" in " ".join(out.split()), "compared at batch x length"
    rows = [line.split() for line in out.splitlines() if line.startswith(("trained ", "settled "))]
    losses = {row[0]: float(row[-1]) for row in rows}
    assert losses["trained"] == pytest.approx(losses["settled"], abs=1e-3)
    assert "perplexity" in call("eval", tmp_path / "q", "--windows", 1, "--length", 64)


def test_a_run_is_not_resumed_with_other_settings(folder, tmp_path, call, fail):
    call("finetune", folder, tmp_path / "q", "--rank", 4, *SHORT)
    shutil.rmtree(tmp_path / "q")
    error = fail("finetune", folder, tmp_path / "q", "--resume", "--rank", 8, *SHORT)
    assert "is of a run with --rank 4, not 8. Fix: --resume with the same" in error
    assert "settled" in call("finetune", folder, tmp_path / "q", "--resume", "--rank", 4, *SHORT)
