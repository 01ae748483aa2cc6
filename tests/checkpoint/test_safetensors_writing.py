"""Writing safetensors files: every dtype, one tensor at a time, and a failure anywhere leaves the old file."""

import errno
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from nemotron_h import files
from nemotron_h.checkpoint.safetensors import (
    TensorSpec,
    aligned,
    dtype_name,
    read_header,
    read_tensor,
    spec_of,
    torch_dtype,
    write_file,
)
from nemotron_h.errors import CheckpointError

DTYPES = [
    *("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"),
    *("F4", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F16", "BF16", "F32", "F64", "C64"),
]


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    specs = aligned([spec_of(name, tensor) for name, tensor in tensors.items()])
    write_file(path, specs, ((spec.name, tensors[spec.name]) for spec in specs), metadata)


def load(path: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(info) for name, info in read_header(path).tensors.items()}


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (5,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_of_every_dtype(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch_type = torch_dtype(dtype)
    assert dtype_name(torch_type) == dtype
    count = torch.Size(shape).numel() * torch_type.itemsize
    data = torch.randint(0, 2 if dtype == "BOOL" else 256, (count,), dtype=torch.uint8)
    tensor = data.view(torch_type).reshape(shape)
    path = tmp_path / "x.safetensors"
    save(path, {"t": tensor, "u": tensor}, {"format": "pt"})
    ours = load(path)["t"]
    packed_scalar = dtype == "F4" and not shape  # a byte of two elements has a dimension
    assert (ours.dtype, tuple(ours.shape)) == (torch_type, (1,) if packed_scalar else shape)
    assert raw(ours) == raw(tensor)
    with safetensors.safe_open(path, "pt") as peer:
        theirs = peer.get_tensor("u")
        assert (theirs.dtype, theirs.shape, raw(theirs)) == (ours.dtype, ours.shape, raw(ours))
        assert peer.metadata() == {"format": "pt"}


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    complex_ = torch.tensor([1 + 2j, 3 - 4j])
    tensors = {
        "transposed": base.T,
        "strided": base[:, ::2],
        "expanded": torch.ones(1, 3).expand(2, 3),
        "parameter": torch.nn.Parameter(base[1]),
        "conjugate": complex_.conj(),
        "negative": torch._neg_view(base[2]),
    }
    save(tmp_path / "x.safetensors", tensors)
    loaded = load(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_order_is_kept_unless_it_misaligns() -> None:
    scale, byte, half = TensorSpec("s", "F32", ()), TensorSpec("b", "U8", (3,)), TensorSpec("h", "BF16", (2,))
    nibbles = TensorSpec("n", "F4", (2,))
    assert aligned([half, scale, byte]) == [half, scale, byte]
    assert aligned([byte, half, nibbles, scale]) == [scale, half, byte, nibbles]
    assert aligned([]) == []


@pytest.mark.parametrize("length", range(1, 9))
def test_data_start_at_a_multiple_of_eight(tmp_path: Path, length: int) -> None:
    save(tmp_path / "x", {"n" * length: torch.ones(1)})
    assert read_header(tmp_path / "x").tensors["n" * length].start % 8 == 0


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    specs = [TensorSpec(f"t{number}", "F32", (1000,)) for number in range(8)]
    made: list[weakref.ref[np.ndarray]] = []  # the memory: a view may outlive the tensor and keep that

    def produce() -> Iterator[tuple[str, torch.Tensor]]:
        for spec in specs:
            assert not any(reference() is not None for reference in made)
            memory = np.ones(1000, dtype=np.float32)
            made.append(weakref.ref(memory))
            tensor = torch.from_numpy(memory)
            del memory
            yield spec.name, tensor
            del tensor

    write_file(tmp_path / "x.safetensors", specs, produce())
    assert len(made) == 8


def one() -> Iterator[tuple[str, torch.Tensor]]:
    yield "a", torch.ones(2)


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([TensorSpec("b", "F32", (2,))], "expected TensorSpec(name='b'"),
        ([TensorSpec("a", "BF16", (2,))], "expected TensorSpec(name='a', dtype='BF16'"),
        ([TensorSpec("a", "F32", (1, 2))], "shape=(1, 2)"),
        ([], "expected no further tensor, came TensorSpec(name='a'"),
        ([TensorSpec("a", "F32", (2,)), TensorSpec("b", "F32", (2,))], "ended before TensorSpec(name='b'"),
        ([TensorSpec("a", "F32", (2,)), TensorSpec("a", "F32", (2,))], "tensor 'a': this name is taken"),
        ([TensorSpec("a", "F99", (2,))], "dtype 'F99' is not supported"),
        ([TensorSpec("../a", "F32", (2,))], "a name must be printable"),
        ([TensorSpec("a\ud800", "F32", (2,))], "not UTF-8"),
        ([TensorSpec("__metadata__", "F32", (2,))], "__metadata__"),
        ([TensorSpec("a", "F32", (-2,))], "0 to 2^53"),
        ([TensorSpec("x" * 100_000_000, "F32", (2,))], "write more files"),
    ],
)
def test_what_cannot_be_written(specs: list[TensorSpec], expected: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, {"old": torch.ones(1)})
    with pytest.raises(CheckpointError) as caught:
        write_file(path, specs, one())
    assert expected in str(caught.value)
    assert list(load(path)) == ["old"]
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_tensors_without_data_or_dtype_cannot_be_written(tmp_path: Path) -> None:
    meta = torch.ones(2, device="meta")
    with pytest.raises(CheckpointError, match="tensor 'a': is on the meta device"):
        write_file(tmp_path / "x", [spec_of("a", meta)], [("a", meta)])
    with pytest.raises(CheckpointError, match=r"cannot store torch\.complex128"):
        spec_of("a", torch.ones(2, dtype=torch.complex128))
    with pytest.raises(CheckpointError, match="'step' must be a string"):
        write_file(tmp_path / "x", [], [], {"step": 1})
    assert os.listdir(tmp_path) == []


def test_infos_of_another_file_serve_as_specs(tmp_path: Path) -> None:
    save(tmp_path / "a", {"x": torch.ones(3, dtype=torch.uint8), "y": torch.ones(2, 2)}, {"format": "pt"})
    infos = list(read_header(tmp_path / "a").tensors.values())
    write_file(tmp_path / "b", infos, ((info.name, read_tensor(info)) for info in infos), {"format": "pt"})
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def fail_at(patch: pytest.MonkeyPatch, function: str, call: int) -> Callable[[], bool]:
    """Makes the `call`-th call of os.<function> raise ENOSPC; the result tells whether that happened."""
    original, calls = getattr(os, function), 0

    def failing(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    patch.setattr(os, function, failing)
    return lambda: calls >= call


@pytest.mark.parametrize(("function", "least"), [("write", 10), ("fsync", 2), ("rename", 1), ("open", 2), ("close", 1)])
def test_failing_writes_leave_the_old_file(
    function: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CHUNK_BYTES", 64)
    path = tmp_path / "x.safetensors"
    old, new = {"t": torch.zeros(100)}, {"t": torch.ones(100), "u": torch.ones(3)}
    for call in range(1, 100):
        save(path, old)
        with monkeypatch.context() as patch:
            happened = fail_at(patch, function, call)
            failure = ""
            try:
                save(path, new)
            except OSError as problem:
                failure = str(problem)
        assert (os.strerror(errno.ENOSPC) in failure) == happened()
        assert os.listdir(tmp_path) == ["x.safetensors"]
        loaded = load(path)
        # Only syncing the directory comes after the rename.
        expected = new if loaded.keys() == new.keys() else old
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
        if not happened():
            assert expected is new
            break
        if function in {"write", "rename"} or call == 1:
            assert expected is old
    assert call > least


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.write
    monkeypatch.setattr(os, "write", lambda fd, piece: whole(fd, piece[:13]))
    save(tmp_path / "x", {"t": torch.arange(50.0)})
    assert torch.equal(load(tmp_path / "x")["t"], torch.arange(50.0))


def test_failing_and_interrupted_producers_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, {"t": torch.zeros(1)})
    for failure in (ValueError("quantizer"), KeyboardInterrupt()):

        def produce(failure: BaseException = failure) -> Iterator[tuple[str, torch.Tensor]]:
            yield "t", torch.ones(1)
            raise failure

        with pytest.raises(type(failure)):
            write_file(path, [TensorSpec("t", "F32", (1,)), TensorSpec("u", "F32", (1,))], produce())
        assert torch.equal(load(path)["t"], torch.zeros(1))
        assert os.listdir(tmp_path) == ["x.safetensors"]


def test_new_files_obey_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save(tmp_path / "x", {"t": torch.zeros(1)})
    finally:
        os.umask(old)
    assert os.stat(tmp_path / "x").st_mode & 0o777 == 0o640
