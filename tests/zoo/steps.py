"""What is done with every architecture, each step on a copy of its own.

A step returns its error against the float model, or None; it raises Fault where a result is wrong. A refusal is one of
our ValueErrors, and leaves the model as it was, bit by bit.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import qcompile
from qcompile.api.verify_model import verify_model
from qcompile.pipeline.find_recipe import find_recipe
from zoo import ARCHITECTURES, brief, build, example
from zoo.outcome import FAULT, PASS, REFUSED, Declined, Fault, Outcome, distance, one_line, same, tensors

# What the formats allow on random tiny models, all sites quantized. int8 rounds to 1/254 of a row's maximum: up to 1 %
# of a product. 4 bits have 15 levels for groups as wide as the model: a tenth of a product. Errors of two layers add
# up, and routers and gates of random weights multiply them.
BOUNDS = {"int8": 0.1, "w4a16": 0.4}
NOISE = {"int8": 0.01, "w4a16": 0.05}
ROTATED = 1.2  # times the error of the same recipe without rewritings
AGREE = 0.05  # in place against compiled: logits of broken graphs get other formats than layers
NEW_TOKENS = 4


class Case:
    """One architecture: its float model, inputs and float outputs."""

    def __init__(self, name: str) -> None:
        self.name, self.architecture = name, ARCHITECTURES[name]
        self.model = build(name)
        self.inputs = example(name)
        self.batches = [self.inputs, self._second()]
        self.want = self.outputs(self.model)
        self.plain: dict[str, float] = {}

    def _second(self) -> dict[str, Any]:
        torch.manual_seed(2)
        return self.architecture.inputs()

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """On all batches: logits of all in one tensor, then the rest."""
        each = []
        for batch in self.batches:
            torch.manual_seed(3)
            with torch.no_grad():
                each.append([tensor.clone() for tensor in tensors(model(**batch))])
        return [torch.cat([found[0] for found in each]), *(tensor for found in each for tensor in found[1:])]

    def check_error(self, error: float, form: str) -> None:
        """Raises Fault where a format loses more than it may."""
        allowed = self.architecture.bounds.get(form, BOUNDS[form])
        if not error < allowed:
            raise Fault(f"error {error:.3f} > {allowed}")

    def fresh(self) -> nn.Module:
        """A copy of the float model."""
        return copy.deepcopy(self.model)

    def quantized(self, recipe: str) -> tuple[nn.Module, Any]:
        """A copy, quantized in place, and the report."""
        model = self.fresh()
        return model, self.quantize(model, recipe)

    def quantize(self, model: nn.Module, recipe: str) -> Any:
        """In place; a refusal leaves the model as it was."""
        with refusal_changes_nothing(self, model):
            return qcompile.quantize(model, brief(find_recipe(recipe)), self.batches, progress=False)

    @cached_property
    def int8(self) -> nn.Module:
        """Quantized in place by `int8`, for the steps behind."""
        return self.quantized("int8")[0]


@contextlib.contextmanager
def refusal_changes_nothing(case: Case, model: nn.Module) -> Iterator[None]:
    """Check the model's outputs after any exception."""
    try:
        yield
    except Exception as error:
        try:
            unchanged = same(case.outputs(model), case.want)
        except Exception as second:
            raise Fault(f"the model is broken ({one_line(second)}) after {type(error).__name__}: {error}") from error
        if not unchanged:
            raise Fault(f"the model is changed after {type(error).__name__}: {error}") from error
        raise


def family(recipe: str) -> str:
    """The format whose bounds hold."""
    return recipe.partition("-")[0]


def runs(case: Case) -> None:
    """The float model itself."""
    if not same(case.outputs(case.model), case.want) or not all(t.isfinite().all() for t in case.want):
        raise Fault("the float model is random or not finite")


def in_place(recipe: str, case: Case) -> float:
    """`quantize` by a recipe: close to float; never further than the plain recipe by rewriting."""
    model, report = case.quantized(recipe)
    error = distance(case.outputs(model), case.want)
    form = family(recipe)
    broken = [c for c in report.certificates if not c.holds]
    if broken:
        raise Fault(f"undone: {'; '.join(f'{c.name} {c.error:.1e} at {c.blame}' for c in broken)} (error {error:.3f})")
    case.check_error(error, form)
    if not any(site.quantized for site in report.sites):
        raise Fault("no site is quantized, and nothing is said")
    if recipe == form:
        case.plain[form] = error
    elif (
        "rotated" in recipe
        and form in case.plain
        and form not in case.architecture.bounds
        and error > ROTATED * case.plain[form] + NOISE[form]
    ):
        raise Fault(f"error {error:.3f}, without rewriting {case.plain[form]:.3f}")
    return error


def compiles(case: Case) -> float:
    """`torch.compile(model, backend="qcompile")`."""
    torch._dynamo.reset()
    model = case.fresh()
    with refusal_changes_nothing(case, model):
        compiled = torch.compile(model, backend="qcompile", options={"on_slow_kernel": "quantize"})
        found = case.outputs(compiled)
    breaks = sum(counters["graph_break"].values())
    error = distance(found, case.want)
    case.check_error(error, "int8")
    with contextlib.suppress(ValueError):
        apart = distance(found, case.outputs(case.int8))
        if apart > AGREE:
            raise Fault(f"in place differs by {apart:.3f}; {breaks} graph breaks")
    return error


