"""The pages of the documentation, and the Python blocks in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[str]:
    """The code blocks of Python of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
