"""Packed models without a floating checkpoint: which tensors they have, and one with random weights."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_h.checkpoint.names import hub_names, stacked_name
from nemotron_h.configuration import NemotronHConfig
from nemotron_h.filling import put
from nemotron_h.initialization import initialize
from nemotron_h.linears import packed_parameters
from nemotron_h.modeling import NemotronHForCausalLM
from nemotron_h.ops.pack import empty_panels, pack_into
from nemotron_h.quantization import Packing, scheme

_DRAWN = 64  # panels of 16 rows that are drawn and packed; the others repeat them


class PackedTensor(NamedTuple):
    """A packed tensor of a checkpoint: its format and shape, and the floating tensors that it stands for."""

    packing: Packing
    packed_shape: tuple[int, ...]
    sources: list[str]


def packed_names(config: NemotronHConfig) -> dict[str, PackedTensor]:
    """The packed tensors of a checkpoint of `config`, whose `quantization_config` is ours, by their names there."""
    with torch.device("meta"):
        model = NemotronHForCausalLM(config)
    state, found = model.state_dict(), {}
    for native, packing, shape in packed_parameters(model):
        sources = [name for name, _ in hub_names(native, shape)]
        name = stacked_name(native) if len(shape) == 3 else sources[0]
        found[name] = PackedTensor(packing, tuple(state[native].shape), sources)
    return found


@torch.no_grad()
def random_model(config: NemotronHConfig, quantization: str | None, seed: int = 0) -> NemotronHForCausalLM:
    """A model with random weights, for measuring speed and memory: large matrices repeat a few drawn rows.

    Args:
        quantization: "bf16", "int8", "int4", or None for plain weights in `config.dtype` (default bfloat16).
        seed: Equal seeds give equal weights.
    """
    config = copy.deepcopy(config)
    if quantization is not None:
        config.quantization_config = scheme(quantization).to_dict()
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    with torch.device("meta"):
        model = NemotronHForCausalLM(config)
    model = model.to(dtype=dtype)  # type: ignore[call-arg]
    generator = torch.Generator().manual_seed(seed)
    packed = {name: (packing, shape) for name, packing, shape in packed_parameters(model)}
    tied = model.all_tied_weights_keys
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in packed:
            value = _random_panels(tuple(tensor.shape), *packed[name], config.initializer_range, generator)
        else:
            value = empty_panels((tensor.numel() * tensor.element_size(),)).view(tensor.dtype).view(tensor.shape)
            initialize(name, value, config, generator)
        put(model, name, value)
    if tied:
        model.tie_weights()
    return model.eval()


def _random_panels(
    packed_shape: tuple[int, ...], packing: Packing, shape: tuple[int, ...], std: float, generator: torch.Generator
) -> Tensor:
    panels = empty_panels(packed_shape)
    flat = panels.flatten(0, -2)
    drawn = min(len(flat), _DRAWN)
    pack_into(flat[:drawn], torch.randn(16 * drawn, shape[-1], generator=generator) * std, packing)
    for first in range(drawn, len(flat), drawn):
        flat[first : first + drawn] = flat[: min(drawn, len(flat) - first)]
    return panels
