"""Options of the torch.compile backend, checked before anything is compiled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qcompile.backend.inductor import patches_of
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError, Rule

OPTIONS = {
    "recipe": "preset name, JSON path, dict or Recipe; default int8 (W8A8, dynamic per token)",
    "rules": "list of Rule or dicts, before the recipe's own",
    "verify": "certify exact passes on the first inputs; default True",
    "on_slow_kernel": "'keep_float' (default): a site stays float where no kernel reaches float speed; or 'quantize'",
    "rows": "rows of x that 'keep_float' compares kernels at (in decoding the batch); default: those of the first call",
    "compile_blocks": "compile equal blocks of a graph once, and call that for each; default True; on CPUs",
    "mode": "'reduce-overhead' runs every graph as a CUDA graph, which needs a GPU; also as torch.compile(mode=...)",
    "inductor": "options passed on to Inductor",
    "dump": "folder for the graph before and after every pass, as text with diffs; of the graph compiled last",
}


@dataclass(frozen=True)
class Options:
    """Checked options of the backend.

    Attributes:
        recipe: what to do; one that needs no calibration data.
        rules: before the recipe's own.
        verify: whether exact passes are certified on the first inputs.
        on_slow_kernel: "keep_float", or "quantize": what to do with a site whose kernel is slower than float.
        rows: M at which kernels are compared; None: that of the first call.
        inductor: options of Inductor.
        dump: folder for graphs before and after every pass.
        compile_blocks: whether equal blocks of a graph are compiled once.
    """

    recipe: Recipe
    rules: tuple[Rule, ...] = ()
    verify: bool = True
    on_slow_kernel: str = "keep_float"
    rows: int | None = None
    inductor: dict[str, Any] = field(default_factory=dict)
    dump: str | None = None
    compile_blocks: bool = True

    @staticmethod
    def read(options: dict[str, Any] | None) -> Options:
        """Check what the user gave.

        Args:
            options: as OPTIONS describes them.

        Raises:
            RecipeError: an unknown option, or a value that an option cannot have; lists the known ones.
        """
        given = dict(options or {})
        unknown = sorted(set(given) - set(OPTIONS))
        if unknown:
            known = "\n".join(f"  {name}: {text}" for name, text in OPTIONS.items())
            raise RecipeError(
                f"unknown option {', '.join(map(repr, unknown))} of the qcompile backend; known:\n{known}"
            )
        on_slow_kernel = given.get("on_slow_kernel", "keep_float")
        if on_slow_kernel not in ("keep_float", "quantize"):
            raise RecipeError(
                f"option on_slow_kernel={on_slow_kernel!r} is unknown. Fix: use 'keep_float' or 'quantize'"
            )
        rows = given.get("rows")
        if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
            raise RecipeError(
                f"option rows={rows!r} is no integer of at least 1. Fix: give M, as 8 for decoding a batch of 8"
            )
        compile_blocks = given.get("compile_blocks", True)
        if not isinstance(compile_blocks, bool):
            raise RecipeError(f"option compile_blocks={compile_blocks!r} is no bool. Fix: give True or False")
        try:
            inductor = patches_of(given.get("mode", "default"), given.get("inductor", {}))
        except ValueError as error:
            raise RecipeError(str(error)) from None
        rules = tuple(r if isinstance(r, Rule) else Rule(**r) for r in given.get("rules", ()))
        recipe = find_recipe(given.get("recipe", "int8"))
        if recipe.needs:
            who = ", ".join(recipe.needs)
            raise RecipeError(
                f"recipe {recipe.name!r} needs calibration data for {who}; torch.compile has none. Fix:\n"
                f"  qcompile.quantize(model, {recipe.name!r}, batches)\n"
                f"  torch.compile(model, backend='qcompile')"
            )
        return Options(
            recipe, rules, bool(given.get("verify", True)), on_slow_kernel, rows, inductor, given.get("dump"),
            compile_blocks,
        )  # fmt: skip
