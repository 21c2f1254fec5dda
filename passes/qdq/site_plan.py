"""Which sites are quantized and to what: the config `Quantize`, its formats for each site, and the sites to skip."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx

from qcompile.analysis.network_ends import is_last
from qcompile.analysis.sites import Site
from qcompile.ir.aten_ops import CASTS, LINEAR, MOVES, PRODUCTS, aten
from qcompile.ir.op_calls import OUR_PRODUCTS
from qcompile.numerics.format import Format
from qcompile.numerics.k_quants import check_k6_range
from qcompile.numerics.qparams import choose_qparams, min_max
from qcompile.numerics.qtensor import group_columns
from qcompile.recipe.pass_config import ONLY_WHERE_SET, PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError, Rule

_MAXIMA = frozenset({aten.max.dim, aten.argmax.default})
"""What gives the index of the largest channel."""


@dataclass(frozen=True)
class Quantize(PassConfig):
    """Formats of weights and activations; None keeps the activation float.

    The last product (the logits) is the most sensitive one and in decoding as large as any: it has
    formats of its own.
    """

    # Format of weights. int8 with a scale for each row loses next to nothing.
    weight: Format = Format("int8")
    # Format of activations, quantized dynamically. int8 with a scale for each token; None: they stay float.
    act: Format | None = Format("int8")
    # Weight format of the sites that give the graph's output (logits); None: as every other site.
    lm_head: Format | None = Format("int8")
    # Activation format of those sites; None: they stay float.
    lm_head_act: Format | None = None
    # The sites that give the logits stay float, as servers of other programs expect; a rule's format goes before.
    keep_lm_head: bool = field(default=False, metadata=ONLY_WHERE_SET)
    # Search the clip of each weight range that minimizes sum |e|^2.4, instead of taking the whole range.
    clip: bool = False
    # Format of weights whose columns are no multiple of 256, where theirs is in blocks of 256 (k6). None: refused.
    undivided: Format | None = field(default=None, metadata=ONLY_WHERE_SET)
    # Activation format of stacks of experts, in a compiled graph: no module of a model holds it. None: they stay float.
    experts_act: Format | None = field(default=None, metadata=ONLY_WHERE_SET)

    def __post_init__(self) -> None:
        super().__post_init__()
        for act in (self.act, self.lm_head_act, self.experts_act):
            if act is not None and act.two_level:
                raise RecipeError(f"Quantize: activations have no second level of scales, got {act}")
            if act is not None and act.scale != "f32":
                raise RecipeError(
                    f"Quantize: scales of activations are not stored and stay float32, got {act}. "
                    f"Fix: drop {act.scale} from the activation"
                )
        if self.undivided is not None and not self.undivided.fits(1):
            raise RecipeError(f"Quantize: {self.undivided} is in blocks of 256 too. Fix: undivided='int4/group32/f16'")
        if self.weight.smooth:
            raise RecipeError(f"Quantize: runtime smoothing is for activations, not for weights, got {self.weight}")


@dataclass(frozen=True)
class PlannedSite:
    """A site to quantize, with its formats.

    Attributes:
        site: the product.
        weight: the weight's format.
        act: the activation's format; None keeps it float.
        is_lm_head: whether it gives the logits, in the recipe's own format for them.
    """

    site: Site
    weight: Format
    act: Format | None
    is_lm_head: bool = False


def planned_sites(config: Quantize, context: PassContext, report: PassReport) -> list[PlannedSite]:
    """The sites to quantize, in graph order; the others are skipped, with reasons.

    Raises:
        RecipeError: a weight whose scale is beyond the dtype that its format stores scales in.
    """
    found = []
    sites = context.facts.sites
    for site in sites:
        # A weight has one format, whatever the products that share it would each get.
        one_weight = [other for other in sites if other.weight is site.weight]
        logits = any(writes_output(other) for other in one_weight)
        rule = context.rules.get(site.name)
        if site.name in context.keep_float:
            context.skip(report, site.name, context.keep_float[site.name])
        elif rule is not None and rule.keep:
            context.skip(report, site.name, f"kept float by the rule {rule.match!r}")
        elif config.keep_lm_head and logits and (rule is None or rule.weight is None):
            context.skip(report, site.name, "it gives the logits, which stay float (keep_lm_head)")
        elif rule is None and any(chooses_experts(other) for other in one_weight):
            reason = "its output chooses experts: one flipped choice costs more than its bytes"
            context.skip(report, site.name, reason)
        elif not all(other.kind == "linear" or other.grouped or other.batched for other in one_weight):
            reason = "neither rows sorted by expert nor [E, T, K] by [E, K, N]"
            context.skip(report, site.name, reason, site.node.name)
        else:
            is_lm_head = config.lm_head is not None and (rule is None or rule.weight is None) and logits
            found.append(PlannedSite(site, *formats_of(site, config, rule, logits), is_lm_head))
            check_columns(site, found[-1].weight)
            check_stored_scale(site, context.facts.program.weights[site.name], found[-1].weight)
    return found


def check_columns(site: Site, form: Format) -> None:
    """Refuse columns that the format's blocks do not divide, before any site is quantized. Raises RecipeError."""
    if not form.fits(site.K):
        raise RecipeError(
            f"{site.name}: {site.K} columns are no whole blocks of 256, which {form} has. Fix: name a format for such "
            "weights, undivided='int4/group32/floatzero/f16', or give this one a rule"
        )


