"""Reports: what was done, what was skipped and why, as data.

`str(report)` is aligned text for a terminal, `to_json()` the same as plain data. Nothing is logged
on the side: a site or a pass that did nothing says so here.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from qcompile.numerics.format import Format


@dataclass(frozen=True)
class Skipped:
    """A place that a pass did not rewrite.

    Attributes:
        site: the name of the site, or what the place is.
        reason: why.
        node: the graph node that prevented it, if one did.
    """

    site: str
    reason: str
    node: str = ""

    def __str__(self) -> str:
        return f"{self.site}: {self.reason}" + (f" (node {self.node})" if self.node else "")


@dataclass(frozen=True)
class PrefixValues:
    """What the float model computes for a prefix of p tokens.

    Attributes:
        ids: [p] int64.
        keys: of each attention, [1, H, p, D].
        values: of each attention, [1, H, p, D].
        logits: [1, p, V].
    """

    ids: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    logits: Tensor


@dataclass(frozen=True)
class KVConstants:
    """Tensors that a quantized key/value cache needs beside the weights, one for each attention in graph order.

    Attributes:
        centers: the mean key of each head, [H, D].
        key_scales: static scales of the keys' channels, [H, D].
        value_scales: static scales of the values' channels, [H, D].
        prefix: keys, values and logits that stay float.
    """

    centers: tuple[Tensor, ...] = ()
    key_scales: tuple[Tensor, ...] = ()
    value_scales: tuple[Tensor, ...] = ()
    prefix: PrefixValues | None = None

    def updated(self, other: KVConstants) -> KVConstants:
        """These, but for those that `other` has."""
        return KVConstants(
            other.centers or self.centers,
            other.key_scales or self.key_scales,
            other.value_scales or self.value_scales,
            other.prefix or self.prefix,
        )


@dataclass
class PassReport:
    """What one pass did.

    Attributes:
        name: the pass.
        done: the places that it rewrote.
        skipped: the places that it did not, with reasons.
        notes: choices made ("hadamard 16*36 for 576").
        changed: names of graph nodes whose values the pass changes on purpose, so that a certificate does not blame
            them.
        renamed: new name of a site -> its name before, where a pass gave it a weight of its own.
        constants: what the pass computed for the key/value cache of the module's calls.
    """

    name: str
    done: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)
    constants: KVConstants = field(default_factory=KVConstants)

    def skip(self, site: str, reason: str, node: str = "") -> None:
        """Record a place that the pass does not rewrite."""
        self.skipped.append(Skipped(site, reason, node))


@dataclass(frozen=True)
class Certificate:
    """The check of one exact pass on the user's own model and data.

    Attributes:
        name: the pass.
        error: relative difference max|after - before| / max|before| over the outputs.
        tolerance: what is allowed.
        dtype: how the model stores its weights, which decides the tolerance.
        blame: the first node that differs when it failed.
    """

    name: str
    error: float
    tolerance: float
    dtype: str
    blame: str = ""

    @property
    def holds(self) -> bool:
        """Whether the law held."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        verdict = "holds" if self.holds else f"BROKEN, undone; first at {self.blame}"
        return f"{self.name}: {verdict} ({self.error:.1e} <= {self.tolerance:.0e}, {self.dtype})"


@dataclass
class SiteReport:
    """One site: how it was quantized, or why it stays float.

    Attributes:
        name: the attribute path of the weight.
        N: its rows, output channels.
        K: its columns, input channels.
        weight: the format of the weight as text, or "float".
        act: the format of the activation as text, or "float".
        kernel: label of M (decode, prefill) -> kernel; filled by the backend.
        reason: why the site stays float.
        bytes_before: of the float weight.
        bytes_after: of codes, scales and zero points, or of the float weight.
        output_error: ||(W - W^) x||^2 / ||W x||^2 over the calibration tokens, rounded to nearest and as chosen; None
            where the pass read no inputs. Sites that read one input share it; of a stack of experts it is the mean over
            those that tokens reached.
    """

    name: str
    N: int
    K: int
    weight: str = "float"
    act: str = "float"
    kernel: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    output_error: tuple[float, float] | None = None

    @property
    def quantized(self) -> bool:
        """Whether the weight is quantized."""
        return self.weight != "float"

    def set_quantized(self, weight: Format, act: Format | None, stored_bytes: int) -> None:
        """Record the formats that the site was quantized to, and the bytes of codes, scales and zero points."""
        self.weight, self.act, self.reason = str(weight), "float" if act is None else str(act), ""
        self.bytes_after = stored_bytes


