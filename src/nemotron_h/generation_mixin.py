"""What transformers' `generate` needs from the model: our cache, our masks, our first step.

Each method overrides a hook of transformers' `GenerationMixin`; tests/loading/test_transformers_hooks.py holds a canary
for each.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from nemotron_h.cache import NemotronHHybridDynamicCache, NemotronHHybridStaticCache
from nemotron_h.drafting import MTPCandidateGenerator
from nemotron_h.errors import InputError, UnsupportedError

logger = logging.getLogger("nemotron_h")
_base: Any = GenerationMixin  # its methods are typed for a protocol that only whole models fulfil


class NemotronHGenerationMixin(GenerationMixin):
    """Mixed into `NemotronHForCausalLM`."""

    _longest_static_cache = 0
    _is_stateful = False  # with it, transformers would refuse assisted decoding and prompt lookup

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Put our cache into `model_kwargs`; a caller's is checked, an empty DynamicCache becomes ours."""
        if max_cache_length + 1 > self.config.max_position_embeddings:
            _warn_length(max_cache_length + 1, self.config.max_position_embeddings)
        if getattr(generation_config, "is_assistant", False):
            # The model reads its prompt in one piece when it is assisted, and so does the assistant: transformers 5.20
            # gives a wrong mask to pieces behind a cache.
            generation_config.prefill_chunk_size = None
        if _right_padded(model_kwargs.get("attention_mask")):
            _refuse_right_padding(generation_config, generation_mode)
        given = model_kwargs.get("past_key_values")
        if given is not None:
            model_kwargs["past_key_values"] = NemotronHHybridDynamicCache.adopt(given, self.config)
            _base._prepare_cache_for_generation(
                self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        if generation_config.use_cache is False:
            return
        if generation_config.cache_implementation not in (None, "dynamic", "static"):
            raise UnsupportedError(
                f"cache_implementation={generation_config.cache_implementation!r} cannot hold Mamba states: leave it"
                ' out to get NemotronHHybridDynamicCache, or take "static" for NemotronHHybridStaticCache'
            )
        cache = NemotronHHybridDynamicCache(self.config)
        if generation_config.cache_implementation == "static":
            # As long as any before, so that a compiled step fits again.
            length = max(max_cache_length, generation_config.max_cache_len or 0, self._longest_static_cache)
            self._longest_static_cache = length
            cache = NemotronHHybridStaticCache(self.config, length, device=self.device)
        if getattr(generation_config, "is_assistant", False):
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    def _assisted_decoding(self: Any, input_ids: Tensor, *args: Any, generation_config: Any, **kwargs: Any) -> Any:
        """As transformers', also behind a filled cache: there it would have the model read the cached tokens again."""
        cache, mask_BT = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        past, given = 0 if cache is None else cache.get_seq_length(), input_ids.shape[1]
        width = getattr(generation_config, "_mask_length", -1) if mask_BT is None else mask_BT.shape[1]
        if width == given > past > 0:  # the whole text: a mask says so to prepare_inputs_for_generation
            kwargs["attention_mask"] = torch.ones_like(input_ids) if mask_BT is None else mask_BT
        elif past and mask_BT is not None:  # new tokens only; the cache knows the padding before them
            if not bool(mask_BT[:, -given:].all()):
                raise UnsupportedError("assisted decoding behind a filled cache needs new tokens without padding")
            kwargs["attention_mask"] = None
        return _base._assisted_decoding(self, input_ids, *args, generation_config=generation_config, **kwargs)

    def _get_candidate_generator(self: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """`use_mtp=True` drafts with our MTP head; transformers' own is made for another kind."""
        if not generation_config.use_mtp or generation_config.prompt_lookup_num_tokens is not None:
            return _base._get_candidate_generator(self, generation_config, *args, **kwargs)
        return MTPCandidateGenerator(self, generation_config, kwargs["logits_processor"], kwargs["model_kwargs"])

    def prepare_inputs_for_generation(
        self: Any,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers', except for the prompt's logits: `config.num_logits_to_keep` of them, and with right
        padding those of each row's last real token."""
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        whole = attention_mask is not None and attention_mask.shape[1] == input_ids.shape[1] > past > 0
        if is_first_iteration and next_sequence_length is None and whole:
            next_sequence_length = input_ids.shape[1] - past  # see _assisted_decoding
        inputs = _base.prepare_inputs_for_generation(
            self,
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        batch, tokens = (inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]).shape[:2]
        if not batch or not tokens:
            raise InputError(
                f"generate: the prompt is empty ([{batch}, {tokens}]); give at least one token, or no prompt at all to"
                " start from bos_token_id"
            )
        if isinstance(past_key_values, NemotronHHybridStaticCache):
            inputs["attention_mask"] = _of_this_pass(attention_mask, tokens)
        keep = inputs.get("logits_to_keep")
        if is_first_iteration and isinstance(keep, int) and keep == 1:
            inputs["logits_to_keep"] = self._prompt_logits(attention_mask, tokens)
        return inputs

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """The mask as it is: our layers make their own from it, of constant shape where the cache is static."""
        return attention_mask

    def _prompt_logits(self: Any, attention_mask: Tensor | None, tokens: int) -> int | Tensor:
        if attention_mask is not None and _right_padded(attention_mask):
            mask_BT = attention_mask[:, -tokens:].bool()  # of this pass: there may be a cache, or a chunk before it
            return (torch.arange(mask_BT.shape[1], device=mask_BT.device) * mask_BT).argmax(-1, keepdim=True)
        return self.config.num_logits_to_keep or 0

    def load_custom_generate(self, *args: Any, **kwargs: Any) -> Any:
        """A checkpoint's own generate.py is never run."""
        raise CustomCodeError(
            "generate.py of a checkpoint or hub repository is never run by this package; pass a function of your own,"
            " generate(custom_generate=function)"
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' continuous batching has no place for Mamba states."""
        raise UnsupportedError("generate_batch and cache_implementation='paged' cannot hold Mamba states: use LLM")

    init_continuous_batching = continuous_batching_context_manager = generate_batch


class CustomCodeError(UnsupportedError, OSError):
    """`from_pretrained` takes an OSError for "there is no such code"; to `generate`'s caller it is unsupported."""


def _of_this_pass(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """The mask of the pass's own tokens, whose shape does not grow; None when they are all real."""
    if attention_mask is None or bool(attention_mask[:, -tokens:].all()):
        return None
    return attention_mask[:, -tokens:]


def _right_padded(attention_mask: Tensor | None) -> bool:
    return attention_mask is not None and attention_mask.dim() == 2 and not bool(attention_mask[:, -1].all())


def _refuse_right_padding(generation_config: Any, generation_mode: Any) -> None:
    """These take the logits of the last column, or of a chunk in which a row may have ended before."""
    for name, used in (
        ("prefill_chunk_size", generation_config.prefill_chunk_size is not None),
        ("assisted decoding", str(getattr(generation_mode, "value", "")) == "assisted_generation"),
    ):
        if used:
            raise UnsupportedError(f"{name} with right padding is not supported: pad on the left")


_warned: set[int] = set()


def _warn_length(length: int, limit: int) -> None:
    if limit not in _warned:
        _warned.add(limit)
        logger.warning(
            "generate may reach %d tokens; the model was trained with max_position_embeddings=%d", length, limit
        )
