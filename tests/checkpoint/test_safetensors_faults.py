"""Safetensors files that are damaged, hostile, or change while they are read."""

import contextlib
import errno
import json
import os
import signal
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_h.checkpoint.safetensors import TensorInfo, TensorReader, read_header, read_tensor
from nemotron_h.errors import CheckpointError

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
}


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


def pack(header: str | bytes | dict[str, object], data: bytes = b"", length: int | None = None) -> bytes:
    raw = json.dumps(header).encode() if isinstance(header, dict) else header
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: object = "F32", shape: object = (1,), begin: object = 0, end: object = 4) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def sample() -> bytes:
    """A valid file of about 1 KB, with every kind of entry."""
    tensors = {
        "backbone.embeddings.weight": torch.arange(136, dtype=torch.float32).reshape(17, 8),
        "backbone.layers.0.mixer.A_log": torch.ones(3, dtype=torch.bfloat16),
        "backbone.layers.0.mixer.empty": torch.ones(0, 4),
        "backbone.norm_f.weight": torch.tensor(7, dtype=torch.int64),
        "lm_head.weight": torch.arange(7, dtype=torch.uint8),
    }
    return safetensors.torch.save(tensors, {"format": "pt"})


def refused(path: Path, expected: str = "", data: bytes | None = None) -> None:
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert expected in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 400


