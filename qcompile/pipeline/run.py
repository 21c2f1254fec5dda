"""Run a recipe: its passes over a program, each exact one certified, and a report.

The caller's program is not touched: passes run on a copy, and an exact pass that breaks its law is
undone and reported.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import qcompile.ir.ops
import qcompile.passes  # noqa: F401  registers the passes
from qcompile.analysis.conv_sites import find_conv_sites
from qcompile.analysis.facts import Facts
from qcompile.analysis.other_products import other_products
from qcompile.analysis.sites import Site
from qcompile.calibration.padding import refuse_empty_batches
from qcompile.calibration.statistics import Statistics, observe
from qcompile.ir.op_calls import QLinearCall, site_name
from qcompile.ir.program import Program
from qcompile.ir.quantized_stacks import quantized_stacks, stack_site
from qcompile.memory.process import release_freed_memory
from qcompile.memory.spilled_weights import SpillFolder
from qcompile.passes import Quantize
from qcompile.pipeline.dump import GraphDump
from qcompile.recipe.certificate import certify
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import Batches, PassContext
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.registry import Registered, registered
from qcompile.recipe.report import Report, SiteReport
from qcompile.recipe.rule import RecipeError, Rule
from qcompile.recipe.solved_sites import FinishedSites


class NothingToQuantize(ValueError):
    """No site was quantized; the text says why for every site."""


def run(
    program: Program,
    recipe: Recipe,
    *,
    facts: Facts | None = None,
    rules: dict[str, Rule | None] | None = None,
    batches: Batches | None = None,
    example: Sequence[Any] | None = None,
    verify: bool = True,
    keep_float: dict[str, str] | None = None,
    progress: bool = False,
    dump: str | Path | None = None,
    finished: FinishedSites | None = None,
    offload: SpillFolder | None = None,
) -> tuple[Program, Report]:
    """Run a recipe.

    Args:
        program: not changed.
        recipe: what to do.
        facts: of the program, if they are known.
        rules: the recipe's rules, resolved for the program's sites, if they are.
        batches: gives a fresh iterator of flat inputs, for passes that need data.
        example: flat inputs for the certificates; without it none are made.
        verify: certify exact passes.
        keep_float: sites to keep float, with the reason for the report.
        progress: show bars.
        dump: folder for the graph before the first pass and after each (see pipeline/dump.py).
        finished: keeps the sites that are solved, and has those that an earlier run solved.
        offload: where values of batches go that are not being computed with; None: they stay in memory.

    Returns:
        The rewritten copy and the report.

    Raises:
        RecipeError: a recipe that cannot run, a rule that matches nothing, data that is missing,
            NaN or Inf in a weight.
        NothingToQuantize: the recipe quantizes and no site was.
    """
    started = time.perf_counter()
    recipe.check()
    facts = facts or Facts(program)
    if rules is None:
        names = [site.name for site in facts.sites]
        if recipe.trains:  # so can convolutions, and what is quantized already
            names += [site_name(program, node) for node, _ in QLinearCall.find(program)]
            names += [site.name for site in find_conv_sites(program)]
            names += [stack_site(path) for *_, path in quantized_stacks(program)]
        rules = recipe.resolve(dict.fromkeys(names), program.aliases)
    check_data(recipe, batches is not None)
    check_weights(program, facts.sites)
    if batches is not None and recipe.needs:
        refuse_empty_batches(program, batches())
    graphs = GraphDump(dump, program) if dump is not None else None
    report = Report(recipe.name, breaks=list(program.breaks))
    context = PassContext(
        facts,
        batches=batches,
        rules=dict(rules),
        keep_float=dict(keep_float or {}),
        sites=_site_reports(program, facts),
        reference=program,
        progress=progress,
        finished=finished,
        offload=offload,
    )
    current, outputs = program.copy(), None
    for index, config in enumerate(recipe.passes):
        entry = registered()[type(config)]
        context.statistics = _statistics(current, entry, config, context)
        context.constants = report.constants
        context.keep_float_weights = any(registered()[type(c)].reads_float_weights for c in recipe.passes[index + 1 :])
        attempt = current.copy()
        context.facts = Facts(attempt)
        done = entry.run(attempt, config, context)
        done.notes += [note for note in context.statistics.notes if note not in done.notes]
        attempt.cleanup()
        if graphs is not None:
            graphs.write(done.name, attempt)
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
        _rename_sites(context, done.renamed)
        release_freed_memory()  # old weights among new ones leave holes as large as the model
    report.sites = list({id(site): site for site in context.sites.values()}.values())
    report.seconds = time.perf_counter() - started
    if any(isinstance(c, Quantize) for c in recipe.passes) and not any(s.quantized for s in report.sites):
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in report.sites[:8]) or "the graph has no linear"
        raise NothingToQuantize(f"recipe {recipe.name!r} quantized no site: {reasons}")
    return current, report


def check_data(recipe: Recipe, given: bool) -> None:
    """Refuse a recipe that needs calibration data and has none.

    Args:
        recipe: to be run.
        given: whether there is data.

    Raises:
        RecipeError: with the passes that need data, and the fix.
    """
    if recipe.needs and not given:
        who = ", ".join(f"{name} ({', '.join(needs)})" for name, needs in recipe.needs.items())
        raise RecipeError(
            f"recipe {recipe.name!r} needs calibration data for {who}, and none was given. Fix:\n"
            f"  batches = qcompile.calibration_batches(tokenizer)\n"
            f"  qcompile.quantize(model, {recipe.name!r}, batches)"
        )


def check_weights(program: Program, sites: list[Site]) -> None:
    """Refuse NaN and Inf in the weights of sites, all at once, before work starts.

    Raises:
        RecipeError: with every such weight.
    """
    bad = []
    for name in dict.fromkeys(site.name for site in sites):
        wrong = int((~torch.isfinite(program.weights[name])).sum())
        if wrong:
            bad.append(f"{name} ({wrong} values)")
    if bad:
        raise RecipeError(
            f"NaN or Inf in the weights of {len(bad)} sites: {', '.join(bad)}. "
            "Fix: load the model again, or in a wider dtype"
        )


def _site_reports(program: Program, facts: Facts) -> dict[str, SiteReport]:
    """A report for every site, for products that came quantized, and for those that no recipe quantizes."""
    found = {}
    for site in facts.sites:
        nbytes = program.weights[site.name].nbytes
        found[site.name] = SiteReport(
            site.name, site.N, site.K, reason="the recipe does not quantize", bytes_before=nbytes, bytes_after=nbytes
        )
    for node, call in QLinearCall.find(program):
        name, n = site_name(program, node), int(node.meta["val"].shape[-1])
        found[name] = SiteReport(name, n, call.columns, bytes_before=2 * n * call.columns)
        stored = sum(program.weight_of(part).nbytes for part in call.stored if part is not None)
        found[name].set_quantized(call.weight_format, call.act_format, stored)
    for other in other_products(program, {site.node for site in facts.sites}):
        weight = program.weights[other.name]
        size, n = weight.nbytes, len(weight)
        found.setdefault(
            other.name,
            SiteReport(other.name, n, weight.numel() // n, reason=other.reason, bytes_before=size, bytes_after=size),
        )
    return found


def _statistics(program: Program, entry: Registered, config: PassConfig, context: PassContext) -> Statistics:
    needs = set(entry.needs(config))
    if not {"absmax", "keys"} & needs:
        return Statistics()
    ranks = context.ranks
    data = context.data() if ranks.count == 1 else ranks.share(list(context.data()))[0]
    sites, attentions = "absmax" in needs, "keys" in needs
    return observe(
        program,
        data,
        sites=sites,
        attentions=attentions,
        progress=context.progress,
        ranks=ranks,
        offload=context.offload,
    )


def _rename_sites(context: PassContext, renamed: dict[str, str]) -> None:
    """A site that a pass gave a weight of its own keeps the rule, the reason and the report of its old name."""
    for new, old in renamed.items():
        context.rules[new] = context.rules.get(old)
        if old in context.keep_float:
            context.keep_float[new] = context.keep_float[old]
        if old in context.sites:
            context.sites[new] = context.sites[old]
