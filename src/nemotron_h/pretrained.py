"""`NemotronHPreTrainedModel`: declarations for transformers, and initialization from scratch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nemotron_h import family
from nemotron_h.configuration import NemotronHConfig
from nemotron_h.errors import ConfigError
from nemotron_h.initialization import initialize
from nemotron_h.linears import pack_modules
from nemotron_h.loading import Loading
from nemotron_h.quantization import Scheme, is_packed, scheme


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

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        """transformers' hook. Never reentrant, also when asked for: that form would silently cut the gradients of what
        blocks record beside their output, such as the router losses; everything else is the same in both."""
        func = gradient_checkpointing_func
        if isinstance(func, partial) and func.keywords.get("use_reentrant"):
            func = partial(func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, func, **kwargs)

    def quantize(self, quantization: str | Mapping[str, Any] | Scheme) -> None:
        """Pack the weights in place, module by module: "bf16", "int8" or "int4". Raises `ConfigError` for another
        name, or if they are packed already."""
        if is_packed(getattr(self.config, "quantization_config", None)):
            raise ConfigError("the weights are packed already; load the model without quantization to pack it anew")
        self.config.quantization_config = scheme(quantization).to_dict()
        self._pack()

    def _pack(self) -> None:
        """Put packed modules where the config asks for them. An output layer that is the embedding matrix stays."""
        quantization = getattr(self.config, "quantization_config", None)
        if is_packed(quantization):
            pack_modules(
                self,
                scheme(cast(Any, quantization)),
                ("mtp.", "lm_head.") if self.config.tie_word_embeddings else ("mtp.",),
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialization from scratch (numerics.md, "Initialization"); loaded weights are flagged and stay.

        Modules of a user's own block have initialized their parameters themselves; the linears in them are drawn here.
        """
        if not any(_is_known(cls) for cls in type(module).__mro__) or hasattr(module, "packed_shapes"):
            return
        prefix = "conv1d." if isinstance(module, nn.Conv1d) else ""
        for name, parameter in module.named_parameters(recurse=False):
            initialize(prefix + name, parameter, self.config)
        for name, buffer in module.named_buffers(recurse=False):
            if name == "e_score_correction_bias":
                initialize(name, buffer, self.config)
        if self.config.rescale_prenorm_residual and hasattr(module, "A_log"):
            # Drawn once more: as a linear of its own it did not know that it belongs to a Mamba mixer.
            initialize("out_proj.weight", cast(Any, module.out_proj).weight, self.config)


def _is_known(cls: type) -> bool:
    return cls is not nn.Module and cls.__module__.startswith(("nemotron_h.", "torch.nn."))


def _check_memory(config: NemotronHConfig) -> None:
    """Refuse from arithmetic what could not be allocated, before anything is."""
    probe = torch.empty(0)
    if type(probe) is not torch.Tensor or probe.device.type != "cpu":  # fake, on meta, or somebody else's memory
        return
    dtype = torch.get_default_dtype()
    needed = family.count(config).total * dtype.itemsize if _countable(config) else 0
    free = _available_memory()
    if needed > free:
        raise ConfigError(
            f"this model needs {_human(needed)} in {str(dtype).removeprefix('torch.')}, {_human(free)} are free; build"
            " it under torch.device('meta') to look at it, or take a smaller one"
        )


def _countable(config: NemotronHConfig) -> bool:
    heads = config.mtp_layers_block_type if config.num_nextn_predict_layers else []
    return all(family.BLOCKS[name].tensors is not None for name in (*config.layers_block_type, *heads))


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
