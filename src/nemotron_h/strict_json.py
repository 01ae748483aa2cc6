"""Strict JSON for files from strangers: configs, indexes, tokenizers, headers of safetensors.

The standard parser keeps the last of two equal keys, takes NaN, and recurses as deep as the text says. Here two equal
keys are an error, depth is measured before parsing, and sizes have caps.
"""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

from nemotron_h.errors import CheckpointError, NemotronHError
from nemotron_h.files import open_regular, read_bytes

MAX_BYTES = 100_000_000
MAX_DEPTH = 64

_MAX_INTEGER_DIGITS = 64  # int() of n digits takes n² time
_SCAN_BYTES = 1 << 20
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def shown(value: object, limit: int = 80) -> str:
    """`value` for an error message: one line, printable, at most `limit` characters."""
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def load_json(
    source: Path | bytes,
    what: str,
    *,
    error: type[NemotronHError] = CheckpointError,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    allow_infinity: bool = False,
) -> object:
    """Parse a JSON file or text: UTF-8, no byte-order mark, no duplicate keys, no unpaired surrogates.

    `what` names the content in messages ("config", "index"). Files over `max_bytes` are refused unread, texts that nest
    deeper than `max_depth` unparsed. `allow_infinity` admits bare `Infinity`, `-Infinity` and `NaN` and numbers that
    overflow to infinity; without it they are errors. Every failure is an `error` of one line that names the file.
    """
    if isinstance(source, bytes):
        where, data = what, source
    else:
        where, data = f"{source}: {what}", _read(source, what, max_bytes, error)

    def fail(problem: str) -> NemotronHError:
        return error(f"{where}: {problem}")

    if len(data) > max_bytes:
        raise fail(f"is larger than the {max_bytes} bytes allowed")
    if _nests_deeper(data, max_depth):
        raise fail(f"nests deeper than {max_depth} levels")
    try:
        value = _decoder(fail, allow_infinity).decode(data.decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise fail(f"is not UTF-8: byte {data[problem.start]:#04x} at offset {problem.start}") from problem
    except json.JSONDecodeError as problem:
        position = f"line {problem.lineno} column {problem.colno}"
        raise fail(f"is not valid JSON: {problem.msg} at {position}") from problem
    if _SURROGATE_ESCAPE.search(data):
        _refuse_surrogates(value, fail)
    return value


def _read(path: Path, what: str, max_bytes: int, error: type[NemotronHError]) -> bytes:
    fd = open_regular(path, error)
    try:
        size = os.fstat(fd).st_size
        if size > max_bytes:
            raise error(f"{path}: {what}: has {size} bytes, more than the {max_bytes} allowed")
        data = read_bytes(fd, size, 0)
    except OSError as problem:
        raise error(f"{path}: {what}: cannot be read: {problem.strerror}") from problem
    finally:
        os.close(fd)
    if len(data) != size:
        raise error(f"{path}: {what}: ended after {len(data)} of {size} bytes: it changed while it was read")
    return data


def _nests_deeper(data: bytes, limit: int) -> bool:
    """Whether brackets outside strings nest deeper than `limit`; looks at any bytes, valid JSON or not."""
    depth, in_string, carry = 0, False, b""
    for start in range(0, len(data), _SCAN_BYTES):
        # Backslashes pair up from the left of a run: without the pairs, one that is left escapes what follows it.
        chunk = (carry + data[start : start + _SCAN_BYTES]).replace(rb"\\", b"")
        carry = b"\\" if chunk.endswith(b"\\") else b""
        chunk = chunk.removesuffix(b"\\").replace(rb"\"", b"")
        parts = chunk.split(b'"')
        outside = b"".join(parts[1 if in_string else 0 :: 2])
        in_string ^= len(parts) % 2 == 0
        for bracket in outside.translate(None, _NO_BRACKETS):
            depth += 1 if bracket in b"[{" else -1
            if depth > limit:
                return True
    return False


def _decoder(fail: Callable[[str], NemotronHError], allow_infinity: bool) -> json.JSONDecoder:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise fail(f"has the key {shown(twice)} twice")
        return result

    def integer(text: str) -> int:
        if len(text) > _MAX_INTEGER_DIGITS:
            raise fail(f"has an integer of {len(text)} digits; at most {_MAX_INTEGER_DIGITS} are read")
        return int(text)

    def number(text: str) -> float:
        value = float(text)
        if math.isinf(value) and not allow_infinity:
            raise fail(f"has the number {shown(text)}, which overflows")
        return value

    def constant(text: str) -> float:
        if not allow_infinity:
            raise fail(f"has the value {text}, which is not JSON")
        return float(text)

    return json.JSONDecoder(
        object_pairs_hook=unique, parse_int=integer, parse_float=number, parse_constant=constant, strict=True
    )


def _refuse_surrogates(value: object, fail: Callable[[str], NemotronHError]) -> None:
    """An escape like \\ud800 without its other half makes a string that cannot be printed or encoded."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if not item.isascii() and any("\ud800" <= character <= "\udfff" for character in item):
                raise fail(f"has an unpaired surrogate in the string {shown(item)}")
        elif isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
