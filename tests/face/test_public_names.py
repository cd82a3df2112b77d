"""What users import comes from the top or from a room, and is what it says."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import streamfisher

ROOT = Path(__file__).parents[2]
ROOMS = [module.name for module in pkgutil.iter_modules(streamfisher.__path__) if module.ispkg]
#: Imports of single modules in tests and examples: each makes a module harder to move.
MOST_DEEP_IMPORTS = 107


def documented_code():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
            yield page, block
        yield (
            page,
            "\n".join(re.findall(r"^ {4}((?:from|import) streamfisher.*)$", page.read_text(), flags=re.MULTILINE)),
        )
    for page in sorted((ROOT / "examples").rglob("*.py")):
        yield page, page.read_text()


@pytest.mark.parametrize("name", ["streamfisher", *(f"streamfisher.{room}" for room in ROOMS)])
def test_every_public_name_is_there_and_shadows_no_module(name):
    room = importlib.import_module(name)
    assert (room.__doc__ and "\n" not in room.__doc__) or room.__name__ == "streamfisher.demo"
    public = getattr(room, "__all__", [])
    assert len(set(public)) == len(public)
    assert [name for name in public if not hasattr(room, name)] == []
    assert {module.name for module in pkgutil.iter_modules(room.__path__)} & set(public) == set()


def test_documents_and_examples_import_from_the_top_and_from_rooms():
    for page, code in documented_code():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "streamfisher":
                assert node.module.count(".") < 2, f"{page.name}: {node.module}"
                public = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(public, alias.name)]
                assert not missing, f"{page.name}: {node.module} has no {missing}"


def test_modules_named_in_the_documents_exist():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for path in re.findall(r"`(?:streamfisher/)?([a-z_]+/[a-z_/]*(?:\.py)?)`", page.read_text()):
            if path.split("/")[0] in ROOMS:
                assert (ROOT / "streamfisher" / path).exists(), f"{page.name}: {path}"


def test_few_imports_reach_into_rooms():
    deep = re.compile(r"(?:from|import) streamfisher\.[a-z_]+\.[a-z_.]+")
    files = [path for folder in ("tests", "examples") for path in (ROOT / folder).rglob("*.py")]
    counts = {path.relative_to(ROOT): len(deep.findall(path.read_text())) for path in files}
    assert sum(counts.values()) <= MOST_DEEP_IMPORTS, {path: count for path, count in counts.items() if count}


def test_what_takes_seconds_to_import_waits_until_it_is_asked_for():
    code = (
        "import sys, streamfisher\n"
        "assert {'verify', 'CollectCallback'} <= set(dir(streamfisher))\n"
        "assert not {'transformers', 'streamfisher.verification', 'streamfisher.reports'} & set(sys.modules)\n"
        "from streamfisher import CollectCallback, verify\n"
        "assert verify.__module__ == 'streamfisher.verification.verify'\n"
        "assert not hasattr(streamfisher, 'no_such_name')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
