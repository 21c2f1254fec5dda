"""The table of docs/algorithms/qa-lora.md, from qa_lora.json."""

from __future__ import annotations

from typing import Any

from compile_tables import RESULTS, read


def table(_: str) -> str:
    """Held-out loss of both methods before and after the merge."""
    if not (RESULTS / "qa_lora.json").is_file():
        return "Not measured."
    data: dict[str, Any] = read("qa_lora")
    lines = [
        f"SmolLM2-135M in `{data['format']}`, {data['steps']} steps of 4 x 64 tokens of the embedded prose, 32 texts "
        f"held out; nats a token. The float model has {data['float']:.3f}, its 4-bit weights {data['base']:.3f}.",
        "",
        "| method | learning rate | parameters | trained | merged | largest change of a logit | same top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        change = f"{row['logit_change']:.1e} of {row['largest_logit']:.0f}"
        lines.append(
            f"| {row['method']} | {row['lr']:g} | {row['parameters'] / 1e6:.2f} M | {row['tuned']:.3f} | "
            f"{row['merged']:.3f} | {change} | {row['same_argmax']:.0%} |"
        )
    return "\n".join(lines)


TABLES = {"qa-lora": table}
