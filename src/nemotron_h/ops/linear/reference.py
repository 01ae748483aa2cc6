"""Linear layers in PyTorch: the specification. Differentiable in x and bias; any device, `meta` included.

Letters: N output width · K input width · b blocks of 128 columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron_h.ops.activations import activation as by_name
from nemotron_h.quantization import Packing, unpack
from nemotron_h.quantization.layout import BLOCK


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, activation: str, wide: bool) -> Tensor:
    """See `nemotron_h.ops.linear.linear`."""
    return _finished(F.linear(x, weight_NK, bias_N), activation, wide)


def _finished(y: Tensor, activation: str, wide: bool) -> Tensor:
    y = y if activation == "identity" else by_name(activation)(y)
    return y.to(torch.promote_types(y.dtype, torch.float32)) if wide else y


def packed_linear(
    x: Tensor, packed: Tensor, packing: Packing, out_features: int, bias_N: Tensor | None, arithmetic: str,
    activation: str, wide: bool,
) -> Tensor:  # fmt: skip
    """See `nemotron_h.ops.linear.packed_linear`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if packed.is_meta:
        return _finished(x.new_empty(*x.shape[:-1], out_features), activation, wide)
    weight_NK = unpack(packed, packing, out_features, x.shape[-1]).to(dtype)
    exact = x.to(dtype)
    y = F.linear(seen(packing, arithmetic)(exact), weight_NK)
    return _finished((y if bias_N is None else y + bias_N.to(dtype)).to(x.dtype), activation, wide)


def seen(packing: Packing, arithmetic: str) -> Callable[[Tensor], Tensor]:
    """What becomes of activations that meet packed weights."""
    return rounded if arithmetic == "int8" and not packing.floating else lambda x: x


def rounded(x: Tensor) -> Tensor:
    """x [..., K] as the integer arithmetic sees it: blocks of 128 as int8 with one scale. Its gradient is x's."""
    cols = x.shape[-1]
    blocks = F.pad(x, (0, -cols % BLOCK)).unflatten(-1, (-1, BLOCK))
    top = blocks.detach().abs().amax(-1, keepdim=True)
    inverse = torch.where(top > 1e-36, 127.0 / top, 0)
    q = (blocks.detach() * inverse).clamp(-127, 127).round()
    scaled = torch.where(top.isfinite(), q * (top * (1.0 / 127.0)), torch.nan).flatten(-2)[..., :cols]
    return x + (scaled - x).detach() if x.requires_grad else scaled
