"""Text from elsewhere is shown and never obeyed."""

import pytest

from streamfisher.runtime.printable import printable, printable_message


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layer_3 / größe 重み ∑", "layer_3 / größe 重み ∑"),
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("a\rb\nc\td", r"a\rb\nc\td"),
        ("exe\u202efdp.", r"exe\u202efdp."),
        ("\u2066\u200b\ufeff", r"\u2066\u200b\ufeff"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("\udc80", r"\udc80"),
        ("\u2028\U000e0041", r"\u2028\U000e0041"),
    ],
)
def test_what_acts_on_a_terminal_is_written_out(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown
    printable(text).encode()


def test_no_line_of_a_message_but_the_first_begins_at_the_margin():
    text = "it differs:\n  - a\nstreamfisher: error: forged\x1b[0m"
    assert printable_message(text).split("\n") == [
        "it differs:",
        "    - a",
        r"  streamfisher: error: forged\x1b[0m",
    ]
