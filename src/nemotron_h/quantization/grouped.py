"""Integers with a scale per group of columns, as other tools write them, kept exactly.

`w = scale · q` with q in -8..7 (4 bits) or -128..127 (8 bits), or with a minimum `w = scale · q + minimum`, q then
0..15 in 4 bits. Zero points are minimums of -scale · zero, exact in float32.

Letters: N rows · K columns · g groups of K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_h.errors import InputError
from nemotron_h.quantization.layout import (
    CHUNK,
    ROWS,
    Packing,
    from_panels,
    get_part,
    pad_to,
    put_part,
    to_panels,
)


def pack(q_NK: Tensor, scales_Ng: Tensor, packing: Packing, minimums_Ng: Tensor | None = None) -> Tensor:
    """Panels [n, bytes] of integers and their scales.

    Raises:
        InputError: shapes that do not fit, integers outside the range, scales that the format's dtype cannot hold.
    """
    rows, cols = q_NK.shape
    _check(q_NK, scales_Ng, packing, minimums_Ng)
    panels = torch.zeros(packing.shape(rows, cols), dtype=torch.uint8, device=q_NK.device)
    parts = packing.parts(cols)
    offset = 8 if packing.bits == 4 and not packing.has_min else 0
    put_part(panels, parts["values"], to_panels(pad_to(q_NK.short(), ROWS, CHUNK) + offset, packing.bits))
    of_a_chunk = max(1, CHUNK // packing.group)  # groups beyond the last column are there, and zero
    put_part(panels, parts["scales"], _by_panel(pad_to(scales_Ng.to(packing.scale_dtype), ROWS, of_a_chunk)))
    if minimums_Ng is not None:
        put_part(panels, parts["minimums"], _by_panel(pad_to(minimums_Ng.float(), ROWS, of_a_chunk)))
    return panels


def unpack(panels: Tensor, packing: Packing, rows: int, cols: int) -> Tensor:
    """float32 [rows, cols], exactly what the bytes mean."""
    parts = packing.parts(cols)
    q_NK = from_panels(get_part(panels, parts["values"], torch.uint8), packing.bits).float()

    def per_column(name: str, dtype: torch.dtype) -> Tensor:
        of_NG = get_part(panels, parts[name], dtype).unflatten(1, (-1, ROWS)).transpose(1, 2).flatten(0, 1)
        return of_NG.float().repeat_interleave(packing.group, dim=1)[:, : q_NK.shape[1]]

    scale_NK = per_column("scales", packing.scale_dtype)
    if packing.has_min:
        w_NK = q_NK * scale_NK + per_column("minimums", torch.float32)
    else:
        w_NK = (q_NK - (8 if packing.bits == 4 else 0)) * scale_NK
    return w_NK[:rows, :cols]


def _check(q_NK: Tensor, scales_Ng: Tensor, packing: Packing, minimums_Ng: Tensor | None) -> None:
    rows, cols = q_NK.shape
    groups = (rows, -(-cols // packing.group))
    for name, tensor in (("scales", scales_Ng), ("minimums", minimums_Ng)):
        if tensor is not None and tuple(tensor.shape) != groups:
            raise InputError(f"{packing.name}: {name} must be {list(groups)}, got {list(tensor.shape)}")
    if packing.has_min != (minimums_Ng is not None):
        raise InputError(f"{packing.name}: " + ("needs minimums" if packing.has_min else "has no minimums"))
    if not torch.equal(scales_Ng.to(packing.scale_dtype).double(), scales_Ng.double()):
        raise InputError(f"{packing.name}: the scales are not exact in {packing.scale_dtype}")
    low, high = (
        (0, 15) if packing.has_min and packing.bits == 4 else (-(2 ** (packing.bits - 1)), 2 ** (packing.bits - 1) - 1)
    )
    if q_NK.numel() and (int(q_NK.min()) < low or int(q_NK.max()) > high):
        raise InputError(f"{packing.name}: integers must lie in {low}..{high}")


def _by_panel(x_NX: Tensor) -> Tensor:
    return x_NX.unflatten(0, (-1, ROWS)).transpose(1, 2)