def peer_accepts(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """Names, dtypes and shapes the `safetensors` package finds, None if it refuses the file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in list(file.keys())}
            return {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}
    except safetensors.SafetensorError:
        return None


# --- headers --------------------------------------------------------------------------------------------------------


def test_sample_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    data = sample()
    assert 900 < len(data) < 1200
    path.write_bytes(data)
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert {name: (i.dtype, i.shape) for name, i in header.tensors.items()} == peer_accepts(path)
    embeddings = header.tensors["backbone.embeddings.weight"]
    assert (embeddings.name, embeddings.file) == ("backbone.embeddings.weight", path)
    assert (embeddings.numel, embeddings.nbytes, embeddings.end - embeddings.start) == (136, 544, 544)
    expected = safetensors.torch.load(data)
    assert all(torch.equal(read_tensor(info), expected[name]) for name, info in header.tensors.items())
    starts = [info.start for info in header.tensors.values()]
    assert starts == sorted(starts)


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    data = sample()
    path.write_bytes(data)
    for length in reversed(range(len(data))):
        os.truncate(path, length)
        refused(path)
    for extra in (b"\0", b" ", data):
        refused(path, "has trailing bytes", data + extra)


def patch_byte(path: Path, position: int, value: int) -> None:
    with path.open("r+b") as file:  # in place: rewriting the file makes ext4 flush it
        file.seek(position)
        file.write(bytes([value]))


def test_every_header_bit_and_byte_flipped(tmp_path: Path) -> None:
    """A flip is refused, or gives another valid header, which the `safetensors` package then reads alike."""
    path = tmp_path / "x.safetensors"
    data = sample()
    path.write_bytes(data)
    header_end = 8 + struct.unpack("<Q", data[:8])[0]
    accepted = []
    for position in range(header_end):
        for mask in (*(1 << bit for bit in range(8)), 0xFF):
            patch_byte(path, position, data[position] ^ mask)
            try:
                header = read_header(path)
            except CheckpointError:
                continue
            accepted.append({name: (info.dtype, info.shape) for name, info in header.tensors.items()})
            assert accepted[-1] == peer_accepts(path)
        patch_byte(path, position, data[position])
    assert path.read_bytes() == data
    assert any("cackbone.embeddings.weight" in names for names in accepted)


def test_lengths_that_lie_allocate_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    data = sample()
    tracemalloc.start()
    try:
        for bit in range(64):
            length = struct.unpack("<Q", data[:8])[0] ^ (1 << bit)
            refused(path, data=struct.pack("<Q", length) + data[8:])
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


DEEP = b'{"a":' + b"[" * 100_000
HOSTILE = {
    "length 0": (pack(b"", length=0), "header starts with b''"),
    "length 2^63": (pack({}, length=2**63), "more than the 100000000"),
    "length 2^64-1": (pack({}, length=2**64 - 1), "more than the 100000000"),
    "length 100 MB and one": (pack({}, length=100_000_001), "more than the 100000000"),
    "length past the end": (pack({}, length=3), "does not fit"),
    "empty file": (b"", "has 0 bytes"),
    "seven bytes": (b"\0" * 7, "has 7 bytes"),
    "not JSON": (pack(b"{xx}"), "not valid JSON"),
    "zeros for JSON": (pack(b"{\0\0}"), "not valid JSON"),
    "a list": (pack(b"[]"), "starts with b'['"),
    "not UTF-8": (pack(b'{"\xff\xfe": 1}'), "not UTF-8"),
    "NUL padding": (pack(b"{}\0\0"), "Extra data"),
    "deep list": (pack(DEEP), "nests deeper"),
    "deep object": (pack(b'{"a":' * 100_000), "nests deeper"),
    "entry null": (pack({"a": None}), "must have the fields dtype, shape and data_offsets, has None"),
    "entry list": (pack({"a": []}), "must have the fields"),
    "no dtype": (pack({"a": {"shape": [], "data_offsets": [0, 0]}}), "has ['data_offsets', 'shape']"),
    "further field": (pack({"a": entry() | {"scale": 1}}, bytes(4)), "must have the fields"),
    "unknown dtype": (pack({"a": entry("F33")}, bytes(4)), "dtype 'F33' is not supported"),
    "dtype of torch": (pack({"a": entry("float32")}, bytes(4)), "dtype 'float32' is not supported"),
    "dtype in lower case": (pack({"a": entry("f32")}, bytes(4)), "dtype 'f32' is not supported"),
    "dtype number": (pack({"a": entry(4)}, bytes(4)), "dtype 4 is not supported"),
    "dtype list": (pack({"a": entry(["F32"])}, bytes(4)), "dtype ['F32'] is not supported"),
    "F6": (pack({"a": entry("F6_E2M3", [4], 0, 3)}, bytes(3)), "dtype 'F6_E2M3' is not supported"),
    "F4 odd": (pack({"a": entry("F4", [2, 3], 0, 3)}, bytes(3)), "even last dimension"),
    "F4 scalar": (pack({"a": entry("F4", [], 0, 1)}, bytes(1)), "even last dimension"),
    "shape null": (pack({"a": entry(shape=None)}, bytes(4)), "shape must be a list"),
    "shape number": (pack({"a": entry(shape=1)}, bytes(4)), "shape must be a list"),
    "shape object": (pack({"a": entry(shape={})}, bytes(4)), "shape must be a list"),
    "shape float": (pack({"a": entry(shape=[1.0])}, bytes(4)), "not 1.0"),
    "shape true": (pack({"a": entry(shape=[True])}, bytes(4)), "not True"),
    "shape string": (pack({"a": entry(shape=["1"])}, bytes(4)), "not '1'"),
    "shape null inside": (pack({"a": entry(shape=[None])}, bytes(4)), "not None"),
    "shape negative": (pack({"a": entry(shape=[-1, -1])}, bytes(4)), "not -1"),
    "shape 2^53 + 1": (pack({"a": entry("U8", [2**53 + 1])}, bytes(4)), f"not {2**53 + 1}"),
    "shape 2^64": (pack({"a": entry("U8", [2**64], 0, 0)}), f"not {2**64}"),
    "product wraps to 0": (pack({"a": entry("F32", [2**32, 2**30], 0, 0)}), "overflows"),
    "product wraps to 4": (pack({"a": entry("U8", [2**32 + 1, 2**32], 0, 4)}, bytes(4)), "overflows"),
    "empty, strides wrap": (pack({"a": entry("F32", [0, 2**53, 2**53], 0, 0)}), "overflows"),
    "65 dimensions": (pack({"a": entry(shape=[1] * 65)}, bytes(4)), "65 dimensions"),
    "10^5 dimensions": (pack({"a": entry(shape=[1] * 100_000)}, bytes(4)), "100000 dimensions"),
    "offsets null": (pack({"a": entry() | {"data_offsets": None}}), "two integers"),
    "offsets one": (pack({"a": entry() | {"data_offsets": [4]}}, bytes(4)), "two integers"),
    "offsets three": (pack({"a": entry() | {"data_offsets": [0, 4, 4]}}, bytes(4)), "two integers"),
    "offsets float": (pack({"a": entry(begin=0.0)}, bytes(4)), "two integers"),
    "offsets false": (pack({"a": entry(begin=False)}, bytes(4)), "two integers"),
    "offsets true": (pack({"a": entry("U8", [1], 0, True)}, bytes(1)), "two integers"),
    "offsets string": (pack({"a": entry(end="4")}, bytes(4)), "two integers"),
    "offsets negative": (pack({"a": entry(begin=-4, end=0)}, bytes(4)), "0 <= begin <= end"),
    "offsets reversed": (pack({"a": entry(begin=4, end=0)}, bytes(4)), "0 <= begin <= end"),
    "offsets 2^64": (pack({"a": entry(begin=2**64, end=2**64 + 4)}, bytes(4)), "leaves a hole"),
    "offsets 10^5000": (pack('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1' + "0" * 5000 + "]}}"), "5001 digits"),
    "offsets wrap": (pack({"a": entry(begin=2**64 - 4, end=2**64)}, bytes(4)), "leaves a hole"),
    "size too small": (pack({"a": entry(shape=[2])}, bytes(4)), "takes 8 bytes, data_offsets [0, 4] span 4"),
    "size too large": (pack({"a": entry(end=8)}, bytes(8)), "takes 4 bytes, data_offsets [0, 8] span 8"),
    "same bytes twice": (pack({"a": entry(), "b": entry()}, bytes(4)), "'b': overlaps"),
    "overlap": (pack({"a": entry(), "b": entry(begin=2, end=6)}, bytes(6)), "'b': overlaps"),
    "hole at the start": (pack({"a": entry(begin=1, end=5)}, bytes(5)), "'a': leaves a hole"),
    "hole": (pack({"a": entry(), "b": entry(begin=5, end=9)}, bytes(9)), "'b': leaves a hole"),
    "empty tensor inside": (pack({"a": entry(), "b": entry("U8", [0], 2, 2)}, bytes(4)), "'b': overlaps"),
    "empty tensor behind": (pack({"a": entry(), "b": entry("U8", [0], 9, 9)}, bytes(4)), "'b': leaves a hole"),
    "trailing bytes": (pack({"a": entry()}, bytes(5)), "has trailing bytes"),
    "data without tensors": (pack({}, bytes(1)), "has trailing bytes"),
    "data cut": (pack({"a": entry()}, bytes(3)), "is cut short"),
    "metadata null": (pack({"__metadata__": None}), "__metadata__ must be an object"),
    "metadata list": (pack({"__metadata__": []}), "__metadata__ must be an object"),
    "metadata number": (pack({"__metadata__": {"step": 1}}), "'step' must be a string, is 1"),
    "metadata nested": (pack({"__metadata__": {"a": {"b": "c"}}}), "'a' must be a string"),
    "metadata surrogate": (pack(rb'{"__metadata__": {"a": "\ud800"}}'), "surrogate"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(case: str, tmp_path: Path) -> None:
    data, expected = HOSTILE[case]
    with within(5):
        refused(tmp_path / "x.safetensors", expected, data)


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
ENTRY_AFTER = '{"dtype":"F32","shape":[1],"data_offsets":[4,8]}'
# What safetensors 0.8 lets through: keys that come twice, a header that does not start with "{", names made for paths.
LENIENT = {
    "duplicate tensor": (pack(f'{{"a":{ENTRY},"a":{ENTRY}}}', bytes(4)), "key 'a' twice"),
    "duplicate tensor, other data": (pack(f'{{"a":{ENTRY},"a":{ENTRY_AFTER}}}', bytes(8)), "key 'a' twice"),
    "duplicate field": (pack('{"a":' + ENTRY.replace("{", '{"dtype":"U8",') + "}", bytes(4)), "key 'dtype' twice"),
    "duplicate metadata": (pack('{"__metadata__":{"k":"1","k":"2"}}'), "key 'k' twice"),
    "leading space": (pack(f' {{"a":{ENTRY}}}', bytes(4)), "starts with b' '"),
    "leading newline": (pack(f'\n{{"a":{ENTRY}}}', bytes(4)), r"starts with b'\n'"),
    "NUL in a name": (pack({"a\0b": entry()}, bytes(4)), r"tensor 'a\x00b': a name must be printable"),
    "parent in a name": (pack({"../../x": entry()}, bytes(4)), "tensor '../../x': a name must"),
}


@pytest.mark.parametrize("case", LENIENT)
def test_what_the_package_lets_through(case: str, tmp_path: Path) -> None:
    data, expected = LENIENT[case]
    refused(tmp_path / "x.safetensors", expected, data)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " a",
        "a ",
        "/etc/passwd",
        "a..b",
        "..",
        "a\nb",
        "a\tb",
        "a\x1b[31m",
        "a\x7f",
        "a\x85",
        "a\u2028b",
        "a\u202eb",
    ],
)
def test_names_that_are_refused(name: str, tmp_path: Path) -> None:
    refused(tmp_path / "x.safetensors", "a name must be printable", pack({name: entry()}, bytes(4)))


@pytest.mark.parametrize("name", ["a", "a b", "model.layers.0.x_proj", "größe", "a/b", "重み"])
def test_names_that_are_taken(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(pack({name: entry()}, bytes(4)))
    assert list(read_header(tmp_path / "x").tensors) == [name]


def test_unusual_but_valid_headers(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({}))
    assert read_header(path).tensors == {}
    path.write_bytes(pack({"b": entry(begin=4, end=8), "e": entry("F64", [0, 3], 4, 4), "a": entry()}, bytes(8)))
    assert list(read_header(path).tensors) == ["a", "e", "b"]
    path.write_bytes(pack({"a": entry(shape=[1] * 64)}, bytes(4)))
    assert read_header(path).tensors["a"].shape == (1,) * 64
    path.write_bytes(pack(json.dumps({"a": entry()}) + " " * 100_000, bytes(4)))
    assert read_header(path).metadata == {}


NAMES = st.text(alphabet=st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12).filter(
    lambda name: ".." not in name and not name.startswith("/") and name != "__metadata__"
)
TENSORS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from(sorted(BITS)), st.lists(st.integers(0, 5), max_size=4)),
    max_size=6,
)


@settings(max_examples=200)
@given(
    tensors=TENSORS,
    metadata=st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    random=st.randoms(use_true_random=False),
    layout=st.tuples(st.booleans(), st.integers(0, 9)),
)
def test_agrees_with_the_package_on_random_headers(
    tensors: dict[str, tuple[str, list[int]]],
    metadata: dict[str, str] | None,
    random: Random,
    layout: tuple[bool, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    ascii_only, padding = layout
    entries: list[tuple[str, object]] = [("__metadata__", metadata)] if metadata is not None else []
    data = b""
    for name, (dtype, dimensions) in tensors.items():
        shape = [*dimensions[:-1], 2 * (dimensions[-1] if dimensions else 1)] if dtype == "F4" else dimensions
        size = torch.Size(shape).numel() * BITS[dtype] // 8
        fields = [("dtype", dtype), ("shape", shape), ("data_offsets", [len(data), len(data) + size])]
        random.shuffle(fields)
        entries.append((name, dict(fields)))
        data += random.randbytes(size) if dtype != "BOOL" else bytes(random.choices([0, 1], k=size))
    random.shuffle(entries)
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(pack(json.dumps(dict(entries), ensure_ascii=ascii_only) + " " * padding, data))
    header = read_header(path)
    assert header.metadata == (metadata or {})
    with safetensors.safe_open(path, "pt") as peer, TensorReader() as reader:
        assert sorted(header.tensors) == sorted(peer.keys())
        for name, info in header.tensors.items():
            ours, theirs = reader.read(info), peer.get_tensor(name)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert raw(ours) == raw(theirs)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


# --- files ----------------------------------------------------------------------------------------------------------


def open_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def test_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    with within(5):
        refused(tmp_path / "fifo", "not a regular file")
        refused(Path("/dev/zero"), "not a regular file")
        refused(tmp_path, "not a regular file")
        refused(tmp_path / "missing", "No such file")
        refused(tmp_path / "dangling", "No such file")
    (tmp_path / "blob").write_bytes(sample())
    (tmp_path / "link.safetensors").symlink_to("blob")
    assert read_header(tmp_path / "link.safetensors").tensors.keys() == read_header(tmp_path / "blob").tensors.keys()


def test_exchanged_for_a_pipe_while_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(sample())
    info = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    before = open_descriptors()
    with monkeypatch.context() as patch, within(5):
        patch.setattr(os, "stat", lambda *_, **__: info)
        patch.setattr(os.path, "realpath", lambda path, strict: str(path))
        refused(path, "not a regular file")
    assert open_descriptors() == before


def test_file_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(sample())
    infos = read_header(path).tensors
    embeddings = infos["backbone.embeddings.weight"]
    with TensorReader() as reader:
        reader.read(embeddings)
        os.truncate(path, embeddings.end - 1)
        for read in (reader.read, read_tensor):
            with pytest.raises(CheckpointError, match=r"x\.safetensors: tensor 'backbone\.embeddings.*changed after"):
                read(embeddings)
    huge = TensorInfo("huge", "U8", (2**60,), path, 0, 2**60)
    with pytest.raises(CheckpointError, match="changed after"):  # and not an attempt to allocate that much
        read_tensor(huge)
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        read_tensor(embeddings)


def test_file_shrinks_while_a_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(sample())
    info = read_header(path).tensors["backbone.embeddings.weight"]
    whole = os.preadv

    def shrinking(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = whole(fd, [buffers[0][:100]], offset)
        os.truncate(path, info.start + 150)
        return count

    monkeypatch.setattr(os, "preadv", shrinking)
    with pytest.raises(CheckpointError, match=f"the file at {info.start + 150}: it changed"):
        read_tensor(info)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(sample())
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:7]], offset))
    tensor = read_tensor(read_header(path).tensors["backbone.embeddings.weight"])
    assert torch.equal(tensor, torch.arange(136, dtype=torch.float32).reshape(17, 8))


@pytest.mark.parametrize("function", ["open", "fstat", "preadv"])
def test_io_errors_are_checkpoint_errors(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(sample())
    info = read_header(path).tensors["lm_head.weight"]

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, broken)
        refused(path, "Input/output error")
        with pytest.raises(CheckpointError, match="Input/output error"):
            read_tensor(info)


def test_bool_bytes_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({"mask": entry("BOOL", [3], 0, 3)}, b"\0\1\2"))
    with pytest.raises(CheckpointError, match="tensor 'mask': BOOL data hold the byte 2"):
        read_tensor(read_header(path).tensors["mask"])


def test_descriptors_are_bounded_and_returned(tmp_path: Path) -> None:
    before = open_descriptors()
    infos = []
    for number in range(20):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(pack({"a": entry()}, struct.pack("<f", number)))
        infos.append(read_header(path).tensors["a"])
    for data, _ in HOSTILE.values():
        (tmp_path / "x").write_bytes(data)
        with contextlib.suppress(CheckpointError):
            read_header(tmp_path / "x")
    assert open_descriptors() == before
    with TensorReader() as reader:
        for _ in range(2):
            assert [reader.read(info).item() for info in infos] == list(range(20))
        assert open_descriptors() == before + 16
    assert open_descriptors() == before


def test_read_tensor_is_on_the_cpu_in_any_context(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(sample())
    with torch.device("meta"):
        tensors = [read_tensor(info) for info in read_header(path).tensors.values()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


def test_reading_headers_needs_neither_torch_nor_pickle() -> None:
    code = "import sys, nemotron_h.checkpoint.directory; print({'torch', 'numpy', 'pickle'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output == "set()\n"
