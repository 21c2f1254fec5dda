"""The pipeline: a recipe's passes over a program, each exact one certified, then a report.

The caller's program is not touched: passes run on a copy, and an exact pass that breaks its law is
undone and reported.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

import qcompile.ir.ops
import qcompile.passes  # noqa: F401  registers the passes
from qcompile.analysis.sites import Site, find_sites
from qcompile.calibration.statistics import Statistics, observe
from qcompile.ir.node_meta import LOW_RANK, SITE
from qcompile.ir.program import Program
from qcompile.memory.process import release_freed_memory
from qcompile.passes.qdq.site_plan import Quantize, SitePlan
from qcompile.passes.weights.lorc import LoRC
from qcompile.recipe.certificate import certify
from qcompile.recipe.recipe import Recipe, RecipeError
from qcompile.recipe.registry import registered
from qcompile.recipe.report import Report, SiteReport

Batches = Callable[[], Iterable[Sequence[Any]]]


class NothingToQuantize(ValueError):
    """No site was quantized; the text says why for every site."""


def run(
    program: Program,
    recipe: Recipe,
    *,
    batches: Batches | None = None,
    example: Sequence[Any] | None = None,
    verify: bool = True,
    keep: dict[str, str] | None = None,
    progress: bool = False,
) -> tuple[Program, Report]:
    """Run a recipe.

    Args:
        program: left as it is. recipe: what to do.
        batches: gives a fresh iterator of flat inputs, for passes that need statistics.
        example: flat inputs for the certificates; without it they are not made.
        verify: certify exact passes. progress: show bars.
        keep: sites to leave float, with the reason for the report.

    Raises:
        RecipeError: a recipe that cannot run, a rule that matches nothing, data that is missing,
            NaN or Inf in a weight. NothingToQuantize: the recipe quantizes and no site was.
    """
    started = time.perf_counter()
    recipe.check()
    sites = find_sites(program)
    rules = recipe.resolve(dict.fromkeys(site.name for site in sites), program.aliases)
    check_data(recipe, batches is not None)
    check_weights(program, sites)
    report = Report(recipe.name, breaks=list(program.breaks))
    current, outputs = program.copy(), None
    entries = [SiteReport(s.name, s.N, s.K, bytes_before=program.weights[s.name].nbytes) for s in sites]
    names = {site.node.name: site.name for site in sites}
    corrected = any(isinstance(config, LoRC) for config in recipe.passes)
    for config in recipe.passes:
        entry = registered()[type(config)]
        statistics = Statistics()
        needs = set(entry.needs(config))
        if {"absmax", "keys"} & needs:
            assert batches is not None
            statistics = observe(current, batches(), sites="absmax" in needs, progress=progress)
        attempt = current.copy()
        if entry.sitewise:
            _name_untied(attempt, names, rules, keep)
            plan = SitePlan(rules, keep or {}, batches, corrected, progress, program, report.made)
            done = entry.run(attempt, config, statistics, plan)
        else:
            done = entry.run(attempt, config, statistics)
        attempt.cleanup()
        if entry.exact and verify and example is not None and done.done:
            certificate, outputs = certify(
                done.name, current, attempt, example, changed=done.changed, before_outputs=outputs
            )
            report.certificates.append(certificate)
            if not certificate.holds:
                warnings.warn(f"pass undone: {certificate}", stacklevel=2)
                outputs = None
                continue
        current = attempt
        report.passes.append(done)
        release_freed_memory()  # old weights among new ones leave holes as large as the model
    _describe(current, entries, names, report)
    report.sites = entries
    report.seconds = time.perf_counter() - started
    if any(isinstance(c, Quantize) for c in recipe.passes) and not any(s.quantized for s in entries):
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in entries[:8]) or "the graph has no linear"
        raise NothingToQuantize(f"recipe {recipe.name!r} quantized no site: {reasons}")
    return current, report


def check_data(recipe: Recipe, given: bool) -> None:
    """Refuse a recipe that needs calibration data and has none, naming the passes and the mend."""
    if recipe.needs and not given:
        who = ", ".join(f"{name} ({', '.join(needs)})" for name, needs in recipe.needs.items())
        raise RecipeError(
            f"recipe {recipe.name!r} needs calibration data for {who}, and none was given. Mend:\n"
            f"  batches = qcompile.calibration.text.batches(tokenizer)\n"
            f"  qcompile.quantize(model, {recipe.name!r}, batches)"
        )


def check_weights(program: Program, sites: list[Site]) -> None:
    """Refuse NaN and Inf in any site's weight, all at once, before work starts."""
    bad = []
    for name in dict.fromkeys(site.name for site in sites):
        wrong = int((~torch.isfinite(program.weights[name])).sum())
        if wrong:
            bad.append(f"{name} ({wrong} values)")
    if bad:
        raise RecipeError(
            f"NaN or Inf in the weights of {len(bad)} sites: {', '.join(bad)}. "
            "Load the model again, or in a wider dtype."
        )


def _name_untied(program: Program, names: dict[str, str], rules: dict[str, Any], keep: dict[str, str] | None) -> None:
    """A site that a pass gave a weight of its own keeps the rule of its old name."""
    for site in find_sites(program):
        old = names.get(site.node.name)
        if old is not None and site.name not in rules:
            rules[site.name] = rules.get(old)
            if keep and old in keep:
                keep[site.name] = keep[old]


def _describe(program: Program, entries: list[SiteReport], names: dict[str, str], report: Report) -> None:
    """Fill in formats, bytes and reasons from the final graph; add sites that came quantized."""
    quantizers = {config.__name__ for config in registered() if issubclass(config, Quantize)}
    reasons = {place.site: place.reason for p in report.passes if p.name in quantizers for place in p.skipped}
    untied = dict(line.split(" from ") for p in report.passes if p.name == "Untie" for line in p.done)
    spellings = {other: name for name, others in program.aliases.items() for other in others}
    by_name = {entry.name: entry for entry in entries}
    for entry in entries:
        new = next((n for n, old in untied.items() if old == entry.name), entry.name)
        entry.reason = reasons.get(entry.name) or reasons.get(new, "the recipe does not quantize")
        entry.bytes_after = entry.bytes_before
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.qcompile.qlinear.default):
        name = site_name(program, node)
        known = by_name.get(name) or by_name.get(untied.get(name, "")) or by_name.get(spellings.get(name, ""))
        if known is None:
            n = int(node.meta["val"].shape[-1])
            known = SiteReport(name, n, int(node.args[10]), bytes_before=n * int(node.args[10]) * 2)
            entries.append(known)
        known.reason, known.weight, known.act = "", str(node.args[8]), str(node.args[9]) or "float"
        known.bytes_after = sum(
            program.weights[program.weight_name(a) or ""].nbytes
            for a in node.args[3:7]
            if program.weight_name(a) is not None
        )
        known.bytes_after += sum(program.weights[part].nbytes for part in (node.meta.get(LOW_RANK) or {}).values())
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.qcompile.qexperts.default):
        known = by_name[node.meta[SITE]]
        known.reason, known.weight, known.act = "", str(node.args[6]), "float"
        stored = [program.weight_name(a) for a in node.args[2:6]]
        known.bytes_after = sum(program.weights[name].nbytes for name in stored if name is not None)


def site_name(program: Program, node: fx.Node) -> str:
    """The name of a quantized site: what the fuse pass gave it, or where its codes are."""
    named: str | None = node.meta.get(SITE)
    return named or (program.weight_name(node.args[3]) or node.name).removesuffix(".codes")
