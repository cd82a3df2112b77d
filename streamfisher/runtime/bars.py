"""Progress on a terminal as a bar, and elsewhere, in the file of a scheduler for example, as a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

#: Between two lines, where there is no terminal; a stage that takes less writes none.
SECONDS_BETWEEN_LINES = 30.0
_LINE = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} {unit}s [{elapsed}<{remaining}]"


class Bar(tqdm):
    """`tqdm`, with a line every half a minute where its file is no terminal and no notebook."""

    def __init__(self, *args: Any, **options: Any):
        file = options.get("file") or sys.stderr
        self._by_lines = not file.isatty() and "ipykernel" not in sys.modules
        self._last, self._lines = time.monotonic(), 0
        if self._by_lines:
            options["bar_format"] = options.get("bar_format", _LINE).replace("|{bar}|", "")
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or write a line if it is time for one."""
        if not self._by_lines:
            super().display(msg, pos)
        elif time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._write_line()

    def close(self) -> None:
        """End the bar; after lines, with a last one."""
        if self._by_lines and not self.disable:
            if self._lines:
                self._write_line()
            self.leave = False
        super().close()

    def _write_line(self) -> None:
        self._last, self._lines = time.monotonic(), self._lines + 1
        self.fp.write(f"{str(self).strip()}\n")
        self.fp.flush()
