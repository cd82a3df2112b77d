"""What pages are made of: a verdict, sections, figures, and one script; whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from streamfisher.reports.verdict import Finding
from streamfisher.results.notebook import templates
from streamfisher.runtime.durable import replacing


@dataclass(frozen=True)
class Section:
    """One part of the page, with its line in the contents."""

    title: str
    content: str  # HTML; what is not ours in it was escaped by the template that made it

    @property
    def id(self) -> str:
        """Return what links name it by."""
        return "section-" + re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Report:
    """A page that was written."""

    path: Path
    verdict: tuple[Finding, ...]  # as at the top of the page


def write_page(
    path: str | Path, template: str, findings: tuple[Finding, ...], parts: Sequence[Section], **values: Any
) -> Report:
    """Write a page of a verdict and sections, whole or not at all.

    Args:
        path: of the page.
        template: its name.
        findings: the verdict.
        parts: the sections, in their order.
        values: what else the template shows.
    """
    path = Path(path)
    script = (resources.files("streamfisher.reports") / "templates" / "page.js").read_text(encoding="utf-8")
    digest = "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = rendered(template, verdict=findings, sections=parts, script=script, script_hash=digest, **values)
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")  # names of files need not be UTF-8
    return Report(path, findings)


def rendered(template: str, **values: Any) -> str:
    """Return a template of this room with its values filled in."""
    return templates("streamfisher.reports").get_template(template).render(values)


def figures_html(*drawn: tuple[str, str], texts: Sequence[str] = ()) -> str:
    """Return figures (drawing, caption) side by side, below some lines of text."""
    return rendered("figures.html", figures=drawn, texts=texts)
