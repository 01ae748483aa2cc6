"""A checkpoint's tensors into a model on `meta`: placed, stacked or packed, one at a time.

Everything about them is checked before the first is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nemotron_h.checkpoint.mapping import ENOUGH
from nemotron_h.checkpoint.names import plan, with_expert_bias
from nemotron_h.checkpoint.safetensors import PACKED_ALIGNMENT, TensorInfo, TensorReader
from nemotron_h.errors import CheckpointError, UnsupportedError
from nemotron_h.linears import packed_parameters
from nemotron_h.ops.pack import SLICE, advise_huge_pages, empty_panels, pack_into
from nemotron_h.quantization import Packing

Read = Callable[[str], Tensor]


class Source(Protocol):
    """Where tensors come from: a checkpoint's files, or a state dict."""

    def read(self, name: str) -> Tensor: ...
    def rows(self, name: str, first: int, last: int) -> Tensor: ...
    def packed(self, name: str) -> Tensor: ...


class Files:
    """Tensors of a checkpoint's files. `mapped`: whether packed weights stay where they lie; None: where their pages
    are huge, and copied elsewhere."""

    def __init__(self, reader: TensorReader, specs: Mapping[str, TensorInfo], mapped: bool | None) -> None:
        self._reader, self._specs, self._mapped = reader, specs, mapped

    def read(self, name: str) -> Tensor:
        return self._reader.read(self._specs[name])

    def rows(self, name: str, first: int, last: int) -> Tensor:
        return self._reader.read_rows(self._specs[name], first, last)

    def packed(self, name: str) -> Tensor:
        info = self._specs[name]
        stays = self._mapped
        if stays is None:
            stays = self._reader.mapped(info.file).huge_share() >= ENOUGH
        if stays and info.start % PACKED_ALIGNMENT == 0:
            return self._reader.map(info)
        panels = empty_panels(info.shape)
        for index, part in enumerate(panels):
            part.copy_(self._reader.read_rows(info, index, index + 1)[0])
        return panels


class Given:
    """Tensors of a state dict."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach().clone()

    def rows(self, name: str, first: int, last: int) -> Tensor:
        return self._tensors[name].detach()[first:last]

    def packed(self, name: str) -> Tensor:
        return self.read(name)


def fill(model: Any, specs: Mapping[str, Any], source: Source, load_config: Any, where: str) -> None:
    """Put a checkpoint's tensors into a model on `meta`, after everything about them has been checked."""
    for prefix in with_expert_bias(specs):
        module = _experts_at(model, prefix)
        if module is not None:
            module.add_bias()
    state = model.state_dict()
    tied = dict(model.all_tied_weights_keys)
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    packed = {name: (packing, shape) for name, packing, shape in packed_parameters(model)}
    as_stored = packed if any(spec.dtype == "U8" for spec in specs.values()) else {}
    if not as_stored:
        wanted |= {name: shape for name, (_, shape) in packed.items()}
    causal = hasattr(model, "lm_head")
    ignore = [] if causal and getattr(model, "mtp", None) is not None else ["mtp."]
    ignore += [] if causal else ["lm_head."]
    sources = plan(specs, wanted, ignore, where, optional=tied, packed=as_stored).sources
    devices = {name: device_of(load_config.device_map, name) for name in wanted}
    for name, original in tied.items():
        _check_tie(sources.pop(name), sources[original], source.read, where)
    for name, files in sources.items():
        if name in as_stored:
            value = source.packed(files[0]).to(devices[name])
        elif name in packed:
            value = _pack(files, source, *packed[name], tuple(state[name].shape)).to(devices[name])
        else:
            value = _assemble(files, source.read, wanted[name], state[name].dtype, devices[name])
        put(model, name, value)


def _pack(
    files: list[str], source: Source, packing: Packing, shape: tuple[int, ...], packed_shape: tuple[int, ...]
) -> Tensor:
    """Packed weights from floating ones (one tensor, one per expert, or one of all experts), some rows at a time."""
    panels = empty_panels(packed_shape)
    matrices = panels if len(shape) == 3 else panels[None]
    cols = shape[-1]
    step = max(1, SLICE // cols // 16) * 16
    for index, matrix in enumerate(matrices):
        whole = len(files) == 1 and len(shape) == 3
        for first in range(0, shape[-2], step):
            last = min(first + step, shape[-2])
            if whole:
                rows = source.rows(files[0], index, index + 1)[0, first:last]
            else:
                rows = source.rows(files[index], first, last)
            pack_into(
                matrix[first // 16 : -(-last // 16)], rows.reshape(-1, cols), packing, files[index if not whole else 0]
            )
    return panels


def _experts_at(model: nn.Module, hub_prefix: str) -> Any:
    modules = dict(model.named_modules())
    return modules.get(hub_prefix.replace("backbone.", "model.", 1), modules.get(hub_prefix.removeprefix("backbone.")))


def _assemble(sources: list[str], read: Read, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
    if len(sources) == 1 and shape[:1] != (1,):
        return read(sources[0]).to(device=device, dtype=dtype)
    if len(sources) == 1:
        return read(sources[0]).reshape(shape).to(device=device, dtype=dtype)
    stacked = torch.empty(shape, dtype=dtype, device=device)
    advise_huge_pages(stacked)
    for index, source in enumerate(sources):
        stacked[index] = read(source)
    return stacked


def put(model: nn.Module, name: str, value: Tensor) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if leaf in parent._parameters:
        value = nn.Parameter(value, requires_grad=value.is_floating_point())
    value._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' flag: never initialize this again
    setattr(parent, leaf, value)


def device_of(device_map: Any, name: str) -> Any:
    """The device of the longest prefix of `name` in transformers' device map."""
    if not device_map:
        return torch.device("cpu")
    fitting = [key for key in device_map if key == "" or name == key or name.startswith(key + ".")]
    device = device_map[max(fitting, key=len)]
    if device == "disk":
        raise UnsupportedError("device_map: offloading to disk is not supported by this version")
    return device


def _check_tie(tied: list[str], source: list[str], read: Read, where: str) -> None:
    """A tied checkpoint need not hold the second tensor; if it does, the two must be equal."""
    if tied and not torch.equal(read(tied[0]), read(source[0])):
        raise CheckpointError(
            f"{where}: tie_word_embeddings=True, but {tied[0]} differs from {source[0]}; set it to False in config.json"
            " if the weights are right"
        )
