"""DoRA (arXiv 2402.09353) for the stacked weights of routed experts; importing this module imports PEFT.

PEFT adapts a stacked parameter W by wrapping its module; the wrapper replaces W by `W + s·B·A` while the module runs,
but refuses DoRA. DoRA of one output row is `m · V / |V|` with `V = W + s·B·A`, so it fits the same frame, with one
magnitude per expert and row. As in PEFT's DoRA of linears, |V| counts as a constant for gradients.

Letters: E experts · O outputs · N inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Magnitude(nn.Module):
    """The norms m [E, O] of an adapter's rows."""

    def __init__(self, weight_EO: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_EO)


class _Adapted(nn.Module):
    def __init__(self, adapt: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.adapt = adapt

    def forward(self, weight_EON: Tensor) -> Tensor:
        return self.adapt(weight_EON)


class ParamWrapper(lora.ParamWrapper):
    """PEFT's wrapper of a stacked parameter, with DoRA. The name is PEFT's, which knows its wrapper by it."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, parameter_name, config=_without_dora(config), **kwargs)
        self._original_EON: Tensor | None = None
        if config.use_dora:
            self._add_magnitude(adapter_name, config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, lora_alpha, config=_without_dora(config), **kwargs)
        if config.use_dora:
            self._add_magnitude(adapter_name, config)

    def _add_magnitude(self, adapter_name: str, config: LoraConfig) -> None:
        self.use_dora[adapter_name] = True
        if "lora_magnitude_vector" not in self.adapter_layer_names:
            self.adapter_layer_names = (*self.adapter_layer_names, "lora_magnitude_vector")
        with torch.no_grad():
            norm_EO = _row_norms(self.get_param() + self.get_delta_weight(adapter_name))
        self.lora_magnitude_vector[adapter_name] = Magnitude(norm_EO)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _adapt(self, weight_EON: Tensor, deltas: dict[str, Tensor]) -> Tensor:
        """The weight with adapters, given their `s·B·A`; several add what each alone would change."""
        adapted = [self._adapt_one(weight_EON, name, delta_EON) for name, delta_EON in deltas.items()]
        return adapted[0] if len(adapted) == 1 else weight_EON + sum(one - weight_EON for one in adapted)

    def _adapt_one(self, weight_EON: Tensor, name: str, delta_EON: Tensor) -> Tensor:
        v_EON = weight_EON + delta_EON
        if not self.use_dora[name]:
            return v_EON
        magnitude: Any = self.lora_magnitude_vector[name]
        scale_EO = magnitude.weight / _row_norms(v_EON.detach())
        return v_EON * scale_EO[..., None].to(v_EON.dtype)

    def _deltas(self, names: list[str]) -> dict[str, Tensor]:
        """`s·B·A` of each; while the parameter is replaced they could not be computed."""
        return {name: self.get_delta_weight(name) for name in names}

    def _with_dora(self, names: list[str]) -> list[str]:
        """The adapters among `names` that this layer has; none if PEFT's own arithmetic does."""
        own = [name for name in names if name in self.lora_A]
        return own if any(self.use_dora[name] for name in own) else []

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        names = self._with_dora(active_adapters)
        if not names:
            with super()._activate_lora(active_adapters):
                yield
            return
        base: Any = self.get_base_layer()
        trained = self.get_param().requires_grad
        deltas = self._deltas(names)
        proxy = _Adapted(lambda weight_EON: self._adapt(weight_EON, deltas))
        parametrize.register_parametrization(base, self.parameter_name, proxy)
        base.parametrizations[self.parameter_name].original.requires_grad_(trained)
        try:
            with parametrize.cached():
                yield
        finally:
            parametrize.remove_parametrizations(base, self.parameter_name, leave_parametrized=False)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's. With DoRA among the adapters the original stays in memory, so that `unmerge` restores its bits."""
        asked = check_adapters_to_merge(self, adapter_names)
        names = self._with_dora(asked)
        if not names:
            super().merge(safe_merge, asked)
            return
        if self.merged:
            raise ValueError("DoRA of experts cannot be merged on top of another adapter: unmerge, then merge both")
        param = self.get_param()
        with torch.no_grad():
            merged_EON = self._adapt(param.data, self._deltas(names))
        if safe_merge and not bool(merged_EON.isfinite().all()):
            raise ValueError(f"the merged weights are not finite: one of the adapters {names} is broken")
        self._original_EON, param.data = param.data, merged_EON
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """As PEFT's."""
        if self._original_EON is None:
            super().unmerge()
            return
        self.get_param().data, self._original_EON = self._original_EON, None
        self.merged_adapters.clear()


def _row_norms(weight_EON: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight_EON, dim=-1, dtype=torch.promote_types(weight_EON.dtype, torch.float32))


def _without_dora(config: LoraConfig) -> LoraConfig:
    plain = copy.copy(config)
    plain.use_dora = False
    return plain
