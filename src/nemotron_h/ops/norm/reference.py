"""RMSNorm in PyTorch: the specification. Differentiable; any device, `meta` included."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from nemotron_h.errors import InputError


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `nemotron_h.ops.norm.rms_norm`."""
    if weight.shape != x.shape[-1:]:
        raise InputError(f"rms_norm: x {list(x.shape)} needs a weight {list(x.shape[-1:])}, got {list(weight.shape)}.")
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    return (weight.to(dtype) * wide * _inverse_rms(wide, eps)).to(x.dtype)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, n_groups: int) -> Tensor:
    """See `nemotron_h.ops.norm.gated_rms_norm`."""
    if y.shape != z.shape or weight.shape != y.shape[-1:]:
        raise InputError(
            f"gated_rms_norm: y, z and weight must be [..., I], [..., I] and [I], "
            f"got {list(y.shape)}, {list(z.shape)} and {list(weight.shape)}."
        )
    if n_groups < 1 or y.shape[-1] % n_groups:
        raise InputError(f"gated_rms_norm: {y.shape[-1]} channels do not split into {n_groups} equal groups.")
    dtype = torch.promote_types(torch.promote_types(y.dtype, z.dtype), torch.float32)
    u = (y.to(dtype) * silu(z.to(dtype))).unflatten(-1, (n_groups, -1))
    normal = (u * _inverse_rms(u, eps)).flatten(-2)
    return (weight.to(dtype) * normal).to(z.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
