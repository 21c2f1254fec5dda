from __future__ import annotations

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import hypothesis
import pytest
import torch
from case_budget import RUNS, chosen, kept

if not torch.cuda.is_available():  # Triton kernels run in its interpreter, which triton decides when it is imported:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before torch._dynamo, which imports it

# It costs a fifth of tracing models of two layers; of thirty layers, whose operators repeat, it saves as much.
torch._dynamo.config.fake_tensor_cache_enabled = False

# Shrinking a failed decoder takes minutes; ask for it with QCOMPILE_SHRINK=1 when you look for a cause.
hypothesis.settings.register_profile(
    "qcompile",
    deadline=None,
    phases=[p for p in hypothesis.Phase if p is not hypothesis.Phase.shrink or os.environ.get("QCOMPILE_SHRINK")],
    derandomize=True,
    max_examples=25,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("qcompile")
# Each example of a law of whole models is traced and run: QCOMPILE_EXHAUSTIVE=1 (`make exhaustive`) asks for more.
hypothesis.settings.register_profile("models", max_examples=20 if os.environ.get("QCOMPILE_EXHAUSTIVE") else 5)


def pytest_addoption(parser):
    parser.addoption("--budget", choices=RUNS, help="as many cases of slow functions as tests/case_budget.txt says")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--budget"):
        few = chosen((item.nodeid for item in items), kept(config.getoption("--budget")))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in few])
        items[:] = [item for item in items if item.nodeid in few]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def one_table():
    """Which sites stay float must not depend on the machine that runs the tests."""
    from qcompile.codegen.cpu import cpu_kernel_choice, training_kernel_choice

    with pytest.MonkeyPatch.context() as patch:
        for choice in (cpu_kernel_choice, training_kernel_choice):
            patch.setattr(choice, "processor", lambda: "vnni")
        yield


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """What was tuned and built before is not seen."""
    from qcompile.codegen.triton.launch.gemm_plan import forget_plans

    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    forget_plans()


@pytest.fixture(scope="session")
def smollm2():
    """The real small LLM; a missing package is a failure, not a skip."""
    from qcompile.generation.pretrained import load_pretrained

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_pretrained()
