"""Packing and unpacking of whole tensors: a matrix, or a stack of them (experts).

Letters: E matrices of a stack · N rows · K columns · n panels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_h.errors import InputError
from nemotron_h.quantization import grouped, own
from nemotron_h.quantization.layout import Packing


def pack(w_NK: Tensor, packing: Packing) -> Tensor:
    """Our own bf16, int8 or int4 of a matrix [N, K]: uint8 [n, bytes of a panel].

    Raises:
        InputError: no matrix, no rows or columns, not floating, not finite (after rounding); another tool's format.
    """
    if not packing.own:
        raise InputError(f"{packing.name} holds integers of other tools: use quantization.grouped.pack")
    if w_NK.dim() != 2 or 0 in w_NK.shape or not w_NK.is_floating_point():
        raise InputError(
            f"only float matrices with rows and columns are packed, got {list(w_NK.shape)} of {w_NK.dtype}"
        )
    if not own.holds(w_NK, packing):
        raise InputError(f"the weights hold infinities or NaNs, which {packing.name} has no values for")
    return own.pack(w_NK, packing)


def unpack(packed: Tensor, packing: Packing, rows: int, cols: int) -> Tensor:
    """float32 [N, K] of panels [n, bytes], or [E, N, K] of a stack of them."""
    if packed.shape[-2:] != packing.shape(rows, cols):
        raise InputError(
            f"{packing.name} of {rows} x {cols} must be uint8 {list(packing.shape(rows, cols))},"
            f" got {list(packed.shape)}"
        )
    if packed.dim() == 3:
        return torch.stack([unpack(matrix, packing, rows, cols) for matrix in packed])
    return own.unpack(packed, packing, rows, cols) if packing.own else grouped.unpack(packed, packing, rows, cols)
