"""Our own bf16, int8 and int4 in PyTorch, to the same bytes as csrc/kernels/pack.cpp, which says why.

int8: w = row · block · q, q in -127..127; int4: w = row · block · ±multiplier · q, q in -8..7. row is a power of two
per row, block a code of one byte per 128 columns, `(1 + (c & 15)/16) · 2^((c >> 4) - 15)`, the multiplier 1..15 with
its sign per 32 columns. bf16: w to the nearest, in another order.

Letters: N rows · K columns, padded to whole blocks · n panels · b blocks · g groups of 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_h.quantization.layout import (
    BLOCK,
    CHUNK,
    GROUP,
    ROWS,
    TILE,
    Packing,
    from_panels,
    get_part,
    pad_to,
    put_part,
    to_panels,
)

_MOST = {8: 1.0 / 127.0, 4: 1.0 / 112.5}  # int4: 15 · 7.5
_BASE = 112 << 23  # the bits of code 0's value, 2^-15


def pack(w_NK: Tensor, packing: Packing) -> Tensor:
    """Panels [n, bytes] of finite weights, by way of float32."""
    if packing.floating:
        return to_panels(pad_to(bf16_bits(w_NK.float()), ROWS, TILE), packing.bits)
    rows, cols = w_NK.shape
    w_NK = pad_to(w_NK.float(), ROWS, BLOCK)
    w_NbX = w_NK.unflatten(1, (-1, BLOCK))
    wanted_Nb = w_NbX.abs().amax(-1) * w_NK.new_tensor(_MOST[packing.bits])
    row_N = _row_scale(wanted_Nb.amax(-1))
    code_Nb = _code_above(wanted_Nb / row_N[:, None])
    scale_Nb = row_N[:, None] * code_values(code_Nb)
    panels = torch.zeros(packing.shape(rows, cols), dtype=torch.uint8, device=w_NK.device)
    parts, chunks = packing.parts(cols), -(-cols // CHUNK)
    put_part(panels, parts["row_scales"], row_N.unflatten(0, (-1, ROWS)))
    put_part(panels, parts["codes"], _by_panel(code_Nb.to(torch.uint8)))
    if packing.bits == 8:
        q_NK = _nearest(w_NbX, scale_Nb[..., None], 127, -127).flatten(1)
    else:
        multiplier_Ng, q_NK = _search(w_NK.unflatten(1, (-1, GROUP)), scale_Nb.repeat_interleave(4, dim=1))
        pairs = (multiplier_Ng.abs()[:, 0::2] | multiplier_Ng.abs()[:, 1::2] << 4)[:, :chunks]
        put_part(panels, parts["multipliers"], _by_panel(pairs.to(torch.uint8)))
        put_part(panels, parts["signs"], _bits(_by_panel(multiplier_Ng < 0)[:, : 2 * chunks]))
        q_NK = q_NK + 8
    put_part(panels, parts["values"], to_panels(q_NK[:, : chunks * CHUNK].short(), packing.bits))
    return panels


def unpack(panels: Tensor, packing: Packing, rows: int, cols: int) -> Tensor:
    """float32 [rows, cols], exactly what the bytes mean."""
    parts = packing.parts(cols)
    if packing.floating:
        return from_panels(panels, packing.bits).view(torch.bfloat16).float()[:rows, :cols]
    row_N = get_part(panels, parts["row_scales"], torch.float32).flatten()
    code_Nb = _by_row(get_part(panels, parts["codes"], torch.uint8))
    q_NK = from_panels(get_part(panels, parts["values"], torch.uint8), packing.bits).float()
    scale_NK = code_values(code_Nb.int()).repeat_interleave(BLOCK, dim=1)[:, : q_NK.shape[1]]
    if packing.bits == 4:
        pairs = _by_row(get_part(panels, parts["multipliers"], torch.uint8))
        size_Ng = torch.stack([pairs & 15, pairs >> 4], dim=2).flatten(1).int()
        negative_Ng = _by_row(_from_bits(get_part(panels, parts["signs"], torch.uint8)))
        multiplier_Ng = torch.where(negative_Ng, -size_Ng, size_Ng)
        q_NK = (q_NK - 8) * multiplier_Ng.repeat_interleave(GROUP, dim=1)
    return (q_NK * scale_NK * row_N[:, None])[:rows, :cols]


def bf16_bits(w: Tensor) -> Tensor:
    """int16: float32 as bfloat16, to the nearest and ties to even. By integers: some instructions lose subnormals."""
    bits = w.contiguous().view(torch.int32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).short()


def holds(w: Tensor, packing: Packing) -> bool:
    """Whether a format can hold these weights: no infinities or NaNs, before or, in bf16, after rounding."""
    finite = bool(w.isfinite().all())
    return finite and not (packing.floating and bool((bf16_bits(w.float()) & 0x7F80 == 0x7F80).any()))


def code_values(code: Tensor) -> Tensor:
    """The scales that codes stand for."""
    return ((code.int() << 19) + _BASE).view(torch.float32)


def _row_scale(most_N: Tensor) -> Tensor:
    """The power of two by which `most` becomes at most 1 + 15/16, but not below 2^-100."""
    exponent = (most_N.contiguous().view(torch.int32) + (1 << 19) - 1) >> 23
    return (exponent.clamp(27, 254) << 23).view(torch.float32)


def _code_above(a: Tensor) -> Tensor:
    """The least codes whose values are at least `a`."""
    above = (a.contiguous().view(torch.int32) - _BASE + (1 << 19) - 1) >> 19
    return torch.where(a > 2.0**-15, above, 0)


def _nearest(w: Tensor, step: Tensor, high: int, low: int) -> Tensor:
    return (w * (1.0 / step)).clamp(low, high).round()


def _search(w_NgX: Tensor, scale_Ng: Tensor) -> tuple[Tensor, Tensor]:
    """The multiplier of each group of 32 and its values [N, K]: the least squared error among the candidates."""
    ratio = w_NgX.abs().amax(-1) / scale_Ng
    last = (ratio * ratio.new_tensor(1.0 / 7.0)).ceil().clamp(1, 15)
    first = (ratio * ratio.new_tensor(1.0 / 9.0)).ceil().clamp(1, 15)
    best, least, values = torch.zeros_like(ratio), torch.zeros_like(ratio), torch.zeros_like(w_NgX)
    for m in [sign * size for size in range(1, 16) for sign in (1, -1)]:
        step = (scale_Ng * m)[..., None]
        q_NgX = _nearest(w_NgX, step, 7, -8)
        error = _sum_of_squares(w_NgX - q_NgX * step)
        better = (first <= abs(m)) & (abs(m) <= last) & ((best == 0) | (error < least))
        best, least = torch.where(better, m, best), torch.where(better, error, least)
        values = torch.where(better[..., None], q_NgX, values)
    return best.int(), values.flatten(1)


def _sum_of_squares(d_NgX: Tensor) -> Tensor:
    """Of 32 values, in the order of the kernel's lanes."""
    total = d_NgX[..., :16].square() + d_NgX[..., 16:].square()
    for half in (8, 4, 2, 1):
        total = total[..., :half] + total[..., half : 2 * half]
    return total[..., 0]


def _bits(set_ngR: Tensor) -> Tensor:
    """Booleans [n, g, 16] to two bytes each, the first row lowest."""
    weights = 1 << torch.arange(8, device=set_ngR.device)
    return (set_ngR.unflatten(2, (2, 8)) * weights).sum(-1).to(torch.uint8)


def _from_bits(bytes_nX: Tensor) -> Tensor:
    """The inverse of `_bits`, [n, g·16]."""
    weights = 1 << torch.arange(8, device=bytes_nX.device, dtype=torch.uint8)
    return ((bytes_nX[..., None] & weights) != 0).flatten(1)


def _by_panel(x_NX: Tensor) -> Tensor:
    """[N, X] to [n, X, 16]: what a panel holds per X stands together for its rows."""
    return x_NX.unflatten(0, (-1, ROWS)).transpose(1, 2)


def _by_row(x_nX: Tensor) -> Tensor:
    """The inverse of `_by_panel` for [n, X·16]."""
    return x_nX.unflatten(1, (-1, ROWS)).transpose(1, 2).flatten(0, 1)
