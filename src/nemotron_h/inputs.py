"""The arguments of a forward pass: what is asked for, checked and put in order before any module runs."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from nemotron_h import losses, pieces
from nemotron_h.cache import NemotronHHybridDynamicCache
from nemotron_h.configuration import NemotronHConfig
from nemotron_h.errors import CacheError, InputError
from nemotron_h.layout import Layout, Recorder, documents, readable, validity

logger = logging.getLogger("nemotron_h")

_NAMES = (
    "output_hidden_states", "output_attentions", "output_router_logits", "output_mtp_logits", "output_ssm_states",
    "return_dict", "num_items_in_batch", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "cache_position", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "labels",
    "use_cache", "logits_to_keep",
)  # fmt: skip


class Trunk(pieces.Trunk, Protocol):
    """What a pass must know of the model that runs it."""

    config: NemotronHConfig
    gradient_checkpointing: bool


class Options(NamedTuple):
    """What a call wants returned; unset values are the config's."""

    return_dict: bool
    hidden_states: Literal["none", "last", "all"]
    router_logits: bool
    mtp_depths: int
    mtp_shown: int
    num_items: Tensor | int | None


class Prepared(NamedTuple):
    """A checked pass: where its tokens stand, the cache to extend, what to return; with `parts`, it is read in pieces,
    and `kept_Bn` are then the only positions whose hidden states are wanted."""

    layout: Layout
    cache: NemotronHHybridDynamicCache | None
    options: Options
    parts: list[pieces.Part] | None = None
    kept_Bn: Tensor | None = None


def prepare(
    model: Trunk,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Any,
    use_cache: bool | None,
    attention_mask: Tensor | None,
    kwargs: Mapping[str, Any],
    labels: Tensor | None = None,
) -> Prepared:
    """Check the arguments of a forward pass; see `NemotronHModel.forward` for their meaning and errors."""
    config = model.config
    batch, tokens, device = _check_tokens(config, input_ids, inputs_embeds)
    if batch == 0:
        raise InputError("the batch has no rows: give at least one")
    _refuse_misspelt(kwargs)
    if labels is not None:
        losses.check_labels(labels, batch, tokens, config.vocab_size)

    positions = position_ids if attention_mask is None and past_key_values is None else None
    seq_idx_BT = documents(batch, tokens, kwargs.get("seq_idx"), kwargs.get("cu_seq_lens_q"), positions)
    cache = _cache(model, past_key_values, use_cache, batch, tokens, packed=seq_idx_BT is not None)
    past = 0 if cache is None else cache.past
    valid_BT = validity(attention_mask, batch, tokens, past)
    slots_valid_BS = valid_BT if cache is None else cache.slots_valid(valid_BT, batch, tokens, device)

    options = _options(config, kwargs, labels is not None)
    if options.mtp_depths and cache is not None and cache.length:
        raise InputError("mtp_logits need the whole sequence: call without a filled past_key_values")
    recorder = _recorder(config, kwargs, options, labels is not None)
    capacity = None if cache is None else cache.capacity
    layout = Layout(tokens, past, valid_BT, slots_valid_BS, seq_idx_BT, recorder, capacity)
    parts, given = None, input_ids if inputs_embeds is None else inputs_embeds
    if options.hidden_states != "all" and given is not None:
        parts = pieces.plan(model, given, layout)
    return Prepared(layout, cache, options, parts)


def _check_tokens(
    config: NemotronHConfig, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> tuple[int, int, torch.device]:
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("give input_ids or inputs_embeds, exactly one of them")
    if inputs_embeds is not None:
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != config.hidden_size:
            wanted = f"[batch, tokens, {config.hidden_size}]"
            raise InputError(f"inputs_embeds must be {wanted}, got {list(inputs_embeds.shape)}")
        return inputs_embeds.shape[0], inputs_embeds.shape[1], inputs_embeds.device
    assert input_ids is not None
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"input_ids must be integers [batch, tokens], got {list(input_ids.shape)} of {input_ids.dtype}"
        )
    if input_ids.is_cpu and input_ids.numel() and readable(input_ids):
        low, high = [input_ids.item()] * 2 if input_ids.numel() == 1 else (int(v) for v in torch.aminmax(input_ids))
        if low < 0 or high >= config.vocab_size:
            raise InputError(f"input_ids must lie in [0, vocab_size={config.vocab_size}), got {low} to {high}")
    return input_ids.shape[0], input_ids.shape[1], input_ids.device


def _refuse_misspelt(kwargs: Mapping[str, Any]) -> None:
    """transformers passes keywords of its own, so unknown ones are let through, but not slips of the pen."""
    for key in kwargs:
        if key not in _NAMES and (close := difflib.get_close_matches(key, _NAMES, n=1, cutoff=0.85)):
            raise InputError(f"unknown argument {key!r}: did you mean {close[0]!r}?")


