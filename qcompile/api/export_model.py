"""`export(model, folder, to=..)`: quantize a copy if there is a recipe, and write it in a format that others serve."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from qcompile.api.edge_graph import EdgeCall
from qcompile.api.edge_program import write_edge_program
from qcompile.api.export_onnx import export_onnx
from qcompile.api.quantize import quantize
from qcompile.api.served_attentions import attention_paths
from qcompile.api.served_formats import check_recipe, check_siblings, fitted
from qcompile.checkpoint.atomic_folder import atomic_folder, require_empty
from qcompile.checkpoint.writers.awq_layout import TARGET as AWQ
from qcompile.checkpoint.writers.awq_layout import awq_layout
from qcompile.checkpoint.writers.compressed_tensors_layout import TARGET as COMPRESSED_TENSORS
from qcompile.checkpoint.writers.compressed_tensors_layout import compressed_layout
from qcompile.checkpoint.writers.compressed_tensors_proof import can_reopen, prove_compressed
from qcompile.checkpoint.writers.executorch_program import require_executorch
from qcompile.checkpoint.writers.export_refusals import (
    ExportError,
    check_class,
    check_modules,
    quantized_linears,
    require_transformers,
)
from qcompile.checkpoint.writers.gguf_blocks import TARGET as GGUF
from qcompile.checkpoint.writers.gguf_file import written_gguf
from qcompile.checkpoint.writers.gguf_template import GgufTemplate
from qcompile.checkpoint.writers.gptq_layout import TARGET as GPTQ
from qcompile.checkpoint.writers.gptq_layout import gptq_layout
from qcompile.checkpoint.writers.kv_cache_scales import cache_layout, stores_cache
from qcompile.checkpoint.writers.model_card import write_card
from qcompile.checkpoint.writers.served_folder import ServedLayout, write_served_folder
from qcompile.checkpoint.writers.torchao_weights import TARGET as EXECUTORCH
from qcompile.memory.atomic_file import whole_file
from qcompile.modules.wrappers import unwrapped
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import PassReport, Report, SiteReport
from qcompile.recipe.rule import RecipeError

ENGINES = {
    "vllm": COMPRESSED_TENSORS,
    "sglang": COMPRESSED_TENSORS,
    "transformers": COMPRESSED_TENSORS,
    "llama.cpp": GGUF,
}
"""Programs that serve models -> the format that is written for them."""

FILES = {GGUF: ".gguf", EXECUTORCH: ".pte"}
"""Formats of one file -> how its name ends."""


@dataclass
class Job:
    """One export.

    Attributes:
        model: quantized.
        work: the folder to write into.
        name: (gguf) of the file in it.
        tokenizer: saved beside it; None without one, or for a file alone.
        template: (gguf) what the file is made after, read before any work; else None.
        call: (executorch) what is exported of the model; else None.
        shard: the largest size of one file.
        report: of the export; filled in.
    """

    model: Any
    work: Path
    name: str
    tokenizer: Any
    template: GgufTemplate | None
    call: EdgeCall | None
    shard: int | str
    report: PassReport


def export(
    model: nn.Module,
    folder: str | Path,
    recipe: str | Recipe | dict[str, object] | None = None,
    batches: Iterable[Any] | None = None,
    *,
    to: str = COMPRESSED_TENSORS,
    tokenizer: Any = None,
    template: str | Path | None = None,
    shard: int | str = "5GB",
    length: int | None = None,
    example: Any = None,
    progress: bool = True,
) -> Report:
    """Write a folder that another program serves, with the very codes and scales that were chosen.

    Where the package that reads the format is installed, it reads every weight back before the folder appears, and all
    are compared bit for bit.

    Args:
        model: of transformers, float or already quantized; not changed. To ExecuTorch and ONNX also other modules.
        folder: must not exist, or be empty; a name that ends in .gguf (to="gguf") or .pte (to="executorch") is one
            file alone.
        recipe: quantize a copy first; None: the model is quantized.
        batches: calibration data for the recipe.
        to: "compressed-tensors", "gguf", "gptq" or "awq", "executorch", or the name of a program: vllm, sglang,
            transformers, llama.cpp; "onnx" is `export_onnx`.
        tokenizer: saved beside the model.
        template: (gguf) a GGUF file of the same model, whose names and metadata are taken.
        shard: the largest size of one file, in bytes or as "5GB".
        length: (executorch) tokens that the program of a causal LM keeps; None: its context, at most 2048.
        example: inputs to trace with; transformers' models bring their own. (executorch) the program takes inputs of
            these shapes; None: the model is a causal LM.
        progress: show progress bars and a spinner.

    Returns:
        The report of the recipe, or of the model as it is; its last pass says what was compared.

    Raises:
        ValueError: (as ExportError, RecipeError, CheckpointError) what the format cannot say, with the site and the
            fix, or a folder that cannot be written. Nothing is written then.
    """
    target = target_of(to)
    if template is not None and target != GGUF:
        raise ExportError(f"export to {target} takes no template, and {template} was given. Fix: drop it, or to='gguf'")
    if length is not None and target != EXECUTORCH:
        raise ExportError(f"export to {target} takes no length, and {length} was given. Fix: drop it")
    _check_shard(shard)
    if target == "onnx":
        return export_onnx(model, folder, recipe, batches, example=example, tokenizer=tokenizer, progress=progress)
    model = unwrapped(model)
    if target != EXECUTORCH:
        require_transformers(model)
    named = None if recipe is None else find_recipe(recipe, model, data=batches is not None)
    chosen = None if named is None else fitted(named, model)
    if chosen is not None:
        check_recipe(chosen, model, target)
    else:
        check_modules(model, target)
    read = _template(template, target)
    if read is not None:
        read.check(model)
    call = None
    if target == EXECUTORCH:
        require_executorch()
        call = EdgeCall.of(model, example, length)
    file = Path(folder).name if Path(folder).suffix == FILES.get(target) else ""
    with _place(folder, file, 0 if chosen is not None else _size(model)) as work:
        if chosen is not None:
            model = copy.deepcopy(model)
            report = quantize(model, chosen, batches, example=example, progress=progress)
        else:
            report = _as_it_is(model)
        check_modules(model, target)
        written = PassReport(f"export to {target}", done=list(quantized_linears(model)))
        if chosen != named:
            written.notes.append("groups and scales of the preset were fitted to the model, as the formats above say")
        with Console(stderr=True, quiet=not progress).status("writing and reading back"):
            name = file or f"model{FILES.get(target, '')}"
            WRITERS[target](Job(model, work, name, None if file else tokenizer, read, call, shard, written))
        report.passes.append(written)
        if not file:
            write_card(work, Path(folder), model, report, target)
    return report


def target_of(to: str) -> str:
    """The format for a program or of its own name. Raises RecipeError if it is unknown."""
    target = ENGINES.get(to, to)
    if target not in (*WRITERS, "onnx"):
        raise RecipeError(f"export to {to!r} is unknown. Fix: use one of {', '.join([*WRITERS, 'onnx', *ENGINES])}")
    return target


def _compressed_tensors(job: Job) -> None:
    check_class(job.model, COMPRESSED_TENSORS)
    check_siblings(job.model, COMPRESSED_TENSORS)
    tensors, config, schemes = compressed_layout(job.model)
    if stores_cache(job.model):
        scales, config["kv_cache_scheme"] = cache_layout(job.model, attention_paths(job.model), COMPRESSED_TENSORS)
        tensors |= scales
        job.report.notes.append(f"{len(scales)} scales of an fp8 key/value cache")
    write_served_folder(
        job.model, ServedLayout(COMPRESSED_TENSORS, tensors, config), job.work, job.tokenizer, job.shard
    )
    if can_reopen():
        count = prove_compressed(job.work, job.model, schemes)
        job.report.notes.append(f"{count} weights read back by compressed-tensors, equal bit for bit")
    else:
        job.report.notes.append("not read back: compressed-tensors is not installed (torch-qcompile[serve])")


def _gguf(job: Job) -> None:
    check_class(job.model, GGUF)
    assert job.template is not None
    job.report.notes += written_gguf(job.model, job.template, job.work / job.name).notes


def _executorch(job: Job) -> None:
    assert job.call is not None
    job.report.notes += write_edge_program(job.model, job.call, job.work / job.name)
    if job.tokenizer is not None:
        job.tokenizer.save_pretrained(str(job.work))


def _gptq(job: Job) -> None:
    _write_layout(job, gptq_layout(job.model))


def _awq(job: Job) -> None:
    _write_layout(job, awq_layout(job.model))


def _write_layout(job: Job, layout: ServedLayout) -> None:
    """A layout whose readers run on GPUs only: its bytes are read back, and no other package reads them."""
    check_class(job.model, layout.target)
    write_served_folder(job.model, layout, job.work, job.tokenizer, job.shard)
    job.report.notes.append(f"the files are what was written; no program that reads {layout.target} ran here")


WRITERS: dict[str, Callable[[Job], None]] = {
    COMPRESSED_TENSORS: _compressed_tensors,
    GGUF: _gguf,
    EXECUTORCH: _executorch,
    GPTQ: _gptq,
    AWQ: _awq,
}
"""Format -> what writes it."""


@contextmanager
def _place(folder: str | Path, file: str, size: int) -> Iterator[Path]:
    """A folder to write into that becomes `folder`; or, where that is a file, out of which `file` takes its place."""
    if not file:
        with atomic_folder(folder, size) as work:
            yield work
        return
    if Path(folder).is_dir():
        raise ExportError(f"{folder} is a folder. Fix: name a file in it, or a folder without {Path(file).suffix}")
    require_empty(folder, size)
    with whole_file(folder) as path:
        yield path.parent
        require_empty(folder)  # another run may have written it meanwhile


def _template(path: str | Path | None, target: str) -> GgufTemplate | None:
    """The template of a GGUF file, read. Raises ExportError if it is missing."""
    if target == GGUF and path is None:
        raise ExportError("export to gguf needs a template. Fix: give template=<a GGUF file of the same model>")
    return None if path is None else GgufTemplate(Path(path))


def _check_shard(shard: int | str) -> None:
    """Refuse a size that is none. Raises ExportError."""
    text = str(shard).strip()
    if re.fullmatch(r"[1-9]\d*|[1-9]\d*(\.\d+)?\s*[KMGTkmgt]?[Bb]", text) is None:
        raise ExportError(f"shard is {shard!r}, which is no size of a file. Fix: give bytes, or a text as '5GB'")


def _size(model: nn.Module) -> int:
    """Bytes of all tensors of a model."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _as_it_is(model: nn.Module) -> Report:
    """The report of a model that was quantized before."""
    recipe = getattr(model, "qcompile_recipe", None)
    report = Report(recipe["name"] if isinstance(recipe, dict) and "name" in recipe else "as it is")
    for path, linear in quantized_linears(model).items():
        size = 2 * linear.out_features * linear.in_features
        site = SiteReport(f"{path}.weight", linear.out_features, linear.in_features, bytes_before=size)
        stored = sum(part.nbytes for part in (linear.codes, linear.scale, linear.zero) if part is not None)
        site.set_quantized(linear.format, linear.act, stored)
        report.sites.append(site)
    return report
