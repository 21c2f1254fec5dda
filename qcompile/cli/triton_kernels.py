"""Commands about the Triton kernels: kernels list, show, check, tune, bench."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from rich.syntax import Syntax
from rich.table import Table

from qcompile.cli.arguments import app, split_names
from qcompile.cli.interruption import kept
from qcompile.cli.output import console, print_table, tell
from qcompile.cli.path_checks import output_file
from qcompile.numerics.format import Format
from qcompile.passes.qdq.site_plan import Quantize

OLDEST, NEWEST = 70, 130  # compute capabilities that Triton may compile for

kernels = typer.Typer(no_args_is_help=True, help="The Triton kernels: their list, source, and cost.")
app.add_typer(kernels, name="kernels")


@kernels.command(name="list")
def list_kernels(
    arch: Annotated[int, typer.Option(help="compute capability, as 90 for sm_90", min=OLDEST, max=NEWEST)] = 90,
) -> None:
    """List the kernels that are compiled ahead of time, and what each costs."""
    from qcompile.codegen.triton.aot.budget import FILE
    from qcompile.codegen.triton.aot.budget import read as read_budget
    from qcompile.codegen.triton.aot.shipped_kernels import shipped

    budget = read_budget()
    title = f"sm_{arch}, triton {budget['triton']}"
    table = Table("kernel", "tile", "registers", "shared KB", "tensor cores", title=title)
    for one in shipped(arch):
        cost = budget["kernels"].get(str(arch), {}).get(str(one))
        spec, _, tile = str(one).partition(" ")
        cells = ["", "", ""]
        if cost is not None:
            mma = ", ".join(f"{count} {family}" for family, count in cost["mma"].items())
            cells = [str(cost["registers"]), f"{cost['shared'] / 1024:.0f}", mma]
        table.add_row(spec, tile, *cells)
    print_table(table)
    tell(f"costs are from {FILE.name}; qcompile kernels show KERNEL prints a source")


@kernels.command()
def show(
    kernel: Annotated[str, typer.Argument(help="as gemm_w/bf16/group=64/zero=int/bias")],
) -> None:
    """Print the source of a kernel, as it is compiled."""
    from qcompile.codegen.triton.kernels.parse_spec import parse
    from qcompile.codegen.triton.kernels.render import render

    text = render(parse(kernel))
    if console.is_terminal:
        console.print(Syntax(text, "python", word_wrap=False))
    else:
        typer.echo(text, nl=False)


@kernels.command()
def check(
    arch: Annotated[str, typer.Option(help="compute capabilities, separated by commas")] = "80,89,90,100",
    only: Annotated[str, typer.Option(help="kernels whose names contain this")] = "",
    update: Annotated[bool, typer.Option("--update", help="write the measured costs as the new budget")] = False,
) -> None:
    """Compile all kernels ahead of time, without a GPU, and look for spills, lost bodies and slow instructions."""
    from qcompile.codegen.triton.aot import budget
    from qcompile.codegen.triton.aot.shipped_kernels import shipped

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 interprets kernels and compiles none. Fix: unset it")
    try:
        architectures = [int(a) for a in split_names(arch)]
        if not all(OLDEST <= a <= NEWEST for a in architectures):
            raise ValueError
    except ValueError:
        raise ValueError(f"--arch {arch!r} is no list of compute capabilities. Fix: write 90, or 80,90") from None
    total = sum(only in str(kernel) for a in architectures for kernel in shipped(a))
    if not total:
        raise ValueError(f"--only {only!r}: no kernel's name contains this. Fix: see qcompile kernels list")
    rows = list(track(budget.check(architectures, only), "compiling", total=total, transient=True))
    bad = [row for row in rows if row.complaints or (row.over and not update)]
    if update:
        budget.write(rows, whole=not only)
        tell(f"written: {budget.FILE}")
    for row in bad:
        tell(f"sm_{row.architecture} {row.kernel}: {'; '.join(row.complaints + row.over)}", "red")
    tell(f"{len(rows) - len(bad)} of {len(rows)} kernels pass")
    if bad:
        raise typer.Exit(1)


Shapes = Annotated[str, typer.Option(help="K x N, separated by commas")]
Rows = Annotated[str, typer.Option(help="rows of x (M), separated by commas")]


@kernels.command()
def tune(
    shapes: Shapes = "4096x4096,4096x14336,14336x4096",
    rows: Rows = "1,4,16,32,64,128,256,512,1024,2048",
    recipes: Annotated[
        str, typer.Option(help="recipes whose formats are timed against cuBLAS")
    ] = "w4a16,w8a16,int8,fp8",
) -> None:
    """Time tiles of int4 GEMMs, and kernels against cuBLAS, on this GPU; later compilations use the fastest."""
    formats = _formats(recipes)
    sizes, counts = _on_gpu(shapes, rows)
    from qcompile.codegen.triton.launch.measured_times import KERNEL_MAX_M
    from qcompile.codegen.triton.launch.tuning_cache import file
    from qcompile.codegen.triton.tuning.autotune import measure_variants, tune_launches

    table = Table("launch of", "tile", "warps", "stages", "us")
    for name, launch, microseconds in tune_launches(sizes, [m for m in counts if m <= KERNEL_MAX_M]):
        tile = f"{launch.block_m}x{launch.block_n}"
        table.add_row(name, tile, str(launch.num_warps), str(launch.num_stages), f"{microseconds:.1f}")
    print_table(table)
    table = Table("GEMM", "K x N", "rows", "kernel us", "dequant us", "cuBLAS us", "note")
    for one in measure_variants(formats, sizes, counts):
        cells = (f"{one.times[w].microseconds:.1f}" if w in one.times else "" for w in ("kernel", "dequant", "float"))
        table.add_row(
            one.layer, f"{one.k}x{one.n}", str(one.m), *cells, "" if one.kept else "machine not quiet: not kept"
        )
    print_table(table)
    tell(f"written: {file()}")


@kernels.command()
def bench(
    shapes: Shapes = "4096x4096,4096x14336,14336x4096",
    rows: Rows = "1,16,32,64,128,512,2048",
    out: Annotated[
        Path | None, typer.Option(help="JSON to write, after every row", parser=output_file, metavar="FILE")
    ] = None,
) -> None:
    """Time our GEMMs on this machine's GPU against cuBLAS bf16, torch's own int4 and int8 kernels, and GemLite."""
    sizes, counts = _on_gpu(shapes, rows)
    from qcompile.codegen.triton.tuning.gemm_benchmark import GemmComparison, compare_gemms

    def keep(found: GemmComparison) -> None:
        if out is not None:
            found.write(out)

    written = out if out is not None else "nothing was written"
    with kept(lambda: f"the rows that were measured: {written}"):
        result = compare_gemms(sizes, counts, keep=keep)
    print_table(result.table())
    for note in result.notes():
        tell(note)


def _formats(recipes: str) -> list[tuple[Format, str]]:
    """The formats of weights and activations in recipes by name, each pair once."""
    from qcompile.pipeline.find_recipe import find_recipe

    found = []
    for name in split_names(recipes):
        for config in find_recipe(name).passes:
            if isinstance(config, Quantize):
                found.append((config.weight, str(config.act) if config.act else ""))
    if not found:
        raise ValueError(f"--recipes {recipes!r}: none rounds weights to nearest. Fix: name one such as w4a16 or int8")
    return list(dict.fromkeys(found))


def _on_gpu(shapes: str, rows: str) -> tuple[list[tuple[int, int]], list[int]]:
    """The shapes (K, N) and the M to time, if there is a GPU."""
    try:
        sizes = [(int(k), int(n)) for k, _, n in (shape.partition("x") for shape in split_names(shapes))]
        counts = [int(m) for m in split_names(rows)]
        if not all(1 <= size < 2**31 for size in (*counts, *(side for shape in sizes for side in shape))):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"--shapes {shapes!r}, --rows {rows!r} are no sizes. Fix: write 4096x4096,4096x14336 and 1,16"
        ) from None
    if not torch.cuda.is_available():
        raise ValueError("no GPU here, and timing needs one. Fix: qcompile kernels check compiles without a GPU")
    return sizes, counts