def saves(recipe: str, case: Case) -> None:
    """Save, load into a fresh model: the same bits."""
    model, _ = case.quantized(recipe)
    want = case.outputs(model)
    with tempfile.TemporaryDirectory() as folder:
        qcompile.save(model, Path(folder) / "q")
        loaded = qcompile.load(Path(folder) / "q", case.fresh())
    if not same(case.outputs(loaded), want):
        raise Fault(f"the loaded model differs by {distance(case.outputs(loaded), want):.1e}")


def copies(case: Case) -> None:
    """deepcopy and pickle of a quantized model: the same bits. A float model that cannot be pickled is no fault."""
    want = case.outputs(case.int8)
    if not same(case.outputs(copy.deepcopy(case.int8)), want):
        raise Fault("deepcopy differs")
    if can_be_pickled(case.model) and not same(case.outputs(pickle.loads(pickle.dumps(case.int8))), want):
        raise Fault("pickle differs")


def can_be_pickled(model: nn.Module) -> bool:
    """Parametrized modules and classes under the name of another cannot."""
    try:
        pickle.dumps(model)
    except (RuntimeError, pickle.PicklingError, AttributeError):
        return False
    return True


def written(model: nn.Module, case: Case, given: dict[str, Any]) -> Any:
    """What `generate` gives, with the logits of each token."""
    options: dict[str, Any] = dict(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    options |= dict(return_dict_in_generate=True, output_logits=True, **case.architecture.options)
    return model.generate(**given, **options)


def apart(found: Any, want: Any) -> float:
    """The largest distance of the logits of two texts, up to the first token that differs by a tie."""
    worst = 0.0
    for step, (a, b) in enumerate(zip(found.logits, want.logits, strict=True)):
        worst = max(worst, distance([a], [b]))
        if worst > 0.05:
            raise Fault(f"compiled logits of token {step} differ by {worst:.3f}")
        if not torch.equal(a.argmax(-1), b.argmax(-1)):
            break
    return worst


def generates(case: Case) -> float:
    """`generate` of the quantized model, eager and compiled: the same tokens, up to ties that rounding decides."""
    torch._dynamo.reset()
    given = {k: v for k, v in case.inputs.items() if k != "decoder_input_ids"}
    written(case.fresh(), case, given)  # an architecture that cannot is no fault of ours
    model = copy.deepcopy(case.int8)
    model.compile(backend="qcompile")
    return apart(written(model, case, given), written(case.int8, case, given))


def decodes(case: Case) -> float:
    """`compile_for_generate`: the tokens of one text, those of the quantized model up to ties."""
    torch._dynamo.reset()
    texts = len(next(v for v in case.inputs.values() if isinstance(v, Tensor)))
    given = {k: v[: len(v) // texts] if isinstance(v, Tensor) else v for k, v in case.inputs.items()}
    given.pop("decoder_input_ids", None)
    eager = written(case.int8, case, given)
    model = copy.deepcopy(case.int8)
    report = qcompile.compile_for_generate(model, on_slow_kernel="quantize")
    worst = apart(written(model, case, given), eager)
    if report.metrics["decode steps"] == 0:
        raise Declined(report.breaks[0])
    return worst


def verifies(case: Case) -> None:
    """Every exact pass in float64."""
    report = verify_model(case.fresh(), case.inputs)
    broken = [c for c in report.certificates if not c.holds]
    if broken:
        raise Fault("; ".join(f"{c.name} BROKEN by {c.error:.1e} at {c.blame}" for c in broken))


STEPS: dict[str, Callable[[Case], float | None]] = {
    "float": runs,
    "verify": verifies,
    "int8": partial(in_place, "int8"),
    "compile": compiles,
    "int8-smooth": partial(in_place, "int8-smooth"),
    "int8-rotated": partial(in_place, "int8-rotated"),
    "w4a16": partial(in_place, "w4a16"),
    "w4a16-gptq": partial(in_place, "w4a16-gptq"),
    "w4a16-awq": partial(in_place, "w4a16-awq"),
    "w4a16-rotated": partial(in_place, "w4a16-rotated"),
    "save int8": partial(saves, "int8"),
    "save w4a16-rotated": partial(saves, "w4a16-rotated"),
    "copy": copies,
    "generate": generates,
    "decode step": decodes,
}


def applies(step: str, name: str) -> bool:
    """Whether an architecture has a step."""
    return step not in ("generate", "decode step") or ARCHITECTURES[name].generates


def attempt(step: Callable[[Case], float | None], case: Case) -> Outcome:
    """Run one step."""
    start = time.perf_counter()

    def outcome(mark: str, error: float | None = None, text: str = "") -> Outcome:
        return Outcome(mark, error, text, round(time.perf_counter() - start, 2))

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return outcome(PASS, step(case))
        except Fault as wrong:
            return outcome(FAULT, text=one_line(wrong))
        except Declined as reason:
            return outcome(REFUSED, text=one_line(reason))
        except Exception as error:
            if ours(error):
                return outcome(REFUSED, text=f"{type(error).__name__}: {one_line(error)}")
            frames = traceback.extract_tb(error.__traceback__)
            own = [f for f in frames if any(place in f.filename for place in ("/qcompile/", "/passes/", "/codegen/"))]
            place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
            return outcome(FAULT, text=f"{type(error).__name__}{place}: {one_line(error)}")


def ours(error: BaseException) -> bool:
    """Whether an exception is a refusal: a ValueError class of this project."""
    return isinstance(error, ValueError) and type(error).__module__.startswith("qcompile")
