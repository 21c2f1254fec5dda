"""Put the measured accuracy tables into docs/results.md, from the JSON under benches/results.

    python benches/write_tables.py

A table stands between <!-- table NAME --> and <!-- end -->; NAME is a file under benches/results.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def accuracy(name: str) -> str:
    """The Markdown of one comparison, float first, then by bytes and perplexity."""
    data = json.loads((ROOT / "benches" / "results" / f"{name}.json").read_text())
    rows = sorted(data["rows"], key=lambda r: (r["recipe"] != "float", r["site_bytes"] // 5_000_000, r["perplexity"]))
    lines = ["| recipe | perplexity | KL to float | same top-1 | site weights MB |", "|---|---|---|---|---|"]
    for r in rows:
        size = f"{r['site_bytes'] / 1e6:.0f}" if r["site_bytes"] else ""
        shown = f"{r['perplexity']:.2f}" if r["perplexity"] < 1000 else f"{r['perplexity']:.0f}"
        lines.append(f"| `{r['recipe']}` | {shown} | {r['kl']:.4f} | {r['agreement']:.1%} | {size} |")
    return "\n".join(lines)


def main() -> None:
    """Rewrite every table in place."""
    page = ROOT / "docs" / "results.md"
    text = re.sub(
        r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}{accuracy(m[2])}\n{m[3]}",
        page.read_text(),
        flags=re.S,
    )
    page.write_text(text)


if __name__ == "__main__":
    main()
