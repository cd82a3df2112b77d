"""Write `docs/options.md`: every option, from its definition.

python tests/options_page.py
"""

from __future__ import annotations

from pathlib import Path

from streamfisher.cli.options import OPTIONS, RUN_OPTIONS, SEVERAL
from streamfisher.config import IDENTITY_FIELDS, SECTIONS
from streamfisher.config.option import Option, options_of

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
HEAD = """# Options

Each is a keyword and an attribute of `SpectralConfig`, and a key of a `--config` file, where its name in Python does
too; most are options of the command line. `config.samples` and so on hold the same by section. A run refuses to resume
where an option marked * differs: it decides stored bits. `python tests/options_page.py` writes this page.
"""


def page() -> str:
    """Return the page."""
    lines = [HEAD]
    for section in SECTIONS:
        text = (section.__doc__ or "").splitlines()[0]
        lines += [f"## {section.__name__}", "", text, "", *_table(options_of(section)), ""]
    lines += ["## Of a command", "", "What only the command line and its files know.", "", *_table(RUN_OPTIONS)]
    return "\n".join(lines) + "\n"


def _table(options: dict[str, Option]) -> list[str]:
    rows = ["| Python | files | command line | |", "|---|---|---|---|"]
    for name, option in options.items():
        taken = OPTIONS[SEVERAL.get(name, name)]
        key = taken.name or name
        places = {"model": "MODEL", "data": "DATA", "out": "`--out`"}
        flag = f"`--{key.replace('_', '-')}`" if taken.group else places.get(name, "")
        python = "" if options is RUN_OPTIONS else f"`{name}`{'*' if name in IDENTITY_FIELDS else ''}"
        rows.append(f"| {python} | `{key}` | {flag} | {option.description} |")
    return rows


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())
    print(PAGE)


if __name__ == "__main__":
    main()
