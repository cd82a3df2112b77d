"""Hooks of mkdocs: pages that lie in the root of the repository become pages of the site, and links follow them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=moved((ROOT / source).read_text(encoding="utf-8"))))
    return files


def moved(text: str) -> str:
    """Return a page of the root as one of `docs`."""
    for source, page in PAGES.items():
        text = re.sub(rf"\]\({re.escape(source)}(#[^)]*)?\)", rf"]({page}\1)", text)
    text = re.sub(r"\[([^\]]*)\]\((?:CITATION\.cff|LICENSE)\)", r"\1", text)
    return text.replace("](docs/", "](")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Let links to pages of the root lead to those of the site."""
    for source, target in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({target}")
    return markdown
