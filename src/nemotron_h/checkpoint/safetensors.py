"""The safetensors format: a strict reader of headers, a reader of single tensors, a streaming writer.

A file is `n` (u64, little-endian), `n` bytes of JSON, data. The JSON maps each name to dtype, shape and the byte range
[begin, end) in the data. The reader takes only files whose ranges tile the data exactly, so a file cut or grown
anywhere is refused before a tensor is touched. It refuses some files that the `safetensors` package 0.8 takes:
duplicate keys, a header that does not start with `{`, unprintable or path-like names, unknown fields.
Reading headers needs only the standard library; torch is imported by the functions that make or take tensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_h.checkpoint.mapping import MappedFile
from nemotron_h.errors import CheckpointError
from nemotron_h.files import open_regular, publish, read_bytes, read_into, sync_directory, write_temporary
from nemotron_h.strict_json import load_json, shown

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
PACKED_ALIGNMENT = 64

_MAX_DIMENSION = 2**53
_MAX_BITS = 2**63
_MAX_OPEN_FILES = 16
_LENGTH_BYTES = 8
_FIELDS = {"dtype", "shape", "data_offsets"}
_METADATA = "__metadata__"

# The format's name -> (bits per element, torch's name). Torch keeps two F4 elements in a byte and halves the last
# dimension; the header's shape counts elements. Torch has no F6_E2M3 and F6_E3M2, so they are unknown here too.
_DTYPES = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F4": (4, "float4_e2m1fn_x2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F32": (32, "float32"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a header says of a tensor: name, dtype in the format's spelling ("BF16"), shape in elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * _DTYPES[self.dtype][0] // 8

    @property
    def alignment(self) -> int:
        """Where a reader that maps the file wants the data to start: at a multiple of the element's bytes, of 64 for
        packed weights (matrices of bytes whose rows are such multiples)."""
        if self.dtype == "U8" and len(self.shape) > 1 and self.shape[-1] % PACKED_ALIGNMENT == 0:
            return PACKED_ALIGNMENT
        return max(1, _DTYPES[self.dtype][0] // 8)


@dataclass(frozen=True, slots=True)
class TensorInfo(TensorSpec):
    """A tensor in a file: the bytes [start, end) of `file`, counted from the start of the file."""

    file: Path
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The checked header of one file: tensors by name, in the order of their data, and the metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


class _Malformed(ValueError):
    """What is wrong with one entry of a header; the caller adds which one."""


# --- reading a header -----------------------------------------------------------------------------------------------


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no data is read, nothing larger than the file is allocated.

    Raises CheckpointError, one line naming file, tensor and value, for anything that is not exactly in the format.
    """
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size < _LENGTH_BYTES:
            raise CheckpointError(f"{path}: has {size} bytes; a safetensors file starts with 8 bytes of header length")
        length = int.from_bytes(read_bytes(fd, _LENGTH_BYTES, 0), "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: header length {length} is more than the {MAX_HEADER_BYTES} bytes allowed")
        if length > size - _LENGTH_BYTES:
            raise CheckpointError(f"{path}: header length {length} does not fit in the file's {size} bytes")
        raw = read_bytes(fd, length, _LENGTH_BYTES)
    except OSError as problem:
        raise CheckpointError(f"{path}: header cannot be read: {problem.strerror}") from problem
    finally:
        os.close(fd)
    return _parse_header(raw, path, size)


def _parse_header(raw: bytes, path: Path, file_size: int) -> Header:
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{path}: header starts with {raw[:1]!r}, not with '{{': not a safetensors file")
    entries = load_json(raw, f"{path}: header", max_bytes=MAX_HEADER_BYTES, max_depth=3)
    assert isinstance(entries, dict)  # it starts with a brace
    metadata = _metadata(path, entries.pop(_METADATA, {}))
    data_start = _LENGTH_BYTES + len(raw)
    infos, name = [], ""
    try:
        for name, entry in entries.items():
            infos.append(_tensor_info(path, name, entry, data_start))
    except _Malformed as problem:
        raise CheckpointError(f"{path}: tensor {shown(name)}: {problem}") from problem
    infos.sort(key=lambda info: (info.start, info.end))
    _check_tiling(path, infos, data_start, file_size)
    return Header({info.name: info for info in infos}, metadata)


