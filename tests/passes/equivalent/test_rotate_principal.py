"""RotatePrincipal: the law of noise, what is computed in which basis, and what float formats gain by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import rewrite
from padded_batches import decoder, padded, texts, unpadded
from zoo import build

import qcompile
from qcompile.analysis.norms import find_norms
from qcompile.calibration.statistics import CalibrationError
from qcompile.ir.capture import capture
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import random_orthogonal
from qcompile.passes import FoldNorm, Fuse, Quantize, Rotate, RotatePrincipal, Untie
from qcompile.passes.equivalent.rotate import head_bases
from qcompile.passes.equivalent.rotate_principal import principal_axes
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError
from qcompile.testing import assert_equivalent, decoders


@given(st.integers(2, 12), st.integers(1, 30), st.integers(0, 999))
def test_noise_is_a_share_of_the_signal(n, tokens, seed):
    """sum_k w_k^2 E x_k^2 = E (w x)^2 on the axes, for every w and in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64) + 5 * torch.randn(n, generator=generator)
    w = torch.randn(7, n, generator=generator, dtype=torch.float64)
    axes = principal_axes(x.t() @ x)
    assert torch.allclose(axes.t() @ axes, torch.eye(n, dtype=torch.float64), atol=1e-10)
    on_axes, rows = x @ axes, w @ axes
    noise = (rows.square() * on_axes.square().sum(0)).sum(1)
    signal = (x @ w.t()).square().sum(0)
    assert torch.allclose(noise, signal, rtol=1e-8, atol=1e-8 * float(x.square().sum()))
    energy = on_axes.square().sum(0)
    assert bool((energy[:-1] >= energy[1:] - 1e-8 * energy[0]).all())


def test_padding_has_no_part_in_the_axes():
    _, program = decoder()
    rows, found = texts([3, 11, 6]), []
    for batches in (unpadded(rows), [padded(rows)], [padded(rows, left=True, extra=2)]):
        after = program.copy()
        *_, report = rewrite(after, Untie(), FoldNorm(), RotatePrincipal(), batches=batches)
        found.append((report.notes, after.weights["up.weight"].abs()))  # axes have no sign
    assert all(notes == found[0][0] for notes, _ in found)
    assert all(torch.allclose(weight, found[0][1], atol=1e-2) for _, weight in found)


def rotated(model, batches):
    program = capture(model, (batches[0],)).widened()
    before = program.copy()
    *_, report = rewrite(program, Untie(), FoldNorm(), RotatePrincipal(), batches=[[b] for b in batches])
    return before, program, report


def mixed(moment):
    """The largest share of energy that two channels have in common."""
    return float((moment - moment.diagonal().diag()).abs().max() / moment.trace())


@given(decoders())
@settings.get_profile("models")
def test_the_output_stays_and_channels_are_uncorrelated(model):
    batches = [model.example(), model.example(1, 4)]
    before, after, report = rotated(model, batches)
    assert_equivalent(before, after, [batches[0]])
    assert sum("heads" in d for d in report.done) == model.shape.layers
    if model.shape.post_norm:
        return
    assert any("stream" in d for d in report.done)
    norms = {norm.output for norm in find_norms(after)}
    heads = {group.root: source.head for group, source in head_bases(after, PassContext.of(after), PassReport(""))}
    sums = {}

    def see(node, value):
        size = heads.get(node, value.shape[-1])
        x = value.reshape(-1, size)
        of = node if node in heads else "stream"
        sums[of] = sums.get(of, 0) + x.t() @ x

    for batch in batches:
        after.watch({*norms, *heads}, [batch], see)
    assert len(sums) == 1 + model.shape.layers
    assert all(mixed(moment) < 1e-9 for moment in sums.values())


def common():
    """Channels with a lot in common, in a basis where it is spread, and consumers that do not read it."""
    model = build("mistral")
    direction = random_orthogonal(64, 1)[:, 0].float()
    with torch.no_grad():
        model.model.embed_tokens.weight += 3 * direction
        for name, gain in model.named_parameters():
            if "norm" in name:
                gain.fill_(1)
        for layer in model.model.layers:
            consumers = [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]
            for consumer in (*consumers, layer.mlp.gate_proj, layer.mlp.up_proj):
                consumer.weight -= (consumer.weight @ direction)[:, None] * direction
        model.lm_head.weight -= (model.lm_head.weight @ direction)[:, None] * direction
    return model


@pytest.mark.slow
@pytest.mark.parametrize("weight,most", [("fp8", 0.5), ("fp4/group32", 0.8)])
def test_float_formats_gain(weight, most):
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 128, (1, 48))} for _ in range(2)]
    want = [common()(**b).logits for b in batches]
    errors = {}
    for name, rotation in (("hadamard", (Rotate(),)), ("principal", (RotatePrincipal(),)), ("none", ())):
        model = common()
        passes = (Untie(), FoldNorm(), *rotation, Quantize(Format.parse(weight), Format("fp8"), lm_head=None), Fuse())
        report = qcompile.quantize(model, Recipe(name, passes), batches, progress=False)
        assert all(c.holds for c in report.certificates) and not report.skipped
        errors[name] = sum(float((model(**b).logits - w).norm()) for b, w in zip(batches, want, strict=True))
    assert errors["principal"] < most * min(errors["hadamard"], errors["none"]), errors


def test_the_report_says_how_much_channels_have_in_common():
    _, _, report = rotated(common(), [torch.randint(3, 128, (1, 48))])
    note = next(n for n in report.notes if n.startswith("stream"))
    assert "of its energy on one axis" in note and int(note.split(": ")[1].split("%")[0]) > 50


def test_bad_data_and_recipes():
    with pytest.raises(RecipeError, match="needs calibration data"):
        qcompile.quantize(build("llama"), Recipe("no data", (FoldNorm(), RotatePrincipal())), progress=False)
    with pytest.raises(RecipeError, match="Rotate stands twice"):
        Recipe("two", (FoldNorm(), RotatePrincipal(), Rotate())).check()
    program = capture(build("llama"), (torch.ones(1, 4, dtype=torch.long),))
    rewrite(program, Untie(), FoldNorm(), batches=[])
    with pytest.raises(CalibrationError, match="is empty"):
        rewrite(program, RotatePrincipal(), batches=[])
    program.weights["model.embed_tokens.weight"][1] = float("nan")
    with pytest.raises(CalibrationError, match="NaN or Inf to stream"):
        rewrite(program, RotatePrincipal(heads=False), batches=[[torch.ones(1, 4, dtype=torch.long)]])
