"""`load_state_dict` with a hub checkpoint's names, which is how Trainer and `load_sharded_checkpoint` come back to a model.

Letters: E experts · F expert width · L latent width.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_h.checkpoint.names import canonical

_PIECE = re.compile(r"(\d+)\.(up_proj|down_proj)\.(weight|bias)")


def rename_to_native(state_dict: dict[str, Any], prefix: str, trunk: str) -> None:
    """Give the tensors below `prefix` that are spelled as on the hub the model's own names, in place.

    Args:
        trunk: The model's name of its trunk: "model." of a language model, "" of a bare trunk.
    """
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = canonical(key.removeprefix(prefix))
        name = trunk + name.removeprefix("backbone.") if name.startswith("backbone.") else name
        if prefix + name not in state_dict:
            state_dict[prefix + name] = state_dict.pop(key)


@torch.no_grad()
def take_experts(
    experts: nn.Module, state_dict: dict[str, Any], prefix: str, missing_keys: list[str], error_msgs: list[str]
) -> None:
    """Copy single experts, `<prefix><e>.up_proj.weight` [F, L], into the stacked parameters.

    A shard may hold some of them only: the others stay as they are, and are reported missing.
    """
    found: dict[str, set[int]] = {}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        piece = _PIECE.fullmatch(key.removeprefix(prefix))
        if piece is None:
            continue
        name = piece[2] + "_bias" * (piece[3] == "bias")
        stacked, index = experts._parameters.get(name), int(piece[1])
        if stacked is None or index >= len(stacked):
            continue  # torch lists it as unexpected
        tensor: Tensor = state_dict.pop(key)
        if tensor.shape != stacked.shape[1:]:
            error_msgs.append(f"size mismatch for {key}: {list(tensor.shape)}, the model has {list(stacked.shape[1:])}")
            continue
        if stacked.is_meta:
            stacked = experts._parameters[name] = nn.Parameter(torch.empty_like(stacked, device=tensor.device))
        stacked[index] = tensor
        found.setdefault(name, set()).add(index)
    for name, indices in found.items():
        stacked = experts._parameters[name]
        assert stacked is not None
        kind = "bias" if name.endswith("_bias") else "weight"
        leaf = name.removesuffix("_bias")
        missing_keys += [f"{prefix}{e}.{leaf}.{kind}" for e in range(len(stacked)) if e not in indices]
        state_dict[prefix + name] = stacked  # it is in place; torch copies it onto itself