def _cache(
    model: Trunk, past_key_values: Any, use_cache: bool | None, batch: int, tokens: int, packed: bool
) -> NemotronHHybridDynamicCache | None:
    if past_key_values is not None:
        if packed:
            raise InputError("packed documents cannot be combined with a cache: run them without past_key_values")
        if use_cache is False:
            raise InputError("past_key_values was given with use_cache=False; drop one of them")
        cache = NemotronHHybridDynamicCache.adopt(past_key_values, model.config)
        cache.begin(batch, tokens)
        return _unless_checkpointing(model, cache)
    if use_cache and packed:
        raise InputError("packed documents cannot fill a cache: call with use_cache=False")
    wanted = model.config.use_cache and not model.training and not packed if use_cache is None else use_cache
    return _unless_checkpointing(model, NemotronHHybridDynamicCache(model.config)) if wanted else None


def _unless_checkpointing(model: Trunk, cache: NemotronHHybridDynamicCache) -> NemotronHHybridDynamicCache | None:
    if not (model.gradient_checkpointing and model.training):
        return cache
    if cache.length or any(layer.tensors() for layer in cache.layers):  # type: ignore[union-attr]
        raise CacheError(
            "a filled cache, or one with states to start from, cannot be continued under gradient checkpointing: it"
            " would be extended twice"
        )
    logger.warning("gradient checkpointing recomputes the blocks: no cache is returned")
    return None


def _options(config: NemotronHConfig, kwargs: Mapping[str, Any], has_labels: bool) -> Options:
    def choose(name: str, default: Any) -> bool:
        value = kwargs.get(name)
        return bool(default if value is None else value)

    depths, shown = _mtp_depths(config, kwargs.get("output_mtp_logits"), has_labels)
    return Options(
        return_dict=choose("return_dict", config.return_dict),
        hidden_states=_hidden_states(kwargs.get("output_hidden_states"), config),
        router_logits=choose("output_router_logits", config.output_router_logits),
        mtp_depths=depths,
        mtp_shown=shown,
        num_items=kwargs.get("num_items_in_batch"),
    )


def _hidden_states(asked: Any, config: NemotronHConfig) -> Literal["none", "last", "all"]:
    asked = config.output_hidden_states if asked is None else asked
    if type(asked) is int and asked == -1:  # transformers' speculative decoding asks for the last layer in this way
        return "last"
    return "all" if asked else "none"


def _mtp_depths(config: NemotronHConfig, asked: Any, has_labels: bool) -> tuple[int, int]:
    """(depths to compute, depths to return): one per head unless told otherwise; the loss may average over more."""
    heads = config.num_nextn_predict_layers
    if asked is not None and type(asked) is not bool and not (type(asked) is int and asked >= 0):
        raise InputError(f"output_mtp_logits must be True, False or a number of depths, got {asked!r}")
    if asked and not heads:
        raise InputError("output_mtp_logits was asked for, but the config has num_nextn_predict_layers=0")
    if not heads or asked is False or (asked is None and not has_labels):
        shown = 0
    else:
        shown = heads if asked is None or asked is True else int(asked)
    in_loss = config.mtp_loss_depths if has_labels and heads and config.mtp_loss_coef > 0 else 0
    return max(shown, in_loss), shown


def _recorder(config: NemotronHConfig, kwargs: Mapping[str, Any], options: Options, has_labels: bool) -> Recorder:
    attentions = kwargs.get("output_attentions")
    in_loss = has_labels and (config.router_aux_loss_coef > 0 or config.router_z_loss_coef > 0)
    router = options.router_logits or in_loss
    return Recorder(
        attentions={} if (config.output_attentions if attentions is None else attentions) else None,
        routings={} if router else None,
        ssm_states={} if kwargs.get("output_ssm_states") else None,
        mtp_routings={} if in_loss and config.mtp_loss_coef > 0 else None,
    )


def kept_alone(prepared: Prepared, batch: int, logits_to_keep: int | Tensor) -> Tensor | None:
    """The positions [B, n] whose hidden states suffice for these logits; None where all are wanted, or come at once."""
    layout, _, options, parts, _ = prepared
    if parts is None or options.hidden_states != "none" or options.mtp_depths:
        return None
    if isinstance(logits_to_keep, int) and logits_to_keep == 0:
        return None
    places_BT1 = torch.arange(layout.tokens)[None, :, None].expand(batch, -1, 1)
    return keep_positions(places_BT1, logits_to_keep)[..., 0]


def keep_positions(hidden_BTD: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions whose logits are wanted: the last n (0: all), a 1-D tensor of positions, or one per row [B, n].

    Raises:
        InputError: a negative number, or a tensor of another shape.
    """
    if isinstance(logits_to_keep, int):
        if logits_to_keep < 0:
            raise InputError(f"logits_to_keep must be 0 (all) or a number of positions, got {logits_to_keep}")
        return hidden_BTD if logits_to_keep == 0 else hidden_BTD[:, -logits_to_keep:]
    if logits_to_keep.dim() == 1:
        return hidden_BTD[:, logits_to_keep]
    if logits_to_keep.dim() == 2 and logits_to_keep.shape[0] == hidden_BTD.shape[0]:
        return hidden_BTD.gather(1, logits_to_keep[..., None].expand(-1, -1, hidden_BTD.shape[2]))
    raise InputError(f"logits_to_keep must be an integer, [positions] or [batch, n], got {list(logits_to_keep.shape)}")
