"""Names of an adapter's tensors: PEFT's, the hub's prefix `backbone.`, and one tensor per expert.

PEFT wraps a module once for each stacked weight, so the adapter of `....experts.up_proj` may be called
`....experts.base_layer.lora_A.weight`: which wrapper it is can only be seen in the wrapped model. It holds all experts:
lora_A [E·r, in] with the experts outside, lora_B [out, r·E] with the experts inside.

Letters: E experts · r rank · O outputs · N inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nemotron_h.adapters.targets import named_targets
from nemotron_h.experts import NemotronHExperts

PREFIX = "base_model.model."
KINDS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")

_ADAPTED = re.compile(r"(.*?)((?:\.base_layer)*)\.(lora_[A-Za-z_]+(?:\.weight|\.bias)?)$")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(up_proj|down_proj)$")


class Key(NamedTuple):
    """A tensor's name in parts: `module` + `wrappers` + `kind`; expert and projection where it is one expert's."""

    module: str
    wrappers: str
    kind: str
    projection: str | None = None
    expert: int | None = None

    @property
    def target(self) -> str:
        """The module, or for routed experts the parameter, that is adapted."""
        return self.module if self.projection is None else f"{self.module}.{self.projection}"


def parse(name: str) -> Key | None:
    """The parts of an adapter's tensor name without PEFT's prefix; None for what is no low-rank factor."""
    found = _ADAPTED.fullmatch(name)
    if found is None:
        return None
    module, wrappers, kind = found[1], found[2], found[3]
    expert = _EXPERT.fullmatch(module)
    if kind == "lora_magnitude_vector.weight":
        kind = "lora_magnitude_vector"
    if expert is None:
        return Key(module, wrappers, kind)
    return Key(expert[1], "", kind, expert[3], int(expert[2]))


def native(name: str, trunk: bool) -> str:
    """A module's or tensor's name in this package, from that or the hub's; `trunk`: in a `NemotronHModel` alone."""
    name = name.removeprefix("language_model.")
    if name.startswith("backbone."):
        name = "model." + name.removeprefix("backbone.")
    return name.removeprefix("model.") if trunk else name


def hub(name: str) -> str:
    """The hub's name of a module or tensor of ours: the opposite of `native`."""
    return "backbone." + name.removeprefix("model.") if not name.startswith(("lm_head", "mtp.")) else name


def wrappers(base: nn.Module) -> dict[str, str]:
    """Where PEFT keeps the adapter of each stacked weight: `....experts.up_proj` -> `....experts.base_layer`."""
    return {
        f"{name.replace('.base_layer', '')}.{module.parameter_name}": name
        for name, module in base.named_modules()
        if hasattr(module, "parameter_name")
    }


def expert_counts(base: nn.Module) -> dict[str, int]:
    """The number of experts of each stacked weight, by its full name."""
    return {
        f"{name}.{projection}": module.num_experts
        for name, module in named_targets(base)
        if isinstance(module, NemotronHExperts)
        for projection in ("up_proj", "down_proj")
    }


def stack(kind: str, parts: Iterable[Tensor]) -> Tensor:
    """One tensor in PEFT's layout from those of all experts, in the order of their ids."""
    if kind == "lora_A.weight":
        return torch.cat(list(parts))
    if kind == "lora_B.weight":
        return torch.stack(list(parts), dim=-1).flatten(1)
    return torch.stack(list(parts))


def unstack(kind: str, stacked: Tensor, experts: int) -> Iterator[Tensor]:
    """The tensors of single experts: lora_A [r, N], lora_B [O, r], magnitude [O]. The opposite of `stack`."""
    if kind == "lora_A.weight":
        yield from stacked.chunk(experts)
    elif kind == "lora_B.weight":
        yield from stacked.unflatten(1, (-1, experts)).unbind(-1)
    else:
        yield from stacked
