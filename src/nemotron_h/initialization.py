"""Weights from scratch (numerics.md, "Initialization"): one rule per tensor, for models and for files without one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import initialization as init


@torch.no_grad()
def initialize(name: str, tensor: Tensor, config: Any, generator: torch.Generator | None = None) -> None:
    """Fill one parameter or buffer in place, in its own dtype and on its device.

    A tensor that transformers has flagged as loaded (`_is_hf_initialized`) stays as it is.

    Args:
        name: Dotted name in any spelling; the last two parts decide (`dt_bias`, `conv1d.weight`, `out_proj.weight`).
        config: Anything with the fields of a configuration.
        generator: Source of the random numbers; default torch's own.
    """
    if getattr(tensor, "_is_hf_initialized", False):
        return
    leaf = name.rpartition(".")[2]
    if leaf == "A_log":
        heads = torch.arange(1, tensor.shape[0] + 1, dtype=torch.float32, device=tensor.device)
        init.copy_(tensor, heads.log())
    elif leaf == "D":
        init.ones_(tensor)
    elif leaf == "dt_bias":
        _draw_dt_bias(tensor, config, generator)
    elif leaf.endswith("bias"):
        init.zeros_(tensor)
    elif tensor.dim() == 1:
        init.ones_(tensor)
    elif name.endswith("conv1d.weight"):
        init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    elif name.endswith("out_proj.weight") and config.rescale_prenorm_residual:
        init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
        tensor.div_(math.sqrt(len(config.layers_block_type)))
    else:
        init.normal_(tensor, mean=0.0, std=config.initializer_range, generator=generator)


def _draw_dt_bias(tensor: Tensor, config: Any, generator: torch.Generator | None) -> None:
    """Inverse softplus of a log-uniform time step, so that softplus(dt_bias) is that step."""
    low, high = math.log(config.mamba_dt_min), math.log(config.mamba_dt_max)
    uniform = torch.rand(tensor.shape, dtype=torch.float32, device=tensor.device, generator=generator)
    step = torch.exp(uniform * (high - low) + low).clamp(min=config.mamba_dt_init_floor)
    init.copy_(tensor, step + torch.log(-torch.expm1(-step)))
