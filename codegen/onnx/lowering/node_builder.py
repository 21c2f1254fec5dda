"""Nodes that matmul_nbits.py and int8_kv_attention.py write in the place of one of ours, and a walk over those of a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import onnx
from onnx import helper

DOMAIN = "qcompile"
# Tokens that are multiplied by 4-bit codes, and that read an int8 cache by its codes: one number, so that the branch of
# few tokens needs no second choice in its attentions. benches/onnx_cpu.py measures both ways.
FEW = 4


class Steps:
    """Nodes in the order they run; each is called after what it makes."""

    def __init__(self, name: str) -> None:
        self.name, self.nodes = name, list[onnx.NodeProto]()

    def __call__(self, made: str, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; the name of its output."""
        out = "/".join((DOMAIN, self.name, made))
        self.nodes.append(helper.make_node(operator, inputs, [out], name=out, **attributes))
        return out

    def also(self, made: str) -> str:
        """One more output of the last node; its name."""
        out = "/".join((DOMAIN, self.name, made))
        self.nodes[-1].output.append(out)
        return out

    def ending(self, out: str) -> list[onnx.NodeProto]:
        """The nodes, the last one making `out`."""
        self.nodes[-1].output[:] = [out]
        return self.nodes


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Its attributes by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def every_node(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes, and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from every_node(attribute.g.node)
