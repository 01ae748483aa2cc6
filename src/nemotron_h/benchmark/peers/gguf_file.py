"""GGUF files, written piece by piece: header, metadata, table of tensors, then their data (ggml's docs/gguf.md).

Little-endian; a string is its length (u64) and UTF-8; dimensions are listed fastest first, the reverse of PyTorch's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nemotron_h.errors import UnsupportedError

_MAGIC, _VERSION, _ALIGNMENT = b"GGUF", 3, 32
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9  # gguf_metadata_value_type


@dataclass(frozen=True)
class Encoding:
    """A tensor type of ggml: `block_bytes` hold `block` elements of a row."""

    name: str
    code: int  # enum ggml_type
    block: int
    block_bytes: int


F32 = Encoding("F32", 0, 1, 4)
BF16 = Encoding("BF16", 30, 1, 2)
Q4_0 = Encoding("Q4_0", 2, 32, 18)  # fp16 scale, 32 nibbles
Q8_0 = Encoding("Q8_0", 8, 32, 34)  # fp16 scale, 32 bytes


@dataclass(frozen=True)
class Entry:
    """A tensor to be written; `shape` has the slowest dimension first, as in PyTorch."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding

    @property
    def nbytes(self) -> int:
        """Bytes of the data.

        Raises:
            UnsupportedError: rows that are no whole number of blocks.
        """
        count, rest = 1, self.shape[-1] % self.encoding.block
        for size in self.shape:
            count *= size
        if rest:
            raise UnsupportedError(
                f"{self.name}: rows of {self.shape[-1]} weights; {self.encoding.name} needs multiples of"
                f" {self.encoding.block}"
            )
        return count // self.encoding.block * self.encoding.block_bytes


def write(
    path: Path,
    metadata: Mapping[str, Any],
    entries: Sequence[Entry],
    produce: Callable[[Entry], Iterable[bytes | memoryview]],
) -> int:
    """Write a file and return its bytes.

    Args:
        metadata: Values are str, bool, int (u32), float (f32) or a list of int (i32).
        produce: Pieces of a tensor's data, in order; it is asked once for each entry, in order.
    """
    with path.open("wb") as file:
        file.write(_head(metadata, entries))
        _pad(file)
        for entry in entries:
            start = file.tell()
            for piece in produce(entry):
                file.write(piece)
            assert file.tell() - start == entry.nbytes, f"{entry.name}: {file.tell() - start} of {entry.nbytes} bytes"
            _pad(file)
        return file.tell()


def _head(metadata: Mapping[str, Any], entries: Sequence[Entry]) -> bytes:
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, len(entries), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), *_value(value)]
    offset = 0
    for entry in entries:
        parts += [_string(entry.name), struct.pack("<I", len(entry.shape))]
        parts += [struct.pack("<Q", size) for size in reversed(entry.shape)]
        parts.append(struct.pack("<IQ", entry.encoding.code, offset))
        offset += -(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT
    return b"".join(parts)


def _value(value: Any) -> Iterator[bytes]:
    if isinstance(value, str):
        yield struct.pack("<I", _STRING)
        yield _string(value)
    elif isinstance(value, bool):
        yield struct.pack("<I?", _BOOL, value)
    elif isinstance(value, int):
        yield struct.pack("<II", _U32, value)
    elif isinstance(value, float):
        yield struct.pack("<If", _F32, value)
    else:
        yield struct.pack("<IIQ", _ARRAY, _I32, len(value))
        yield struct.pack(f"<{len(value)}i", *value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
