"""Blocks as the C++ kernels read them: addresses and sizes, filled once, then used for every token.

Nothing here holds a tensor: who prepares a block answers for its memory (nemotron_h.steps).

Letters: B batch · T tokens · D hidden size · C conv channels · W = taps - 1 · H heads · P head size · N state size.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemotron_h.ops import _native, threads
from nemotron_h.ops.dispatch import DTYPE_CODES
from nemotron_h.ops.linear.native import scratch
from nemotron_h.ops.mamba_step.native import addresses

MOST_ROWS = 32  # of x, in all


class Matrix(NamedTuple):
    """A linear layer; csrc/blocks.h: Matrix. Codes as in csrc/kernels.h."""

    data: int = 0
    format: int = 0
    stride: int = 0
    rows: int = 0
    cols: int = 0
    group: int = 0
    scale_type: int = 0
    arithmetic: int = 0
    bias: int = 0
    bias_dtype: int = 0


class Norm(NamedTuple):
    """csrc/blocks.h: BlockNorm."""

    weight: int
    dtype: int
    size: int
    eps: float


class _Block:
    """One struct of csrc/blocks.h and the scratch that its step takes."""

    scratch_of: str

    def __init__(self, *fields: Any) -> None:
        self._memory = array("Q", map(_bits, _flat(fields)))
        self.address = self._memory.buffer_info()[0]
        sizes: Callable[[int, int], int] = getattr(_native.extension(), self.scratch_of)
        self._scratch = sizes(self.address, MOST_ROWS)

    def _out(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for the output, and scratch, which must live until the kernel returns."""
        threads.sync()
        return torch.empty_like(x_BTD), scratch(self._scratch)


class MambaBlock(_Block):
    """Fields: Norm; in_proj, out_proj; addresses of conv_weight, conv_bias, dt_bias, A_log, D, norm_weight; their
    dtypes; H, P, G, N, K; low, high, eps."""

    scratch_of = "mamba_block_scratch"

    def __init__(self, channels: int, window: int, *fields: Any) -> None:
        super().__init__(*fields)
        self._channels, self._window = channels, window

    def step(
        self, x_BTD: Tensor, window_BCW: Tensor, state_BHPN: Tensor, out_state: Tensor, recorded: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """(output [B, T, D], window); the final state goes to `out_state`, and what is recorded to `recorded`, empty or
        from `record_buffers`."""
        batch, tokens, _ = x_BTD.shape
        out_BTD, work = self._out(x_BTD)
        window_BWC = x_BTD.new_empty(batch, self._window, self._channels)
        _native.kernels().mamba_block(
            self.address, x_BTD.data_ptr(), DTYPE_CODES[x_BTD.dtype], batch, tokens, window_BCW.data_ptr(),
            *window_BCW.stride(), state_BHPN.data_ptr(), DTYPE_CODES[state_BHPN.dtype], out_state.data_ptr(),
            DTYPE_CODES[out_state.dtype], window_BWC.data_ptr(), out_BTD.data_ptr(),
            *addresses(recorded), work.data_ptr(),
        )  # fmt: skip
        return out_BTD, window_BWC.transpose(1, 2)


class AttentionBlock(_Block):
    """Fields: Norm; q, k, v, o. Its step comes in two: between them the cache and attention itself."""

    scratch_of = "attention_block_scratch"

    def __init__(self, widths: tuple[int, ...], *fields: Any) -> None:
        super().__init__(*fields)
        self._widths = widths

    def inputs(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the normed x, each [B, T, its width]."""
        batch, tokens, _ = x_BTD.shape
        q, k, v = (x_BTD.new_empty(batch, tokens, width) for width in self._widths)
        threads.sync()
        work = scratch(self._scratch)
        _native.kernels().attention_inputs(
            self.address, x_BTD.data_ptr(), DTYPE_CODES[x_BTD.dtype], batch * tokens, q.data_ptr(), k.data_ptr(),
            v.data_ptr(), work.data_ptr(),
        )  # fmt: skip
        return q, k, v

    def output(self, x_BTD: Tensor, heads: Tensor) -> Tensor:
        """x plus the projection of the heads' outputs [B, T, Q·d], contiguous."""
        out_BTD, work = self._out(x_BTD)
        _native.kernels().attention_output(
            self.address, x_BTD.data_ptr(), heads.data_ptr(), DTYPE_CODES[x_BTD.dtype],
            x_BTD.shape[0] * x_BTD.shape[1], out_BTD.data_ptr(), work.data_ptr(),
        )  # fmt: skip
        return out_BTD


class MlpBlock(_Block):
    """Fields: Norm; up, down, of which up is followed by relu²."""

    scratch_of = "mlp_block_scratch"

    def step(self, x_BTD: Tensor) -> Tensor:
        out_BTD, work = self._out(x_BTD)
        rows = x_BTD.shape[0] * x_BTD.shape[1]
        dtype = DTYPE_CODES[x_BTD.dtype]
        _native.kernels().mlp_block(self.address, x_BTD.data_ptr(), dtype, rows, out_BTD.data_ptr(), work.data_ptr())
        return out_BTD


class MoeBlock(_Block):
    """Fields: Norm; the router's weight, bias, dtype, E, top_k, n_group, topk_group, norm_topk_prob, scaling factor;
    the experts' up, down, their biases, bytes from one to the next, format, group, scale type, arithmetic, L, F; fc1,
    fc2, shared up and down, each an empty Matrix where the model has none."""

    scratch_of = "moe_block_scratch"

    def step(self, x_BTD: Tensor) -> Tensor:
        out_BTD, work = self._out(x_BTD)
        rows = x_BTD.shape[0] * x_BTD.shape[1]
        dtype = DTYPE_CODES[x_BTD.dtype]
        _native.kernels().moe_block(self.address, x_BTD.data_ptr(), dtype, rows, out_BTD.data_ptr(), work.data_ptr())
        return out_BTD


def _flat(fields: Any) -> Iterator[Any]:
    for field in fields:
        if isinstance(field, tuple):
            yield from _flat(field)
        else:
            yield field


def _bits(field: float) -> int:
    return struct.unpack("=Q", struct.pack("=d", field))[0] if isinstance(field, float) else int(field)
