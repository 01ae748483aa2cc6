"""`NemotronHPreTrainedModel`: declarations for transformers, and initialization from scratch."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from nemotron_h import family
from nemotron_h.configuration import NemotronHConfig
from nemotron_h.errors import ConfigError
from nemotron_h.loading import Loading


class NemotronHPreTrainedModel(Loading):
    """Base of the trunk and the language model."""

    config_class = NemotronHConfig
    config: NemotronHConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NemotronHBlock"]  # noqa: RUF012 (transformers' own declaration)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012

    def __init__(self, config: NemotronHConfig, *inputs: Any, **kwargs: Any) -> None:
        if not isinstance(config, NemotronHConfig):
            raise ConfigError(
                f"{type(self).__name__} needs a nemotron_h.NemotronHConfig, got {type(config).__module__}."
                f"{type(config).__name__}; NemotronHConfig.from_dict(config.to_dict()) converts"
            )
        config.validate()
        _check_memory(config)
        super().__init__(config, *inputs, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialization from scratch (numerics.md, "Initialization"); loaded weights are flagged and stay."""
        std = self.config.initializer_range
        for name, parameter in module.named_parameters(recurse=False):
            if name in _SPECIAL:
                _SPECIAL[name](parameter, self.config)
            elif name.endswith("bias"):
                init.zeros_(parameter)
            elif parameter.dim() == 1:
                init.ones_(parameter)
            elif not isinstance(module, nn.Conv1d):
                init.normal_(parameter, mean=0.0, std=std)
            else:
                init.kaiming_uniform_(parameter, a=math.sqrt(5))
        for name, buffer in module.named_buffers(recurse=False):
            if name == "e_score_correction_bias":
                init.zeros_(buffer)
        if self.config.rescale_prenorm_residual and hasattr(module, "A_log"):
            self._rescale(module.out_proj.weight)

    def _rescale(self, weight: Tensor) -> None:
        if not getattr(weight, "_is_hf_initialized", False):
            init.kaiming_uniform_(weight, a=math.sqrt(5))
            weight.div_(math.sqrt(self.config.num_hidden_layers))


def _draw_dt_bias(parameter: Tensor, config: NemotronHConfig) -> None:
    """Inverse softplus of a log-uniform time step, so that softplus(dt_bias) is that step."""
    low, high = math.log(config.mamba_dt_min), math.log(config.mamba_dt_max)
    step = torch.exp(torch.rand_like(parameter, dtype=torch.float32) * (high - low) + low)
    step = step.clamp(min=config.mamba_dt_init_floor)
    init.copy_(parameter, step + torch.log(-torch.expm1(-step)))


def _count_heads(parameter: Tensor, config: NemotronHConfig) -> None:
    heads = torch.arange(1, parameter.shape[0] + 1, dtype=torch.float32, device=parameter.device)
    init.copy_(parameter, heads.log())


_SPECIAL = {
    "A_log": _count_heads,
    "D": lambda parameter, config: init.ones_(parameter),
    "dt_bias": _draw_dt_bias,
}


def _check_memory(config: NemotronHConfig) -> None:
    """Refuse from arithmetic what could not be allocated, before anything is."""
    if torch.empty(0).is_meta:
        return
    dtype = torch.get_default_dtype()
    needed = family.count(config).total * dtype.itemsize if _countable(config) else 0
    free = _available_memory()
    if needed > free:
        raise ConfigError(
            f"this model needs {_human(needed)} in {str(dtype).removeprefix('torch.')}, {_human(free)} are free; build it"
            " under torch.device('meta') to look at it, or take a smaller one"
        )


def _countable(config: NemotronHConfig) -> bool:
    return all(family.BLOCKS[name].tensors is not None for name in config.layers_block_type)


def _available_memory() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _human(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}"
        size /= 1000
    raise AssertionError
