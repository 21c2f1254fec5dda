"""Exporters say nothing, and everything is as before when they are done."""

from __future__ import annotations

import logging
import warnings

from qcompile.codegen.onnx.tracing.quiet import quiet_exporter


def test_nothing_is_said(capsys):
    logger = logging.getLogger("onnxscript")
    before = logger.level
    with quiet_exporter():
        print("progress")
        warnings.warn("of its own internals", stacklevel=1)  # an error in these tests, if it came through
        assert not logger.isEnabledFor(logging.WARNING)
    assert capsys.readouterr().out == "" and logger.level == before
