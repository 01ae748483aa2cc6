"""`load_state_dict` with a hub checkpoint's names: how Trainer and `load_sharded_checkpoint` come back to a model.

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
        if prefix + name in state_dict:
            continue  # its own name already, or a second spelling, which torch lists as unexpected
        state_dict[prefix + name] = state_dict.pop(key)


def tie_head(state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
    """Give a tied model its `lm_head.weight`: checkpoints hold it once, as the embeddings."""
    head, source = prefix + "lm_head.weight", prefix + "model.embeddings.weight"
    if source not in state_dict:
        return
    tensor = state_dict.setdefault(head, state_dict[source])
    if tensor is not state_dict[source] and not torch.equal(tensor, state_dict[source]):
        error_msgs.append(f"tie_word_embeddings=True, but {head} differs from {source}")


@torch.no_grad()
def take_experts(
    experts: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    assign: bool,
    missing_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Copy single experts, `<prefix><e>.up_proj.weight` [F, L], into the stacked parameters.

    A shard may hold some of them only: the others stay as they are, and are reported missing.

    Args:
        assign: As in `load_state_dict`: the checkpoint's dtype and device win, also over a model on `meta`.
    """
    found: dict[str, dict[int, Tensor]] = {}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        piece = _PIECE.fullmatch(key.removeprefix(prefix))
        name = "" if piece is None else piece[2] + "_bias" * (piece[3] == "bias")
        stacked = experts._parameters.get(name)
        if piece is None or stacked is None or prefix + name in state_dict or int(piece[1]) >= len(stacked):
            continue  # torch lists it as unexpected
        tensor: Tensor = state_dict.pop(key)
        found.setdefault(name, {})[int(piece[1])] = tensor
        if tensor.shape != stacked.shape[1:]:
            error_msgs.append(f"size mismatch for {key}: {list(tensor.shape)}, the model has {list(stacked.shape[1:])}")
            del found[name][int(piece[1])]
    for name, tensors in found.items():
        stacked = experts._parameters[name]
        assert stacked is not None
        leaf, kind = name.removesuffix("_bias"), "bias" if name.endswith("_bias") else "weight"
        missing_keys += [f"{prefix}{e}.{leaf}.{kind}" for e in range(len(stacked)) if e not in tensors]
        state_dict[prefix + name] = _filled(stacked.detach(), tensors, assign)  # torch puts it into the module


def _filled(stacked: Tensor, tensors: dict[int, Tensor], assign: bool) -> Tensor:
    """`stacked` with these experts: in place, or with `assign` in the dtype and on the device of the tensors."""
    if assign and tensors:
        one = next(iter(tensors.values()))
        unknown = stacked.is_meta and not one.is_meta
        stacked = one.new_full(stacked.shape, torch.nan) if unknown else stacked.to(one.device, one.dtype)
    for index, tensor in tensors.items():
        stacked[index] = tensor  # no effect on meta, as in torch
    return stacked
