"""Libraries of AOTInductor, called for each block: what the program gives, over weights where they are."""

from __future__ import annotations

import threading

import pytest
import torch
from layer_stacks import Layer, Stack, captured

from qcompile.backend import repeated_blocks
from qcompile.backend.ahead_of_time import compile_ahead
from qcompile.backend.library_calls import OtherStrides, compile_calls, cut_program, plan_calls
from qcompile.codegen.cpu.native_kernels import load_native_kernels


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return captured(Stack([Layer() for _ in range(6)], gives=(2,)))


@pytest.fixture(scope="module")
def blocked(program):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeated_blocks, "LEAST_SAVED", 1)
        return cut_program(program)


def example(rows=3):
    return [torch.randn(rows, 8), torch.randn(8)]


@pytest.fixture(scope="module")
def compiled(program, blocked):
    made = []

    def one(part, settings):
        made.append(part)
        return compile_ahead(part, settings)

    run = compile_calls(program, blocked, example(), {}, one)
    assert len(made) == 3
    return run


def test_the_plan_of_calls_gives_what_the_program_gives(program, blocked):
    """As the C++ runs it, with graphs in place of libraries."""
    plan, inputs = plan_calls(program, blocked), example()
    assert plan.inputs == len(inputs)
    values = [*inputs, *plan.constants, *[None] * (plan.values - plan.inputs - len(plan.constants))]
    for (graph,), reads, gives, dead in zip(*(plan.calls[i::4] for i in range(4)), strict=True):
        found = blocked.graphs[graph](*[values[place] for place in reads])
        for place, value in zip(gives, found, strict=True):
            values[place] = value
        for place in dead:
            values[place] = None
    for want, place in zip(program(*inputs), plan.results, strict=True):
        assert torch.equal(values[place], want)


@pytest.mark.slow
def test_the_libraries_give_what_the_program_gives(program, compiled):
    for rows in (3, 1, 20):
        inputs = example(rows)
        for want, got in zip(program(*inputs), compiled(inputs), strict=True):
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_libraries_are_those_of_the_whole_to_the_last_bit(program, compiled):
    whole, inputs = compile_ahead(program).open(), example(9)
    assert all(torch.equal(a, b) for a, b in zip(whole(inputs), compiled(inputs), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layers.4.down.weight", "last.bias"])
def test_weights_are_read_where_they_are(program, compiled, name):
    inputs = example()
    before, weight = compiled(inputs)[0].clone(), program.weights[name]
    weight.add_(1)
    after = compiled(inputs)[0]
    assert not torch.equal(before, after) and torch.allclose(after, program(*inputs)[0], rtol=1e-5, atol=1e-5)
    weight.sub_(1)


@pytest.mark.slow
def test_threads_do_not_disturb_each_other(program, compiled):
    inputs = [example(3 + index) for index in range(6)]
    want, found = [compiled(one)[0].clone() for one in inputs], {}

    def work(index):
        found[index] = [compiled(inputs[index])[0] for _ in range(50)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(torch.equal(one, want[index]) for index, results in found.items() for one in results)


@pytest.mark.slow
def test_another_count_of_inputs_is_refused(compiled):
    with pytest.raises(ValueError, match="LibraryCalls: 1 inputs, but must be 2"):
        compiled(example()[:1])


@pytest.mark.parametrize(
    "places", [([0], [9], [1], []), ([0], [0], [0], []), ([0], [0], [1], [0]), ([1], [0], [1], []), ([0], [0], [1])]
)
def test_places_that_do_not_exist_are_refused(places, tmp_path):
    """Before a library is opened."""
    load_native_kernels()
    calls = [list(part) for part in places]
    with pytest.raises(ValueError, match="LibraryCalls: (place|no such library|inconsistent)"):
        torch.classes.qcompile_cpu.LibraryCalls(str(tmp_path / "none.pt2"), ["a"], [], 1, 2, calls, [1])


def test_strides_that_readers_do_not_expect_are_refused(program, blocked):
    class Transposed:
        """A part that gives its results in another order of the dimensions."""

        def __init__(self, part):
            self.part = part

        def open(self):
            return lambda given: [one.t().contiguous().t() for one in self.part(*given)]

    with pytest.raises(OtherStrides, match="its reader has"):
        compile_calls(program, blocked, example(), {}, lambda part, settings: Transposed(part))


def test_weights_are_read_with_the_strides_that_they_have(program):
    """Those with which they were traced may be others."""
    changed = program.copy()
    changed.weights["layers.3.down.weight"] = changed.weights["layers.3.down.weight"].t().contiguous().t()
    cut_program(changed)
    assert changed.node_of("layers.3.down.weight").meta["val"].stride() == (1, 8)