def check_stored_scale(site: Site, weight: Tensor, form: Format) -> None:
    """Refuse a scale beyond float16, before any site is quantized.

    Args:
        site: the site, for the message.
        weight: [N, K], or a stack [E, N, K] or [E, K, N].
        form: its format.

    Raises:
        RecipeError: with the site, the scale and the fix.
    """
    if form.scale != "f16":
        return
    try:
        rows = weight.float() if site.rows_first or site.kind == "linear" else weight.float().transpose(1, 2)
        if form.k6:
            check_k6_range(rows, form)
            return
        choose_qparams(*min_max(group_columns(rows, form), form), form)
    except ValueError as error:
        raise RecipeError(f"{site.name}: {error}") from error


def formats_of(
    site: Site, config: Quantize, rule: Rule | None, logits: bool | None = None
) -> tuple[Format, Format | None]:
    """Weight and activation format of one site; `logits`: whether its weight gives the output, here or elsewhere."""
    experts = site.kind == "experts"
    weight, act = config.weight, config.experts_act if experts else config.act
    if config.lm_head is not None and (writes_output(site) if logits is None else logits):
        weight, act = config.lm_head, act if experts else config.lm_head_act
    if config.undivided is not None and not weight.fits(site.K):
        weight = config.undivided
    if rule is not None:
        weight, act = rule.weight or weight, rule.act or act
    return weight, None if experts and config.experts_act is None else act


def writes_output(site: Site) -> bool:
    """Whether what a site computes reaches the graph's outputs and no further product, quantized ones among them."""
    return is_last(site.node, PRODUCTS | OUR_PRODUCTS)


def chooses_experts(site: Site) -> bool:
    """Whether the output of a site reaches a top-k or a maximum through elementwise operations only.

    Of a maximum the index must be used: one that only leaves the graph is a prediction, not a choice.
    """
    work, visited = [site.node], set[fx.Node]()
    while work:
        node = work.pop()
        if _is_choice(node):
            return True
        shape = node.meta["val"].shape[-1:] if hasattr(node.meta.get("val"), "shape") else None
        if node in visited or shape != site.node.meta["val"].shape[-1:]:
            continue
        visited.add(node)
        work += [u for u in node.users if u.target is not LINEAR]
    return False


def _is_choice(node: fx.Node) -> bool:
    """Whether a node picks channels, the last dimension of its operand, by their size."""
    if node.target is aten.topk.default:
        return True
    if node.target not in _MAXIMA or len(node.args) < 2:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if node.args[1] not in (-1, source.meta["val"].ndim - 1):
        return False
    indices = [node] if node.target is aten.argmax.default else [u for u in node.users if u.args[1:] == (1,)]
    return any(not _leaves(user) for index in indices for user in index.users)


def _leaves(node: fx.Node) -> bool:
    """Whether all that is made of a value leaves the graph, moved or cast."""
    return node.op == "output" or (node.target in MOVES | CASTS and all(_leaves(user) for user in node.users))
