"""A module without a graph is refused with the line that prevents it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.ir.capture import capture
from qcompile.ir.trace_failure import CaptureError, NotRunnable, failure


class Branch(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


def test_the_line_of_a_branch_is_named(capfd):
    with pytest.raises(
        CaptureError, match=r"at .*test_trace_failure.py:\d+: return x \+ 1 if x.sum.*backend='qcompile'"
    ) as e:
        capture(Branch(), (torch.randn(2, 3),))
    assert not isinstance(e.value, NotRunnable) and "\n" not in str(e.value)
    assert capfd.readouterr().err == ""  # torch.export prints the graph, which nobody requested


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(
        NotRunnable, match=r"Linear does not run on this example \(input float32 \[2, 5\]\): RuntimeError"
    ):
        capture(nn.Linear(3, 4), (torch.randn(2, 5),))


def test_a_result_without_a_tensor():
    class Nothing(nn.Module):
        def forward(self, x):
            return {"loss": None}

    with pytest.raises(NotRunnable, match="Nothing gives no tensor but dict"):
        capture(Nothing(), (torch.randn(2),))


def test_an_error_without_words():
    class Silent(nn.Module):
        def forward(self):
            raise RuntimeError

    from qcompile.ir.call_tree import CallTree

    assert "does not run on this example (nothing): RuntimeError, at" in str(
        failure(Silent(), CallTree.of((), {}), ValueError())
    )