def _metadata(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {_METADATA} must be an object, is {shown(value)}")
    for key, text in value.items():
        if not isinstance(text, str):
            raise CheckpointError(f"{path}: {_METADATA}: {shown(key)} must be a string, is {shown(text)}")
    return value


def _tensor_info(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    # Printable excludes control characters, line separators, NUL and surrogates.
    if not name or not name.isprintable() or name != name.strip() or name.startswith("/") or ".." in name:
        raise _Malformed("a name must be printable, without '..', leading '/' or blanks at its ends")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        fields = sorted(entry) if isinstance(entry, dict) else entry
        raise _Malformed(f"must have the fields dtype, shape and data_offsets, has {shown(fields)}")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _Malformed(f"dtype {shown(dtype)} is not supported; known: {', '.join(_DTYPES)}")
    shape = _shape(dtype, entry["shape"])
    begin, end = _offsets(entry["data_offsets"])
    info = TensorInfo(name, dtype, shape, path, data_start + begin, data_start + end)
    if end - begin != info.nbytes:
        raise _Malformed(
            f"{dtype} of shape {shown(list(shape))} takes {info.nbytes} bytes, "
            f"data_offsets [{begin}, {end}] span {end - begin}"
        )
    return info


def _shape(dtype: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise _Malformed(f"shape must be a list, is {shown(value)}")
    if len(value) > MAX_DIMENSIONS:
        raise _Malformed(f"shape has {len(value)} dimensions, more than {MAX_DIMENSIONS}")
    bits = _DTYPES[dtype][0]
    for size in value:
        if type(size) is not int or not 0 <= size <= _MAX_DIMENSION:
            raise _Malformed(f"shape {shown(value)} must hold integers from 0 to 2^53, not {shown(size)}")
        bits *= size or 1  # strides count every dimension, also where another is 0 and the tensor empty
    if bits > _MAX_BITS:
        raise _Malformed(f"shape {shown(value)} overflows 64 bits")
    if dtype == "F4" and (not value or value[-1] % 2):
        raise _Malformed(f"F4 of shape {shown(value)} needs an even last dimension: two share a byte")
    return tuple(value)


def _offsets(value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or type(value[0]) is not int or type(value[1]) is not int:
        raise _Malformed(f"data_offsets must be two integers, is {shown(value)}")
    begin, end = value
    if not 0 <= begin <= end:
        raise _Malformed(f"data_offsets {shown(value)} must satisfy 0 <= begin <= end")
    return begin, end


def _check_tiling(path: Path, infos: Sequence[TensorInfo], data_start: int, file_size: int) -> None:
    covered = data_start
    for info in infos:
        if info.start != covered:
            kind = "overlaps the tensor before it" if info.start < covered else "leaves a hole before it"
            begin, expected = info.start - data_start, covered - data_start
            raise CheckpointError(
                f"{path}: tensor {shown(info.name)}: {kind}: data begin at {begin}, expected {expected}"
            )
        covered = info.end
    if covered != file_size:
        kind = "is cut short" if covered > file_size else "has trailing bytes"
        raise CheckpointError(f"{path}: {kind}: the header describes {covered} bytes, the file has {file_size}")


# --- tensors --------------------------------------------------------------------------------------------------------


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for the format's name: "BF16" -> torch.bfloat16. KeyError for a name the reader refuses."""
    import torch

    return getattr(torch, _DTYPES[name][1])


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name of a torch dtype: torch.bfloat16 -> "BF16"; CheckpointError if the format has none."""
    torch_name = str(dtype).removeprefix("torch.")
    for name, (_, candidate) in _DTYPES.items():
        if candidate == torch_name:
            return name
    raise CheckpointError(f"safetensors cannot store {dtype}; convert the tensor to one of {', '.join(_DTYPES)}")


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """The entry a tensor will have in a header; the last dimension of a packed float4 tensor counts twice."""
    dtype = dtype_name(tensor.dtype)
    shape = tuple(tensor.shape)
    if dtype == "F4":
        shape = (*shape[:-1], 2 * shape[-1]) if shape else (2,)
    return TensorSpec(name, dtype, shape)


class TensorReader:
    """Reads tensors by their TensorInfo and keeps the files open between reads (at most 16). Not for two threads.

    with TensorReader() as reader:
        weight = reader.read(info)
    """

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._mapped: dict[Path, MappedFile] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file; the reader may be used again. Mapped tensors live on."""
        self._mapped.clear()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, info: TensorInfo) -> torch.Tensor:
        """The tensor in fresh memory on the CPU, dtype and shape as in the header (F4: torch's packed pairs).

        Raises CheckpointError if the file shrank since its header was read, cannot be read, or holds a BOOL that is
        neither 0 nor 1.
        """
        import torch

        from nemotron_h.ops.pack import advise_huge_pages

        dtype = torch_dtype(info.dtype)
        shape = (*info.shape[:-1], info.shape[-1] // 2) if info.dtype == "F4" else info.shape
        if info.nbytes == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        descriptor = self._descriptor(info.file)
        where = f"{info.file}: tensor {shown(info.name)}"
        try:
            size = os.fstat(descriptor).st_size
            if size < info.end:  # before the allocation, so that it is never larger than the file
                raise CheckpointError(_shrunk(where, info, size))
            data = torch.empty(info.nbytes, dtype=torch.uint8, device="cpu")
            advise_huge_pages(data)
            count = read_into(descriptor, data.numpy().data, info.start)
        except OSError as problem:
            span = f"bytes {info.start} to {info.end}"
            raise CheckpointError(f"{where}: {span} cannot be read: {problem.strerror}") from problem
        if count != info.nbytes:
            raise CheckpointError(_shrunk(where, info, info.start + count))
        if info.dtype == "BOOL" and int(data.max()) > 1:
            raise CheckpointError(f"{where}: BOOL data hold the byte {int(data.max())}; only 0 and 1 are allowed")
        return data.view(dtype).reshape(shape)

    def read_rows(self, info: TensorInfo, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of a tensor's first dimension, as `read` would give them."""
        row = info.nbytes // max(1, info.shape[0])
        part = TensorInfo(
            info.name, info.dtype, (last - first, *info.shape[1:]), info.file, info.start + first * row,
            info.start + last * row,
        )  # fmt: skip
        return self.read(part)

    def map(self, info: TensorInfo) -> torch.Tensor:
        """The tensor where it lies in its file, mapped as a whole (`mapping.MappedFile`)."""
        return self.mapped(info.file).tensor(info)

    def mapped(self, file: Path) -> MappedFile:
        """The file in memory; mapped at the first call."""
        if file not in self._mapped:
            self._mapped[file] = MappedFile(file)
        return self._mapped[file]

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            if len(self._descriptors) >= _MAX_OPEN_FILES:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[file] = open_regular(file)
        return self._descriptors[file]


def _shrunk(where: str, info: TensorInfo, size: int) -> str:
    return f"{where}: ends at byte {info.end}, the file at {size}: it changed after its header was read"


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """One tensor, as `TensorReader.read`; for many tensors the reader is faster."""
    with TensorReader() as reader:
        return reader.read(info)


# --- writing --------------------------------------------------------------------------------------------------------


def aligned(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """An order in which every tensor starts at a multiple of its element size: the given one if it does, otherwise
    sorted by element size, largest first, equal sizes as given."""
    offset = 0
    for spec in specs:
        if offset % spec.alignment:
            return sorted(specs, key=lambda spec: -spec.alignment)
        offset += spec.nbytes
    return list(specs)


def write_file(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file atomically, holding one tensor at a time.

    `specs` says what will be written, in the order of the data (`aligned` gives a good one); `tensors` then yields
    (name, tensor) in the same order. Only what the reader accepts is written. The file appears under `path` complete
    and synced, or not at all: on any failure the temporary file beside it is removed and an older file stays. (Only if
    the last step fails, syncing the directory, the new file is there and may be lost in a power cut.)
    Raises CheckpointError where a tensor differs from its spec, OSError when the disk fails.
    """
    publish(write_temporary_file(path, specs, tensors, metadata), path)
    sync_directory(path.parent)


def write_temporary_file(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """The first half of `write_file`: the complete, synced file under a temporary name, which is returned."""
    return write_temporary(path, _pieces(path, specs, tensors, metadata))


def _pieces(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None,
) -> Iterator[memoryview]:
    yield memoryview(_header_bytes(path, specs, metadata))
    remaining = iter([TensorSpec(spec.name, spec.dtype, spec.shape) for spec in specs])  # a TensorInfo never equals one
    for name, tensor in tensors:
        expected = next(remaining, None)
        came = spec_of(name, tensor)
        if came != expected:
            raise CheckpointError(f"{path}: expected {expected or 'no further tensor'}, came {came}")
        if tensor.is_meta:
            raise CheckpointError(f"{path}: tensor {shown(name)}: is on the meta device and has no data to save")
        yield _bytes_of(tensor)
        del tensor  # or it would live on while the iterator makes the next one
    missing = next(remaining, None)
    if missing is not None:
        raise CheckpointError(f"{path}: the tensors ended before {missing}")


def _header_bytes(path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        if spec.name in entries:
            raise CheckpointError(f"{path}: tensor {shown(spec.name)}: this name is taken")
        if spec.dtype not in _DTYPES:
            raise CheckpointError(f"{path}: tensor {shown(spec.name)}: dtype {shown(spec.dtype)} is not supported")
        end = offset + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8", errors="surrogatepass")
    raw += b" " * (-(_LENGTH_BYTES + len(raw)) % PACKED_ALIGNMENT)  # so that the data start aligned
    if len(raw) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: {len(specs)} tensors need a header of {len(raw)} bytes; write more files")
    _parse_header(raw, path, _LENGTH_BYTES + len(raw) + offset)
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    data = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return data.reshape(-1).view(torch.uint8).numpy().data
