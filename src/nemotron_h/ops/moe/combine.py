"""The last step of every implementation: experts' outputs to one row per token.

Letters: M tokens · k experts per token · V = M·k visits · L width.
"""

import torch
from torch import Tensor


def weighted_sum(y_VL: Tensor, weights_Mk: Tensor) -> Tensor:
    """`Σ_k w·y` of visits in token order, in float32 and in the order of the ids."""
    y_MkL = y_VL.unflatten(0, weights_Mk.shape)
    dtype = torch.promote_types(y_VL.dtype, torch.float32)
    return (weights_Mk.to(dtype)[..., None] * y_MkL.to(dtype)).sum(1)
