"""Sizes of packed matrices, and their values from rows to panels and back (csrc/formats.h).

Letters: N output rows · K columns · n = ceil(N/16) panels · c = ceil(K/64) chunks · b = ceil(K/128) blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron_h.errors import InputError

ROWS, CHUNK, BLOCK, GROUP = 16, 64, 128, 32  # of a panel, values, a scale code, a multiplier
TILE = 32  # columns of bf16 values
_CODES = {  # csrc/kernels.h: Format
    "int8": 2, "int4": 3, "grouped8": 4, "grouped4": 5, "grouped8_min": 6, "grouped4_min": 7, "bf16": 8,
}  # fmt: skip
_PANEL_BYTES: dict[tuple[str, int, int], int] = {}  # asked for at every call of a kernel
_SCALE_CODES = {torch.float16: 0, torch.bfloat16: 1}  # kernels.h: ScaleType


@dataclass(frozen=True)
class Packing:
    """A packed format.

    name: "bf16", "int8" and "int4" are the package's own; "grouped8" and "grouped4", with "_min" where each group has a
        minimum, hold the integers and scales of other tools.
    group: Columns that share a scale in a grouped format: 32, 64 or 128; 0 in our own.
    scale_dtype: Of a grouped format's scales: float16 or bfloat16.
    """

    name: str
    group: int = 0
    scale_dtype: torch.dtype = torch.float16

    @property
    def bits(self) -> int:
        return 16 if self.floating else 4 if "4" in self.name else 8

    @property
    def own(self) -> bool:
        return self.name in OWN

    @property
    def floating(self) -> bool:
        """Whether values are floating: they have no scales, and meet activations as these are."""
        return self.name == "bf16"

    @property
    def has_min(self) -> bool:
        return self.name.endswith("_min")

    @property
    def code(self) -> int:
        """The kernels' number of the format."""
        return _CODES[self.name]

    @property
    def scale_code(self) -> int:
        return _SCALE_CODES[self.scale_dtype]

    def parts(self, cols: int) -> dict[str, tuple[int, int]]:
        """Where a panel's parts lie: name to (first byte, bytes)."""
        if self.floating:
            return {"values": (0, _ceil(cols, TILE) * TILE * ROWS * 2)}
        chunks, blocks = _ceil(cols, CHUNK), _ceil(cols, BLOCK)
        if self.own:
            sizes = {"row_scales": 4 * ROWS, "codes": blocks * ROWS}
            sizes |= {"multipliers": chunks * ROWS, "signs": chunks * 4} if self.bits == 4 else {}
        else:
            groups = _ceil(chunks * CHUNK, self.group)
            sizes = {"scales": 2 * groups * ROWS}
            sizes |= {"minimums": 4 * groups * ROWS} if self.has_min else {}
        at, parts = 0, {}
        for name, size in sizes.items():
            parts[name] = (at, size)
            at += size
        return parts | {"values": (_ceil(at, 64) * 64, chunks * CHUNK * ROWS * self.bits // 8)}

    def panel_bytes(self, cols: int) -> int:
        key = self.name, self.group, cols
        if key not in _PANEL_BYTES:
            _PANEL_BYTES[key] = sum(self.parts(cols)["values"])
        return _PANEL_BYTES[key]

    def shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Of the uint8 tensor that holds a rows x cols matrix: [panels, bytes of a panel]."""
        return _ceil(rows, ROWS), self.panel_bytes(cols)


BF16, INT8, INT4 = Packing("bf16"), Packing("int8"), Packing("int4")
OWN = {"bf16": BF16, "int8": INT8, "int4": INT4}


def grouped_packing(bits: int, group: int, scale_dtype: torch.dtype, has_min: bool) -> Packing:
    """The format of another tool's integers.

    Raises:
        InputError: bits other than 4 and 8, groups other than 32, 64 and 128, scales other than float16 and bfloat16.
    """
    if bits not in (4, 8) or group not in (32, 64, 128) or scale_dtype not in _SCALE_CODES:
        raise InputError(
            "grouped weights have 4 or 8 bits, groups of 32, 64 or 128 and float16 or bfloat16 scales;"
            f" got {bits} bits, groups of {group}, {scale_dtype}"
        )
    return Packing(f"grouped{bits}" + "_min" * has_min, group, scale_dtype)


def put_part(panels: Tensor, part: tuple[int, int], content_nX: Tensor) -> None:
    """Write a part of all panels [n, bytes]: content [n, ...] of any dtype, as bytes."""
    at, size = part
    panels[:, at : at + size] = content_nX.contiguous().flatten(1).view(torch.uint8)


def get_part(panels: Tensor, part: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A part of all panels as [n, elements] of `dtype`, copied."""
    at, size = part
    return panels[:, at : at + size].contiguous().view(dtype)


def to_panels(values_NK: Tensor, bits: int) -> Tensor:
    """int16 values (of 4 bits: 0..15; of 16: bfloat16's bits) to the bytes of panels [n, bytes]; rows and columns are
    padded by the caller."""
    width = 2 if bits == 16 else 4
    quads = values_NK.unflatten(0, (-1, ROWS)).unflatten(2, (-1, width))  # n, row, quad (or pair) of k, k
    quads = quads.transpose(1, 2)  # n, quad, row, k
    if bits == 16:
        return quads.contiguous().view(torch.uint8).flatten(1)
    if bits == 8:
        return quads.to(torch.int8).contiguous().view(torch.uint8).flatten(1)
    return (quads[:, 0::2] | quads[:, 1::2] << 4).to(torch.uint8).flatten(1)


def from_panels(bytes_nX: Tensor, bits: int) -> Tensor:
    """The inverse of `to_panels`: int16 values [16·n, padded K]."""
    if bits == 16:
        quads = bytes_nX.view(torch.int16).unflatten(1, (-1, ROWS, 2))
    elif bits == 8:
        quads = bytes_nX.view(torch.int8).unflatten(1, (-1, ROWS, 4)).short()
    else:
        pairs = bytes_nX.unflatten(1, (-1, ROWS, 4)).short()
        quads = torch.stack([pairs & 15, pairs >> 4], dim=2).flatten(1, 2)
    return quads.transpose(1, 2).flatten(2).flatten(0, 1)


def pad_to(x_NK: Tensor, rows: int, cols: int) -> Tensor:
    """Zeros behind the rows and columns up to multiples of these."""
    return F.pad(x_NK, (0, -x_NK.shape[1] % cols, 0, -x_NK.shape[0] % rows))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
