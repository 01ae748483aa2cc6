"""Packing weights: rows of a matrix to panels, at the speed of memory where there is a kernel.

Letters: N rows · K columns · n panels of 16 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_h.errors import CheckpointError, InputError
from nemotron_h.ops import _native, settings, threads
from nemotron_h.quantization import Packing, own

_HUGE = 2 << 20  # bytes of a huge page
SLICE = 1 << 20  # elements that are widened to float32 at a time: what packing needs beside source and target


def pack_into(panels: Tensor, w_NK: Tensor, packing: Packing, where: str = "weight") -> None:
    """Write a float matrix [N, K] into uint8 panels [n, bytes]. The kernel and PyTorch write the same bytes.

    Raises:
        CheckpointError: `where` holds infinities or NaNs, or, in bf16, values that round to infinity.
        InputError: panels that are not those of w, or a w without rows or columns.
    """
    if w_NK.dim() != 2 or w_NK.numel() == 0 or not w_NK.is_floating_point():
        raise InputError(f"{where}: only float matrices [N, K] are packed, got {list(w_NK.shape)} of {w_NK.dtype}")
    if panels.dtype != torch.uint8 or panels.shape != packing.shape(*w_NK.shape):
        needed, got = list(packing.shape(*w_NK.shape)), f"{list(panels.shape)} of {panels.dtype}"
        raise InputError(f"{where}: {packing.name} of {list(w_NK.shape)} needs panels {needed} of uint8, got {got}")
    elements = SLICE if _has_kernel() else SLICE // 16  # PyTorch needs some thirty intermediate results
    step = max(16, elements // w_NK.shape[1] // 16 * 16)
    for first in range(0, w_NK.shape[0], step):
        part_NK = w_NK[first : first + step].detach()
        _pack(panels[first // 16 : (first + step) // 16], part_NK.to("cpu", torch.float32), packing, where)


def _has_kernel() -> bool:
    return _native.load() is not None and settings.current().impl != "reference"


def _pack(panels: Tensor, w_NK: Tensor, packing: Packing, where: str) -> None:
    if _has_kernel() and panels.is_cpu and panels.is_contiguous():
        threads.sync()
        w_NK, (rows, cols) = w_NK.contiguous(), w_NK.shape
        finite = _native.kernels().pack(w_NK.data_ptr(), rows, cols, packing.code, panels.data_ptr())
    else:
        finite = own.holds(w_NK, packing)
        if finite:
            panels.copy_(own.pack(w_NK, packing))
    if not finite:
        raise CheckpointError(
            f"{where} holds infinities or NaNs, which {packing.name} has no values for: the checkpoint is damaged"
        )


def empty_panels(shape: tuple[int, ...]) -> Tensor:
    """Memory for packed weights on the CPU, in pages of 2 MiB where the system has them: a third faster to read."""
    panels = torch.empty(shape, dtype=torch.uint8)
    advise_huge_pages(panels)
    return panels


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask for pages of 2 MiB below a tensor that nobody has written to yet. No effect where the system has none."""
    module = _native.load() if tensor.numel() >= _HUGE else None
    if module is not None and tensor.is_cpu and type(tensor) is Tensor:
        module.advise_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())
