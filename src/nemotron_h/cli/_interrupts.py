"""Ctrl-C that is not forgotten: code that is being imported may turn a KeyboardInterrupt into any other exception."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_came = False


@contextmanager
def watched() -> Iterator[None]:
    """While this is active `came()` tells of a SIGINT, which raises KeyboardInterrupt as usual."""
    forget()
    if threading.current_thread() is not threading.main_thread():  # where Python delivers no signals
        yield
        return
    before = signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _note(number: int, frame: FrameType | None) -> None:
    global _came
    _came = True
    raise KeyboardInterrupt


def came() -> bool:
    return _came


def forget() -> None:
    """The interrupt has been dealt with."""
    global _came
    _came = False
