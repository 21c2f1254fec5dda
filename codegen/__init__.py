"""Targets: how the dialect's ops run; imported as `qcompile.codegen`. Never what is quantized."""

if __name__ == "codegen":  # a second copy would register the ops twice
    raise ImportError("import qcompile.codegen, not codegen")
