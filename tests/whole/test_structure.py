"""What the import contract of pyproject.toml does not see: circles through a package's own file, and a full root."""

from pathlib import Path

import grimp

import streamfisher

#: Modules in the package root, `__init__` and `__main__` among them.
MOST_IN_ROOT = 14
ROOT = Path(streamfisher.__file__).parent


def imports() -> dict[str, set[str]]:
    """Return what each module imports, inside functions and under TYPE_CHECKING too."""
    graph = grimp.build_graph("streamfisher", cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Return the modules of a circle in order, the first one again at the end; none: empty."""
    finished: set[str] = set()

    def follow(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in finished:
            return []
        for imported in sorted(edges[module]):
            if closed := follow(imported, [*way, module]):
                return closed
        finished.add(module)
        return []

    return next((closed for module in sorted(edges) if (closed := follow(module, []))), [])


def test_no_circle_of_imports():
    closed = circle(imports())
    assert not closed, f"circle of imports: {' -> '.join(closed)}"


def test_a_circle_is_noticed():
    edges = {"a": {"b"}, "b": {"d", "c"}, "c": {"b"}, "d": set()}
    assert circle(edges) == ["b", "c", "b"]
    assert circle(edges | {"c": {"d"}}) == []


def test_the_root_holds_few_modules():
    names = sorted(path.name for path in ROOT.glob("*.py"))
    assert len(names) <= MOST_IN_ROOT, f"{len(names)} modules in the package root: {', '.join(names)}"


def test_every_room_is_a_package():
    without = [
        folder.name for folder in ROOT.iterdir() if any(folder.glob("*.py")) and not (folder / "__init__.py").is_file()
    ]
    assert not without, f"rooms without an __init__.py, which the import contract cannot see: {without}"
