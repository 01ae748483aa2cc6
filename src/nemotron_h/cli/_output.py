"""What the commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO


def print_json(value: Mapping[str, Any]) -> None:
    """One line of strict JSON on stdout: NaN and infinity, which JSON lacks, become null."""
    print(json.dumps(finite(value), allow_nan=False), flush=True)


def finite(value: Any) -> Any:
    """A value that JSON can hold: NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value


def note(text: str) -> None:
    """A line about the work, on stderr."""
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


def styled(stream: TextIO | None) -> bool:
    """Whether escape sequences are welcome: a terminal, and neither NO_COLOR nor TERM=dumb."""
    terminal = stream is not None and stream.isatty()
    return terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def columns(rows: Iterable[Sequence[str]], numbers: bool = True) -> list[str]:
    """Lines with aligned columns: to the left, except that all but the first go right when they are numbers."""
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *rest in table:
        cells = [
            cell.rjust(width) if numbers else cell.ljust(width) for cell, width in zip(rest, widths[1:], strict=True)
        ]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def size(count: float) -> str:
    """Bytes for people: `7.95 GB`, decimal units."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"
