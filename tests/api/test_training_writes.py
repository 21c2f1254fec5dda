"""Every operator that trains has a module that calls it."""

from __future__ import annotations

from qcompile.api.training_writes import BUILDERS
from qcompile.backend.dynamo import TRAINING_OPS


def test_the_backend_knows_every_operator_that_trains():
    assert BUILDERS and all(str(target).startswith(TRAINING_OPS) for target in BUILDERS)
    assert all(any(str(target).startswith(prefix) for target in BUILDERS) for prefix in TRAINING_OPS)
