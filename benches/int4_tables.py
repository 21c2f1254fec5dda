"""The tables of docs/algorithms/int4-training.md and docs/results/training-sites.md, from their result files."""

from __future__ import annotations

from typing import Any

from compile_tables import RESULTS, read


def measured(name: str) -> dict[str, Any]:
    """The results of one file; empty if it is not there."""
    return dict(read(name)) if (RESULTS / f"{name}.json").is_file() else {}


def accuracies(_: str) -> str:
    """Test accuracy of each variant, its distance to float, and the last training loss."""
    found = measured("int4_training")
    rows = found.get("rows", [])
    runs = f"{found.get('seeds', 0)} seeds, {found.get('epochs', 0)} epochs"
    lines = [f"| {runs} | test accuracy | of float | last training loss |", "|---|---|---|---|"]
    for row in rows:
        distance = (row["accuracy"] - rows[0]["accuracy"]) * 100
        accuracy = f"{row['accuracy']:.4f} +- {row['spread']:.4f}"
        lines.append(f"| {row['variant']} | {accuracy} | {distance:+.1f} points | {row['loss']:.4f} |")
    return "\n".join(lines)


def transformer(_: str) -> str:
    """Held-out loss of each variant, its distance to float, and the last training loss."""
    found = measured("int4_transformer")
    rows = found.get("rows", [])
    runs = f"{found.get('seeds', 0)} seeds, {found.get('steps', 0)} steps"
    lines = [f"| {runs} | held-out loss, nats a byte | of float | last training loss |", "|---|---|---|---|"]
    for row in rows:
        distance = row["held_out"] - rows[0]["held_out"]
        lines.append(
            f"| {row['variant']} | {row['held_out']:.4f} +- {row['spread']:.4f} | {distance:+.4f} | {row['loss']:.4f} |"
        )
    return "\n".join(lines)


def times(what: str) -> str:
    """Milliseconds and the ratio to the first row: of one site, or of the rounding of gradients."""
    found = measured("training_sites").get(f"{what}_ms", {})
    base = next(iter(found.values()), 1.0)
    lines = ["| | ms | of the first |", "|---|---|---|"]
    lines += [f"| {name} | {ms:.1f} | {ms / base:.2f} |" for name, ms in found.items()]
    return "\n".join(lines)


def shapes(what: str) -> str:
    """Float time over time in fixed point, of the shapes of one form: linear, or conv with those that have groups."""
    isa, form = what.split()
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in measured(f"training_shapes-{isa}").get("rows", []):
        if bool(row["shape"][5]) == (form == "conv"):
            found.setdefault(tuple(row["shape"]), {})[row["dtype"]] = row["float_us"] / row["us"]
    names = ["M", "K", "N"]
    if form == "conv":
        names = ["positions", "in", "out", "taps", "stride", "dimensions", "groups"]
    lines = [f"| {' | '.join(names)} | float32 | bfloat16 |", "|---" * (len(names) + 2) + "|"]
    for shape, ratio in sorted(found.items(), key=lambda item: item[0][6:] + item[0][5:6] + item[0][1:5] + item[0][:1]):
        cells = [
            *map(str, shape[: len(names)]),
            *(f"{ratio[d]:.2f}x" if d in ratio else "" for d in ("float32", "bfloat16")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sharing(isa: str) -> str:
    """What rounding x takes of the step of a site."""
    lines = ["| M | K | N | step, ms | rounding of x, ms | share |", "|---|---|---|---|---|---|"]
    for row in measured(f"training_shapes-{isa}").get("sharing", []):
        step, x = row["step_us"] / 1e3, row["x_us"] / 1e3
        lines.append(f"| {row['M']} | {row['K']} | {row['N']} | {step:.1f} | {x:.2f} | {x / step:.1%} |")
    return "\n".join(lines)


TABLES = {
    "int4-accuracy": accuracies,
    "int4-transformer": transformer,
    "int4-times": times,
    "int4-shapes": shapes,
    "int4-sharing": sharing,
}
