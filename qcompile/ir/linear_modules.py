"""Which modules are a linear or a convolution: the product, plus a bias, is all that a call of the module computes.

Decided on the captured graph, where torch.export notes the calls of modules that each node lies in, and by what the
calls looked like while the model was captured; never by a module's class or by trying inputs. A module that reads a
child's weight and multiplies by it itself does not call the child, so neither of them is this linear.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qcompile.ir.aten_ops import CONVOLUTIONS, LINEAR, RESHAPES, TRANSPOSES, aten
from qcompile.ir.node_meta import MODULE, NO_MODULE, WEIGHT
from qcompile.ir.program import Program

OddCalls = dict[int, str]
"""id of a module -> what is unusual about a call of it."""

_PRODUCTS: dict[Any, tuple[int, int, int]] = {
    LINEAR: (0, 1, 2),
    aten.addmm.default: (1, 2, 0),
    aten.mm.default: (0, 1, 3),
    aten.matmul.default: (0, 1, 3),
    **{convolution: (0, 1, 2) for convolution in CONVOLUTIONS},
}
"""Products, and where their input, weight and bias stand among the arguments."""

_STACK = "nn_module_stack"


def modules_with_hooks(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that take hooks: all but scripted ones, whose products lie in no module's call."""
    return [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[OddCalls]:
    """Record, while the block runs, which modules of a model are called with more than one tensor, or give more."""
    odd: OddCalls = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if len(args) + len(kwargs) != 1 or not isinstance([*args, *kwargs.values()][0], Tensor):
            odd[id(module)] = "is called with more than a tensor"
        elif kwargs and "input" not in kwargs:
            odd[id(module)] = f"is called with the keyword {next(iter(kwargs))}"
        elif not isinstance(result, Tensor):
            odd[id(module)] = f"gives {type(result).__name__}, not a tensor"

    hook: Any = record  # no global hook: PyTorch keeps a trace of one that takes keywords after its removal
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules_with_hooks(model)]
    try:
        yield odd
    finally:
        for handle in handles:
            handle.remove()


def find_linear_modules(model: nn.Module, odd: OddCalls, prefix: str = "") -> Callable[[Program], None]:
    """Gives a function that notes on every product with a weight the module that it is, or why it is none.

    Args:
        model: the module that the Program is of.
        odd: from `recorded_calls`.
        prefix: as of `from_exported`.
    """

    def note(program: Program) -> None:
        _Notes(program, model, odd, prefix).write()

    return note


