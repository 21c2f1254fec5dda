"""Commands about the Triton kernels: kernels list, show, check, tune, bench."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track
from rich.syntax import Syntax
from rich.table import Table

from qcompile.cli.arguments import app, console
from qcompile.numerics.format import Format
from qcompile.passes.qdq.site_plan import Quantize

kernels = typer.Typer(no_args_is_help=True, help="The Triton kernels: what there is, their source, and what they cost.")
app.add_typer(kernels, name="kernels")


@kernels.command(name="list")
def list_kernels(
    arch: Annotated[int, typer.Option(help="architecture, as 90 for sm_90")] = 90,
) -> None:
    """The kernels that are compiled ahead of time, and what each costs."""
    from qcompile.codegen.triton.aot.budget import FILE
    from qcompile.codegen.triton.aot.budget import read as read_budget
    from qcompile.codegen.triton.aot.shipped_kernels import shipped

    budget = read_budget()
    table = Table(title=f"sm_{arch}, triton {budget['triton']}")
    for name in ("kernel", "tile", "registers", "shared KB", "tensor cores"):
        table.add_column(name, no_wrap=name == "kernel")
    for one in shipped(arch):
        cost = budget["kernels"].get(str(arch), {}).get(str(one))
        spec, _, tile = str(one).partition(" ")
        cells = ["", "", ""]
        if cost is not None:
            mma = ", ".join(f"{count} {family}" for family, count in cost["mma"].items())
            cells = [str(cost["registers"]), f"{cost['shared'] / 1024:.0f}", mma]
        table.add_row(spec, tile, *cells)
    console.print(table)
    console.print(f"from {FILE.name}; qcompile kernels show KERNEL prints one")


@kernels.command()
def show(
    kernel: Annotated[str, typer.Argument(help="as gemm_w/bf16/group=64/zero=int/bias")],
) -> None:
    """The source of a kernel, as it is compiled."""
    from qcompile.codegen.triton.kernels.render import render
    from qcompile.codegen.triton.kernels.spec import parse

    text = render(parse(kernel))
    if console.is_terminal:
        console.print(Syntax(text, "python", word_wrap=False))
    else:
        typer.echo(text, nl=False)


@kernels.command()
def check(
    arch: Annotated[str, typer.Option(help="architectures, separated by commas")] = "80,89,90,100",
    only: Annotated[str, typer.Option(help="kernels whose names hold this")] = "",
    update: Annotated[bool, typer.Option("--update", help="make what was found the new budget")] = False,
) -> None:
    """Compile all kernels for GPUs that need not be there, and look for spills, lost bodies and slow instructions."""
    from qcompile.codegen.triton.aot import budget

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 interprets kernels, and there is nothing to compile: unset it")
    try:
        wanted = [int(a) for a in arch.split(",")]
    except ValueError:
        raise ValueError(f"--arch {arch!r}: write numbers, as 90 or 80,90") from None
    total = sum(only in str(kernel) for a in wanted for kernel in budget.shipped(a))
    if not total:
        raise ValueError(f"--only {only!r}: no kernel holds this in its name (qcompile kernels list)")
    rows = list(track(budget.check(wanted, only), "compiling", total=total, transient=True, console=console))
    bad = [row for row in rows if row.complaints or (row.over and not update)]
    if update:
        budget.write(rows)
        console.print(f"written: {budget.FILE}")
    for row in bad:
        words = "; ".join(row.complaints + row.over)
        console.print(f"[red]sm_{row.architecture}[/] {row.kernel}: {words}", highlight=False)
    console.print(f"{len(rows) - len(bad)} of {len(rows)} kernels as they should be")
    if bad:
        raise typer.Exit(1)


Shapes = Annotated[str, typer.Option(help="K x N, separated by commas")]
Rows = Annotated[str, typer.Option(help="rows of x, separated by commas")]


@kernels.command()
def tune(
    shapes: Shapes = "4096x4096,4096x14336,14336x4096",
    rows: Rows = "1,4,16,32,64,128,256,512,1024,2048",
    recipes: Annotated[str, typer.Option(help="whose formats are timed against cuBLAS")] = "w4a16,w8a16,int8,fp8",
) -> None:
    """Time sizes of int4 products and ways to compute products on this machine's GPU, and keep what is best."""
    formats = _formats(recipes)
    sizes, counts = _on_gpu(shapes, rows)
    from qcompile.codegen.triton.launch.measured_times import FEW, MANY
    from qcompile.codegen.triton.launch.tuning_cache import file
    from qcompile.codegen.triton.tuning.autotune import measure
    from qcompile.codegen.triton.tuning.autotune import tune as search

    table = Table("launch of", "tile", "warps", "stages", "us")
    for name, config, microseconds in search(sizes, [m for m in counts if FEW < m <= MANY]):
        table.add_row(
            name, f"{config.rows}x{config.channels}", str(config.warps), str(config.stages), f"{microseconds:.1f}"
        )
    console.print(table)
    table = Table("ways of", "K x N", "rows", "kernel us", "dequant us", "cuBLAS us", "")
    for one in measure(formats, sizes, counts):
        cells = (f"{one.times[w].microseconds:.1f}" if w in one.times else "" for w in ("kernel", "dequant", "float"))
        table.add_row(one.product, f"{one.k}x{one.n}", str(one.m), *cells, "" if one.kept else "not quiet: not kept")
    console.print(table)
    console.print(f"written: {file()}")


@kernels.command()
def bench(
    shapes: Shapes = "4096x4096,4096x14336,14336x4096",
    rows: Rows = "1,16,32,64,128,512,2048",
    out: Annotated[Path | None, typer.Option(help="write the numbers as JSON, after every row")] = None,
) -> None:
    """Time the products on this machine's GPU against cuBLAS bf16, what torch ships, and GemLite."""
    sizes, counts = _on_gpu(shapes, rows)
    from qcompile.codegen.triton.tuning.gemm_benchmark import GemmComparison, compare

    def keep(found: GemmComparison) -> None:
        if out is not None:
            found.write(out)

    result = compare(sizes, counts, keep=keep)
    console.print(result.table())
    for word in result.words():
        console.print(word, highlight=False)


def _formats(recipes: str) -> list[tuple[Format, str]]:
    """What weights and x become, in recipes by name, each pair once."""
    from qcompile.pipeline.presets import find_recipe

    found = []
    for name in recipes.split(","):
        for config in find_recipe(name).passes:
            if isinstance(config, Quantize):
                found.append((config.weight, str(config.act) if config.act else ""))
    if not found:
        raise ValueError(f"--recipes {recipes!r}: none of them rounds weights to nearest, as w4a16 or int8 do")
    return list(dict.fromkeys(found))


def _on_gpu(shapes: str, rows: str) -> tuple[list[tuple[int, int]], list[int]]:
    """What to time, where there is something to time it on."""
    import torch

    try:
        sizes = [(int(k), int(n)) for k, _, n in (shape.partition("x") for shape in shapes.split(","))]
        counts = [int(m) for m in rows.split(",")]
    except ValueError:
        raise ValueError(f"--shapes {shapes!r}, --rows {rows!r}: write 4096x4096,4096x14336 and 1,16") from None
    if not torch.cuda.is_available():
        raise ValueError("no GPU here: qcompile kernels check compiles for one, only timing needs it")
    return sizes, counts
