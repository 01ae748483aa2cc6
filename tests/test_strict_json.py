"""Strict JSON: what is refused, with which error, and that nothing blocks, recurses or reads too much."""

import contextlib
import errno
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_h import strict_json as strict
from nemotron_h.errors import CheckpointError, ConfigError
from nemotron_h.strict_json import load_json, shown

EXAMPLES = settings(max_examples=300)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Turns a call that blocks into a failure."""

    def late(*_: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def refused(source: bytes | Path, expected: str, **options: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_json(source, "config", **options)
    message = str(caught.value)
    assert expected in message
    assert "config" in message or isinstance(source, Path)
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "not valid JSON"),
        (b"   ", "not valid JSON"),
        (b"{", "line 1 column 2"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": 1} x', "Extra data"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 01}', "not valid JSON"),
        (b'{"a": "\n"}', "control character"),
        (b'\n\n{"a" 1}', "line 3 column 6"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"a": "\xff"}', "not UTF-8: byte 0xff at offset 7"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": 1, "b": 2, "a": 1}', "key 'a' twice"),
        (b'{"x": [{"b": 1, "b": null}]}', "key 'b' twice"),
        (rb'{"a": 1, "\u0061": 2}', "key 'a' twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": Infinity}', "Infinity"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "overflows"),
        (b'{"a": -1e999}', "overflows"),
        (b'{"a": ' + b"1" * 65 + b"}", "65 digits"),
        (b'{"a": ' + b"1" * 1_000_000 + b"}", "1000000 digits"),
        (rb'{"a": "x\ud800y"}', "surrogate"),
        (rb'{"a": ["\uDFFF"]}', "surrogate"),
        (rb'{"\ud800": 1}', "surrogate"),
        (rb'{"a": "\ude00\ud83d"}', "surrogate"),
    ],
)
def test_refused(text: bytes, expected: str) -> None:
    refused(text, expected)


def test_valid_values() -> None:
    text = '{"é": [1, -2.5, true, null, "\\ud83d\\ude00", "a\\u0000b"], "big": 1180591620717411303424}'
    assert load_json(text.encode(), "config") == {"é": [1, -2.5, True, None, "😀", "a\0b"], "big": 2**70}
    assert load_json(b" [1e308, 1.797e308] \n", "config") == [1e308, 1.797e308]


def test_infinity_on_request() -> None:
    value = load_json(b"[Infinity, -Infinity, 1e999, NaN]", "config", allow_infinity=True)
    assert isinstance(value, list)
    assert value[:3] == [float("inf"), float("-inf"), float("inf")]
    assert value[3] != value[3]


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_deep_nesting_is_refused_before_parsing(opening: bytes) -> None:
    refused(opening * 100_000, "nests deeper than 64 levels")


def test_depth_limit_is_exact() -> None:
    assert load_json(b"[" * 64 + b"]" * 64, "config") is not None
    refused(b"[" * 65 + b"]" * 65, "nests deeper than 64")
    assert load_json(b'{"a": [1]}', "config", max_depth=2) == {"a": [1]}
    refused(b'{"a": [[1]]}', "nests deeper than 2", max_depth=2)
    assert load_json(b"[[],[],[]]" * 1, "config", max_depth=2) == [[], [], []]


@pytest.mark.parametrize("text", ["[" * 100, '"[[[[', "\\[[[[", '\\"[[[[', '\\\\"[[[[', "\\" * 101 + "[[[["])
def test_brackets_in_strings_do_not_nest(text: str) -> None:
    assert load_json(json.dumps([text]).encode(), "config", max_depth=1) == [text]
    refused(json.dumps([text, [1]]).encode(), "nests deeper than 1", max_depth=1)


STRINGS = st.text(alphabet='[]{}"\\a', max_size=8).map(json.dumps)
TOKENS = st.lists(st.sampled_from("[]{}") | STRINGS, max_size=12)


@EXAMPLES
@given(tokens=TOKENS, size=st.integers(1, 7))
def test_depth_scan_agrees_with_counting_tokens_across_chunks(tokens: list[str], size: int) -> None:
    depth = deepest = 0
    for token in tokens:
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token, 0)
        deepest = max(deepest, depth)
    text = "".join(tokens).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strict, "_SCAN_BYTES", size)
        assert not strict._nests_deeper(text, deepest)
        assert deepest == 0 or strict._nests_deeper(text, deepest - 1)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@EXAMPLES
@given(value=VALUES, ascii_only=st.booleans())
def test_agrees_with_the_standard_parser_on_valid_text(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert load_json(text.encode("utf-8"), "config") == value


@EXAMPLES
@given(data=st.binary(max_size=60) | st.text(alphabet='{}[]",:\\u0d8e1.-NaIfy ', max_size=60).map(str.encode))
def test_any_bytes_give_a_value_or_the_error(data: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        load_json(data, "config")


def test_runs_on_a_small_stack() -> None:
    outcomes: list[object] = []

    def work() -> None:
        outcomes.append(load_json(b'{"a":[' * 32 + b"]}" * 32, "config") is not None)
        with pytest.raises(CheckpointError, match="nests deeper"):
            load_json(b'{"a":[' * 100_000, "config")
        outcomes.append("refused")

    old = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(old)
    assert outcomes == [True, "refused"]


def test_error_class_is_the_callers(tmp_path: Path) -> None:
    for source in (b"[", b"[" * 99, tmp_path / "missing.json"):
        with pytest.raises(ConfigError):
            load_json(source, "config", error=ConfigError)
    (tmp_path / "large.json").write_bytes(b" " * 11)
    with pytest.raises(ConfigError, match="more than the 10 allowed"):
        load_json(tmp_path / "large.json", "config", error=ConfigError, max_bytes=10)


def test_file_is_read_and_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": 1}')
    assert load_json(path, "config") == {"a": 1}
    link = tmp_path / "link.json"
    link.symlink_to(path)
    assert load_json(link, "config") == {"a": 1}
    path.write_bytes(b'{"a": 1')
    refused(path, f"{path}: config: is not valid JSON")


def test_size_cap(tmp_path: Path) -> None:
    refused(b"[1, 2, 3]", "larger than the 8 bytes", max_bytes=8)
    assert load_json(b"[1, 2, 3]", "config", max_bytes=9) == [1, 2, 3]
    path = tmp_path / "sparse.json"
    path.touch()
    os.truncate(path, 1 << 40)  # read into memory, this would be a MemoryError
    refused(path, "has 1099511627776 bytes")


def test_only_regular_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opening a device can act on it"))
    with within(5):
        refused(tmp_path / "fifo", "not a regular file")
        refused(Path("/dev/zero"), "not a regular file")
        refused(tmp_path, "not a regular file")
        refused(tmp_path / "loop", "cannot be opened")
        refused(tmp_path / "dangling", "No such file")
        refused(tmp_path / "missing", "No such file")
        refused(tmp_path / "nul\0", "not a file name")


def test_read_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": 1}')

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        refused(path, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: 0)
        refused(path, "ended after 0 of 8 bytes")


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": 12345}')
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:3]], offset))
    assert load_json(path, "config") == {"a": 12345}


def test_shown_is_short_and_printable() -> None:
    assert shown("a") == "'a'"
    assert shown("\n\0\u202e") == r"'\n\x00\u202e'"
    assert shown("x" * 10_000_000) == "'" + "x" * 76 + "..."
    assert shown(list(range(1000)), 10) == "[0, 1, ..."
