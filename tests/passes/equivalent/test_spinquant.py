"""SpinQuant: rotations orthogonal at every step, exact once folded, and better at what they were trained for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import rewrite
from padded_batches import decoder, padded, texts
from zoo import build

import qcompile
from qcompile.ir.capture import capture
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import random_orthogonal
from qcompile.passes import FoldNorm, Fuse, Quantize, Rotate, SpinQuant, Untie
from qcompile.passes.equivalent.spinquant import cayley_step
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError
from qcompile.testing import assert_equivalent, decoders


@given(st.integers(2, 12), st.floats(1e-3, 10), st.integers(0, 999))
def test_a_cayley_step_stays_orthogonal_and_goes_down(n, rate, seed):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(n, n, generator=generator, dtype=torch.float64)
    matrix = random_orthogonal(n, seed)

    def loss(r):
        return (r * target).sum()  # its gradient is `target`

    after = cayley_step(matrix, target, rate)
    assert torch.allclose(after @ after.t(), torch.eye(n, dtype=torch.float64), atol=1e-10)
    assert loss(cayley_step(matrix, target, 1e-3)) <= loss(matrix) + 1e-9
    for _ in range(300):
        matrix = cayley_step(matrix, target, 0.3)
    u, _, v = torch.linalg.svd(target)  # the least of tr(R^T T) over orthogonal R is -sum of singular values
    same_side = torch.det(matrix) * torch.det(-u @ v) > 0  # Cayley steps never leave one of the two halves
    if same_side:
        assert float(loss(matrix)) < 0.9 * float(loss(-u @ v))


@given(decoders())
@settings.get_profile("models")
def test_the_output_stays(model):
    ids = model.example()
    before = capture(model, (ids,)).widened()
    after = before.copy()
    batches = [[ids], [model.example(1, 4)]]
    *_, report = rewrite(after, Untie(), FoldNorm(), SpinQuant(steps=3), batches=batches)
    assert_equivalent(before, after, [ids])
    assert any("stream" in d for d in report.done) == (not model.shape.post_norm)
    assert sum("heads" in d for d in report.done) == model.shape.layers


def test_padding_has_no_part_in_what_is_learned():
    """In front of the texts it is cut off first, so that the tokens that a step reads are tokens."""
    _, program = decoder()
    config, learned = SpinQuant(steps=3, tokens=7), []
    for batch in (padded(texts([7, 4])), padded(texts([7, 4]), extra=6), padded(texts([7, 4]), extra=6, left=True)):
        after = program.copy()
        *_, report = rewrite(after, Untie(), FoldNorm(), config, batches=[batch])
        learned.append((report.notes, after.weights["up.weight"]))
    assert learned[0][0] == learned[1][0] == learned[2][0]
    assert all(torch.allclose(weight, learned[0][1], atol=1e-3) for _, weight in learned)


def uneven():
    """A model with two outlier channels of opposite signs, which one Hadamard matrix cannot spread well."""
    model = build("mistral")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] += 3
        model.model.embed_tokens.weight[:, 7] -= 3
        model.lm_head.weight.mul_(20)
    return model


def test_learned_rotations_round_better_than_random_ones():
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 128, (1, 48))} for _ in range(2)]
    want = [uneven()(**b).logits for b in batches]
    errors = {}
    for name, rotation in (("random", Rotate()), ("learned", SpinQuant(act=Format("int4"), steps=40))):
        model = uneven()
        passes = (Untie(), FoldNorm(), rotation, Quantize(Format("int8"), Format("int4"), lm_head=None), Fuse())
        report = qcompile.quantize(model, Recipe(name, passes), batches, progress=False)
        assert all(c.holds for c in report.certificates) and not report.skipped
        errors[name] = sum(float((model(**b).logits - w).norm()) for b, w in zip(batches, want, strict=True))
    assert errors["learned"] < 0.9 * errors["random"], errors
    first, last = map(float, report.passes[2].notes[0].split("divergence ")[1].split(" nats")[0].split(" -> "))
    assert last < 0.7 * first


def test_bad_recipes_are_refused():
    with pytest.raises(RecipeError, match="positive"):
        SpinQuant(steps=0)
    with pytest.raises(RecipeError, match="Rotate stands twice"):
        Recipe("two", (FoldNorm(), SpinQuant(), Rotate())).check()
    with pytest.raises(RecipeError, match="needs calibration data"):
        qcompile.quantize(build("llama"), Recipe("no data", (FoldNorm(), SpinQuant())), progress=False)
