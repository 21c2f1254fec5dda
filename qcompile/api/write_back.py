"""Which modules the results of a Program go into, and their check before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from qcompile.analysis.facts import Facts
from qcompile.api.module_writes import ModuleWrites, is_captured, only_carries
from qcompile.ir.aten_ops import LINEAR
from qcompile.ir.node_meta import MODULE, NO_MODULE
from qcompile.ir.op_calls import HadamardCall, QLinearCall
from qcompile.ir.program import Program
from qcompile.recipe.rule import RecipeError


@dataclass
class WriteBack:
    """The modules that the results of a Program are written into.

    Attributes:
        model: what the Program was captured from.
        program: as captured.
        owners: site name -> path of the first plain linear that is it.
        not_plain: site name -> why no module can be replaced.
    """

    model: nn.Module
    program: Program
    owners: dict[str, str]
    not_plain: dict[str, str]

    @staticmethod
    def of(model: nn.Module, facts: Facts) -> WriteBack:
        """Read off the captured graph which module every linear site is (see ir/linear_modules.py).

        Args:
            model: a module.
            facts: of the Program that was captured from it.
        """
        owners: dict[str, str] = {}
        not_plain: dict[str, str] = {}
        for site in facts.sites:
            if site.kind != "linear":
                continue
            if MODULE in site.node.meta:
                owners.setdefault(site.name, site.node.meta[MODULE])
            else:
                why = site.node.meta.get(NO_MODULE, "its weight is of no module")
                not_plain[site.name] = (
                    f"no module computes just this product ({why}), so nothing can take its place; "
                    "torch.compile(model, backend='qcompile') quantizes it"
                )
        return WriteBack(model, facts.program, owners, not_plain)

    def check(self, after: Program) -> ModuleWrites:
        """Prepare all that is to be written; nothing is written yet.

        Args:
            after: the Program that passes rewrote.

        Returns:
            What to `apply` to the model.

        Raises:
            RecipeError: an online transform, or a norm, that no module of the model can hold; calls of one module that
                were rewritten differently.
        """
        homeless = [
            node.name
            for node, _ in HadamardCall.find(after)
            if not is_captured(node)
            for user in node.users
            if not _has_module(_linear_behind(user))
        ]
        if homeless:
            raise RecipeError(
                f"the online transforms {homeless} have no linear module to live in. Fix: drop OnlineHadamard"
            )
        return ModuleWrites.of(self.model, self.program, after)


def _has_module(linear: fx.Node | None) -> bool:
    """Whether a module takes the place of a linear."""
    return linear is not None and MODULE in linear.meta


def _linear_behind(node: fx.Node) -> fx.Node | None:
    while node.target not in (QLinearCall.target, LINEAR):
        if not only_carries(node) or not node.users:
            return None
        node = next(iter(node.users))
    return node
