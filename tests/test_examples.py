"""Every example runs, as a user starts it, on a small model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doc_pages import ROOT
from tiny_text_models import one_layer_llama

EXAMPLES = ROOT / "examples"
RUNS = {
    "quantize_model.py": (["MODEL", "out"], "it loads with the same logits"),
    "compile_model.py": (["64"], "relative error 0.0"),
    "generate_text.py": (["MODEL"], "tokens/s"),
    "package_model.py": (["MODEL", "model.pt2"], "opened in"),
    "export_onnx.py": (["MODEL", "out"], "relative error to PyTorch"),
    "export_to_servers.py": (["MODEL", "out"], "largest difference of a logit in transformers: 0.0e+00"),
    "finetune_adapters.py": (["MODEL", "2"], "written: finetuned"),
    "train_ddp.py": (["MODEL", "3"], "2 processes have the same weights; written: trained"),
    "prove_rewriting.py": ([], "1 passed"),
}
LAUNCHERS = {
    "train_ddp.py": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "prove_rewriting.py": ["-m", "pytest", "-q", "-c", os.devnull, "--rootdir", "."],
}


def test_every_example_is_tried_and_listed():
    files = {path.name for path in EXAMPLES.glob("*.py")}
    assert files == set(RUNS)
    assert set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text())) == files


@pytest.fixture(scope="module")
def model(smollm2, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "model"
    for part in (one_layer_llama(len(smollm2[1])), smollm2[1]):
        part.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_it_runs(name, model, tmp_path):
    arguments, line = RUNS[name]
    command = [sys.executable, *LAUNCHERS.get(name, []), str(EXAMPLES / name)]
    done = subprocess.run(
        [*command, *(str(model) if argument == "MODEL" else argument for argument in arguments)],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert line in done.stdout
    if name == "train_ddp.py":
        assert (tmp_path / "trained" / "qcompile.json").is_file()