@dataclass
class Report:
    """What one run did to one model.

    Attributes:
        recipe: the name of the recipe.
        sites: every site.
        passes: every pass that ran and was not undone.
        certificates: the check of each exact pass.
        breaks: where the frontend had to split the model.
        seconds: of the whole call, capture and comparison with the float model included.
        peak_bytes: the largest memory of the process; 0 where it was not measured.
        metrics: what was measured of the result (perplexity, KL divergence, error of an export).
    """

    recipe: str
    sites: list[SiteReport] = field(default_factory=list)
    passes: list[PassReport] = field(default_factory=list)
    certificates: list[Certificate] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def constants(self) -> KVConstants:
        """What the passes computed for the key/value cache; where two did, the later one's."""
        found = KVConstants()
        for entry in self.passes:
            found = found.updated(entry.constants)
        return found

    @property
    def bytes_before(self) -> int:
        """Bytes of the weights of all sites before."""
        return sum(site.bytes_before for site in self.sites)

    @property
    def bytes_after(self) -> int:
        """Bytes of the weights of all sites after."""
        return sum(site.bytes_after for site in self.sites)

    @property
    def skipped(self) -> list[SiteReport]:
        """The sites that stay float."""
        return [site for site in self.sites if not site.quantized]

    def __str__(self) -> str:
        done = sum(site.quantized for site in self.sites)
        lines = [
            f"recipe {self.recipe}: {done} of {len(self.sites)} sites quantized, "
            f"{_mb(self.bytes_before)} -> {_mb(self.bytes_after)} of linear weights, {self.seconds:.1f} s"
            + (f", peak {_mb(self.peak_bytes)}" if self.peak_bytes else "")
        ]
        kinds = Counter((s.weight, s.act, tuple(s.kernel.items())) for s in self.sites if s.quantized)
        for (weight, act, kernel), count in kinds.most_common():
            kernels = ", ".join(f"{rows}: {name}" for rows, name in kernel)
            lines.append(f"  {count:4d} x  weight {weight:<28s} act {act:<12s} {kernels}")
        measured = {site.name: site.output_error for site in self.sites if site.output_error is not None}
        if measured:
            nearest, chosen = (sum(part) / len(measured) for part in zip(*measured.values(), strict=True))
            worst = max(measured, key=lambda name: measured[name][1])
            lines.append(
                f"  output error of {len(measured)} sites, mean: {nearest:.2e} rounded to nearest, {chosen:.2e} as "
                f"chosen; largest {measured[worst][1]:.2e} at {worst}"
            )
        reasons = Counter(site.reason for site in self.skipped)
        for reason, count in reasons.most_common():
            names = [s.name for s in self.skipped if s.reason == reason]
            lines.append(f"  {count:4d} x  float: {reason} ({_some(names)})")
        for entry in self.passes:
            lines.append(f"  pass {entry.name}: {len(entry.done)} done, {len(entry.skipped)} skipped")
            lines += [f"       {note}" for note in entry.notes]
            for reason, count in Counter(item.reason for item in entry.skipped).most_common(4):
                places = [f"{i.site} @ {i.node}" if i.node else i.site for i in entry.skipped if i.reason == reason]
                lines.append(f"       skipped {count}: {reason} ({_some(places)})")
        lines += [f"  law {certificate}" for certificate in self.certificates]
        lines += [f"  graph break: {where}" for where in self.breaks]
        lines += [f"  {name}: {value:.4g}" for name, value in self.metrics.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        data = asdict(
            dataclasses.replace(self, passes=[dataclasses.replace(p, constants=KVConstants()) for p in self.passes])
        )
        for entry in data["passes"]:
            entry["changed"] = sorted(entry["changed"])
            del entry["constants"]
        data["bytes_before"], data["bytes_after"] = self.bytes_before, self.bytes_after
        return data

    def write(self, path: str | Path) -> None:
        """Write `to_json()` to a file."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _some(names: list[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown + (f", and {len(names) - most} more" if len(names) > most else "")
