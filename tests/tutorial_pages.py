"""The tutorials, executed: `python tests/tutorial_pages.py` writes what their code prints below it, block by block."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
PAGES = sorted(FOLDER.glob("*.md"))
_BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", flags=re.DOTALL)


def blocks(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield each block of Python with the output that the page shows below it; `None`: it shows none."""
    for found in _BLOCK.finditer(text):
        yield found.group(1), found.group(2)


def executed(text: str) -> str:
    """Return a page with what its code prints, run from top to bottom in the current folder."""
    names = {"__name__": "tutorial"}

    def run(found: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(found.group(1), "tutorial", "exec"), names)
        shown = "".join(line.rstrip() + "\n" for line in printed.getvalue().splitlines())
        return f"```python\n{found.group(1)}```\n" + (f"\n```text\n{shown}```\n" if shown else "")

    return _BLOCK.sub(run, text)


def main() -> None:
    """Write all pages anew."""
    for page in PAGES:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            page.write_text(executed(page.read_text()))
        print(page)


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("Agg")
    main()
