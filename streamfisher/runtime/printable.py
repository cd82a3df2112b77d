"""Text that came with a run, a model or data, for a terminal: shown, never obeyed."""

from __future__ import annotations


def printable(text: object) -> str:
    r"""Return text on one line in which nothing acts on a terminal or on the order of its own letters.

    Control characters, line ends, bidirectional and other invisible ones are written as Python would: \x1b, \u202e.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def printable_message(text: object) -> str:
    """Return a message of one or more lines, of which only the first begins at the margin: none can be forged."""
    first, *rest = str(text).split("\n")
    return "\n".join([printable(first), *(f"  {printable(line)}" for line in rest)])


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")