class _Notes:
    def __init__(self, program: Program, model: nn.Module, odd: OddCalls, prefix: str) -> None:
        self.program, self.odd, self.prefix = program, odd, prefix
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.first_path = {id(module): path for path, module in model.named_modules()}
        self.calls: dict[str, list[fx.Node]] = defaultdict(list)
        self.live = _live_nodes(program)
        for node in program.graph.nodes:
            if node.op == "call_function" and node in self.live:
                self.calls[_call(node)].append(node)

    def write(self) -> None:
        """Products that share a weight are replaced together or not at all."""
        for placeholder in self.program.placeholders:
            if WEIGHT not in placeholder.meta or not isinstance(placeholder.meta.get("val"), Tensor):
                continue
            products = [node for node in self._readers(placeholder) if self._operand(node, 1) is placeholder]
            reasons = [reason for node in products if (reason := self._obstacle(node, placeholder)) is not None]
            if not reasons and products:
                reasons = self._other_readers(placeholder, products)
            for node in products:
                if reasons:
                    node.meta[NO_MODULE] = reasons[0]
                else:
                    node.meta[MODULE] = self.first_path[id(self._module(node))]

    def _obstacle(self, product: fx.Node, weight: fx.Node) -> str | None:
        """Why a product is not all that a call of a module computes, the module holding the weight; None if it is."""
        path, module = self._path(product), self._module(product)
        owners = self._owners(weight)
        said = path or "the model"
        if module is None or id(module) not in {id(self.modules[owner]) for owner in owners}:
            return f"{said} reads the weight of {owners[0] or 'the model'} and multiplies by it itself"
        if list(module.children()):
            return f"{said} holds modules of its own"
        if id(module) in self.odd:
            return f"{said} {self.odd[id(module)]}"
        bias = self._argument(product, 2)
        channels = 1 if product.target in CONVOLUTIONS else -1
        if bias is not None and not self._is_own_bias(bias, module, int(product.meta["val"].shape[channels])):
            return f"{said} adds something else than a bias of its own"
        read = [id(t) for leaf, t in _tensors(module) if self._is_any(leaf, module, (weight, bias))]
        if len(read) != len(_tensors(module)):
            return f"{said} holds tensors besides its weight and bias"
        reason = self._computes_more(product, weight)
        if reason is not None:
            return f"{said} {reason}"
        if path == "":
            return (
                "the model is itself this linear, and is replaced only inside another module, as nn.Sequential(model)"
            )
        return None

    def _computes_more(self, product: fx.Node, weight: fx.Node) -> str | None:
        """What the call of a product's module does besides: anything but views that keep the rows."""
        inside = set(self.calls[_call(product)])
        x: Any = self._argument(product, 0)
        known = {product}
        while isinstance(x, fx.Node) and x in inside and x.target in RESHAPES:
            known.add(x)
            x = x.args[0]
        out, last = product, None
        while out is not last:
            last = out
            for user in last.users:
                if user in inside and user.target in RESHAPES:
                    known.add(user)
                    out = user
        known |= {node for node in inside if node.target in TRANSPOSES and node.args[0] is weight}
        more = [n for n in self.calls[_call(product)] if n not in known and not _is_size(n) and not _is_assert(n)]
        if more:
            hooks = self._module(product)
            extra = (
                " (it has hooks)" if hooks is not None and (hooks._forward_hooks or hooks._forward_pre_hooks) else ""
            )
            return f"computes {', '.join(dict.fromkeys(_name(n) for n in more[:3]))} too{extra}"
        escaped = [n for n in known - {out} if any(u in self.live and u not in inside for u in n.users)]
        if escaped or not isinstance(x, fx.Node):
            return "hands on more than the product"
        if product.target in CONVOLUTIONS:
            return None if known == {product} else "gives its values another shape"
        given, made = x.meta["val"], out.meta["val"]
        rows_kept = given.ndim == made.ndim and all(
            statically_known_true(a == b) for a, b in zip(given.shape[:-1], made.shape[:-1], strict=True)
        )
        k, n = self._argument(product, 0).meta["val"].shape[-1], product.meta["val"].shape[-1]
        if not rows_kept or not statically_known_true(given.shape[-1] == k) or made.shape[-1] != n:
            return "gives its rows another shape"
        return None

    def _other_readers(self, weight: fx.Node, products: list[fx.Node]) -> list[str]:
        """What reads a linear's weight besides its call, and not through a parameter of its own (as tied tables do)."""
        replaced = {id(self._module(node)) for node in products}
        own = {id(self.modules[owner]) for owner in self._owners(weight)} - replaced
        found = []
        for node in self._readers(weight):
            if node not in products and id(self._module(node)) not in own:
                found.append(f"{self._path(node) or 'the model'} reads the weight too, by {_name(node)}")
        return found

    def _readers(self, placeholder: fx.Node) -> list[fx.Node]:
        """What reads a weight, straight or through a transpose of its own."""
        found = []
        for user in placeholder.users:
            if user in self.live:
                behind = [u for u in user.users if u in self.live and u.target in _PRODUCTS]
                found += behind if user.target in TRANSPOSES and behind else [user]
        return list(dict.fromkeys(found))

    def _operand(self, node: fx.Node, index: int) -> Any:
        value = self._argument(node, index) if node.target in _PRODUCTS else None
        if node.target in CONVOLUTIONS:
            return value
        return value.args[0] if isinstance(value, fx.Node) and value.target in TRANSPOSES else value

    def _argument(self, node: fx.Node, index: int) -> Any:
        place = _PRODUCTS[node.target][index]
        return node.args[place] if place < len(node.args) else None

    def _names(self, weight: fx.Node) -> list[str]:
        name = weight.meta[WEIGHT]
        return [name, *self.program.aliases.get(name, [])]

    def _owners(self, weight: fx.Node) -> list[str]:
        parents = [name.rpartition(".")[0] for name in self._names(weight)]
        return [parent for parent in parents if parent in self.modules] or [""]

    def _is_any(self, leaf: str, module: nn.Module, weights: tuple[fx.Node | None, ...]) -> bool:
        paths = {name for weight in weights if weight is not None for name in self._names(weight)}
        return any(
            path.rpartition(".")[2] == leaf and self.modules.get(path.rpartition(".")[0]) is module for path in paths
        )

    def _is_own_bias(self, bias: Any, module: nn.Module, n: int) -> bool:
        if not isinstance(bias, fx.Node) or WEIGHT not in bias.meta or tuple(bias.meta["val"].shape) != (n,):
            return False
        return any(self._is_any(leaf, module, (bias,)) for leaf, _ in _tensors(module))

    def _path(self, node: fx.Node) -> str:
        stack = node.meta.get(_STACK)
        path = str(list(stack.values())[-1][0]) if stack else ""
        return path.removeprefix(self.prefix) if f"{path}." != self.prefix else ""

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(self._path(node))


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _call(node: fx.Node) -> str:
    """The innermost call of a module that a node lies in."""
    stack = node.meta.get(_STACK)
    return str(list(stack)[-1]) if stack else ""


def _live_nodes(program: Program) -> set[fx.Node]:
    """What the outputs depend on, and what writes to memory: a hook that only looks computes what nobody reads."""
    work = [node for node in program.graph.nodes if node.op == "output" or _writes(node)]
    live: set[fx.Node] = set()
    while work:
        node = work.pop()
        if node not in live:
            live.add(node)
            work += node.all_input_nodes
    return live


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_size(node: fx.Node) -> bool:
    """A shape, or arithmetic of shapes."""
    value = node.meta.get("val")
    return isinstance(value, (int, torch.SymInt, torch.SymBool, bool))


def _is_assert(node: fx.Node) -> bool:
    return not node.users and not _writes(node)


def _name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default") if isinstance(node.target, torch._ops.OpOverload) else node.name
