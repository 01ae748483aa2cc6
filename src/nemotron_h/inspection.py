"""Looking inside: named points recorded, a Mamba layer drawn as attention, routing as a picture, a start from states.

docs/looking_inside.md lists the points and what a hook on each of them sees.

Letters: B batch · T tokens · H Mamba heads · P head size · G groups · N state size · C conv channels · W = taps - 1 ·
E experts · k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_h.cache import NemotronHHybridDynamicCache
from nemotron_h.errors import InputError
from nemotron_h.modeling import NemotronHMamba2Mixer, NemotronHModel, NemotronHMoE
from nemotron_h.ops.ssd import decay_rate, ssd
from nemotron_h.points import NemotronHPoint, hooked

__all__ = ["cache_from_states", "effective_attention", "expert_weights", "hooked", "points", "record"]


def points(model: nn.Module, *patterns: str) -> dict[str, NemotronHPoint]:
    """The named points below `model` whose full name matches a pattern (`*.hook_dt`, as in `fnmatch`), in model order.

    Without a pattern these are all points, those of MTP heads included.

    Raises:
        InputError: a pattern matches no point.
    """
    known = {name: module for name, module in model.named_modules() if isinstance(module, NemotronHPoint)}
    wanted = patterns or ("*",)
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in known):
            leaves = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in known)) or "none"
            first = f", in full for example {next(iter(known))!r}" if known else ""
            raise InputError(f"no point of the model is called {pattern!r}; it has {leaves}{first}")
    return {name: point for name, point in known.items() if any(fnmatchcase(name, p) for p in wanted)}


@contextmanager
def record(model: nn.Module, *patterns: str, detach: bool = True) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what passes the points that match, while the context is open; also after errors nothing stays behind.

        with inspection.record(model, "*.hook_dt", "*.hook_router_weights") as seen:
            model(input_ids)
        seen["model.layers.0.mixer.hook_dt"][0]  # [B, T, H]

    Args:
        model: Any module that contains points: the language model, its trunk, one block, a PeftModel.
        patterns: Full names, or patterns as in `fnmatch`; none means every point.
        detach: False keeps the graph, so that gradients of and through what was seen can be had.

    Returns:
        By full name one tensor for each time the point was passed, in order: one per forward pass, so in `generate`
        one per step, and under gradient checkpointing another when `backward` computes the block again. Values are
        those behind hooks that were registered earlier.

    Raises:
        InputError: a pattern matches no point.
    """
    found = points(model, *patterns)
    seen: dict[str, list[Tensor]] = {name: [] for name in found}
    handles = [point.register_forward_hook(_keeper(seen[name], detach)) for name, point in found.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _keeper(values: list[Tensor], detach: bool) -> Callable[[nn.Module, Any, Tensor], None]:
    def keep(point: nn.Module, args: Any, value: Tensor) -> None:
        values.append(value.detach() if detach else value)

    return keep


def effective_attention(
    model: nn.Module,
    input_ids: Tensor,
    layer: int,
    attention_mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    *,
    include_D: bool = False,
) -> Tensor:
    """What a Mamba layer multiplies its values by, as if it were attention: `M @ x` is the output of its scan.

    `M[t, s] = C_t·B_s · exp(Σ_{s < r <= t} dt_r·A) · dt_s` for s <= t: the state space dual of Mamba-2, arXiv
    2405.21060. Rows do not sum to one and entries may be negative.

    Args:
        model: The language model, its trunk, or a PeftModel.
        input_ids: [B, T].
        layer: Index of a mamba block of the trunk.
        attention_mask: [B, T]; rows and columns of padding are zero.
        seq_idx: [B, T] of packed documents, which do not see each other.
        include_D: Add the skip connection D to the diagonal.

    Returns:
        [B, H, T, T], query before source, float32 (float64 in a float64 model), differentiable where gradients are on.

    Raises:
        InputError: no mamba block there; and as the model's own forward pass.
    """
    mixer = _mixer(model, layer, NemotronHMamba2Mixer, "mamba")
    with record(mixer, "hook_dt", "hook_B", "hook_C", detach=False) as seen:
        _run(model, input_ids, attention_mask, seq_idx)
    dt_BTH, B_BTGN, C_BTGN = (seen[name][0] for name in ("hook_dt", "hook_B", "hook_C"))
    A_H = decay_rate(mixer.A_log).to(dt_BTH.dtype)
    D_H = mixer.D if include_D else torch.zeros_like(mixer.D)
    # The scan is linear in x: what it makes of the identity is its matrix.
    tokens = dt_BTH.shape[1]
    identity_TT = torch.eye(tokens, dtype=dt_BTH.dtype, device=dt_BTH.device)
    x_BTHT = identity_TT[:, None].expand(*dt_BTH.shape, tokens)
    M_BHTT = ssd(x_BTHT, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, mixer.chunk_size, None, seq_idx).output.transpose(1, 2)
    return M_BHTT if attention_mask is None else M_BHTT * attention_mask[:, None, :, None].to(M_BHTT.dtype)


def expert_weights(model: nn.Module, input_ids: Tensor, layer: int, attention_mask: Tensor | None = None) -> Tensor:
    """How much each expert has of each token, ready to be drawn: the router's weights, zero where it was not chosen.

    Args:
        model: The language model, its trunk, or a PeftModel.
        input_ids: [B, T].
        layer: Index of a moe block of the trunk.
        attention_mask: [B, T]; rows of padding are zero.

    Returns:
        [B, T, E], float32 (float64 in a float64 model), differentiable where gradients are on.

    Raises:
        InputError: no moe block there; and as the model's own forward pass.
    """
    mixer = _mixer(model, layer, NemotronHMoE, "moe")
    with record(mixer, "hook_router_*", detach=False) as seen:
        _run(model, input_ids, attention_mask, None)
    experts_BTk, weights_BTk = seen["hook_router_experts"][0], seen["hook_router_weights"][0]
    empty_BTE = weights_BTk.new_zeros(*weights_BTk.shape[:2], mixer.experts.num_experts)
    weights_BTE = empty_BTE.scatter_add(2, experts_BTk, weights_BTk)
    return weights_BTE if attention_mask is None else weights_BTE * attention_mask[..., None].to(weights_BTE.dtype)


def _mixer(model: nn.Module, layer: int, kind: type, name: str) -> Any:
    blocks = _trunk(model).layers
    if not 0 <= layer < len(blocks) or not isinstance(mixer := blocks[layer].mixer, kind):
        having = [index for index, block in enumerate(blocks) if isinstance(block.mixer, kind)]
        raise InputError(f"layer={layer} is not a {name} block; those are {having}")
    return mixer


def _trunk(model: nn.Module) -> Any:
    for module in model.modules():
        if isinstance(module, NemotronHModel):
            return module
    raise InputError(f"model must be or contain a NemotronHModel, got {type(model).__name__}")


def _run(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, seq_idx: Tensor | None) -> None:
    _trunk(model)(input_ids, attention_mask=attention_mask, seq_idx=seq_idx, use_cache=False)


def cache_from_states(
    model: nn.Module,
    ssm_states: Sequence[Tensor] | Mapping[int, Tensor],
    conv_states: Sequence[Tensor] | Mapping[int, Tensor] | None = None,
) -> NemotronHHybridDynamicCache:
    """A cache without tokens, from which the Mamba layers start in given states instead of zero.

        out = model(input_ids, past_key_values=cache_from_states(model, states))

    Gradients flow into the states, also through `generate`'s passes where they are on. The tensors are not copied; the
    pass puts its own states into the cache and leaves yours alone.

    Args:
        model: The language model, its trunk, or a PeftModel.
        ssm_states: [B, H, P, N] each: one per mamba block of the trunk, in order, as `out.ssm_states` has them; or by
            layer index, the others start from zero.
        conv_states: The same for the last W inputs of the convolution, [B, C, W], oldest first; zero if not given.

    Raises:
        InputError: another number of states, another shape, no floating point, or a layer without such a state.
    """
    config = _trunk(model).config
    cache = NemotronHHybridDynamicCache(config)
    mamba = [index for index, name in enumerate(config.layers_block_type) if name == "mamba"]
    heads, size = (config.mamba_num_heads, config.mamba_head_dim), config.ssm_state_size
    channels = heads[0] * heads[1] + 2 * config.mamba_n_groups * size
    for name, given, shape in (
        ("recurrent_states", ssm_states, (*heads, size)),
        ("conv_states", conv_states or {}, (channels, config.mamba_d_conv - 1)),
    ):
        for layer, state in _by_layer(given, mamba).items():
            rows = state.shape[0] if cache._batch is None and state.dim() else cache._batch
            if tuple(state.shape) != (rows, *shape) or not state.is_floating_point():
                wanted = ["batch" if rows is None else rows, *shape]
                raise InputError(
                    f"{name} of layer {layer} must be floats {wanted}, got {list(state.shape)} of {state.dtype}"
                )
            setattr(cache.layers[layer], name, state)
            cache._batch = rows
    return cache


def _by_layer(given: Sequence[Tensor] | Mapping[int, Tensor], mamba: list[int]) -> Mapping[int, Tensor]:
    if isinstance(given, Mapping):
        if strange := sorted(set(given) - set(mamba)):
            raise InputError(f"layers {strange} are no mamba blocks and keep no such state; those are {mamba}")
        return given
    if len(given) != len(mamba):
        raise InputError(f"the model has {len(mamba)} mamba blocks, got {len(given)} states: give one for each")
    return dict(zip(mamba, given, strict=True))
