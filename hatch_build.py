"""The README as package indexes show it: links and pictures lead to the repository, which pyproject.toml names once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ReadmeHook(MetadataHookInterface):
    """Fills `readme` in."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Put the text of the README into the metadata."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, metadata["urls"]["Repository"])}


def absolute(text: str, repository: str) -> str:
    """Return Markdown whose relative links and pictures are absolute."""
    text = re.sub(r"(!\[[^\]]*\]\()(?!\w+:|#)([^)]+)\)", rf"\1{repository}/raw/main/\2)", text)
    return re.sub(r"(?<!!)(\[[^\]]*\]\()(?!\w+:|#)([^)]+)\)", rf"\1{repository}/blob/main/\2)", text)
