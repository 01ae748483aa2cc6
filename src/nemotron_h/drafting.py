"""Drafts by the MTP head, for the speculative decoding of transformers' `generate(use_mtp=True)`.

Depth j predicts token t + j + 1 at position t from depth j - 1 there and the embedding of token t + j. A draft behind
the last known token P is therefore depth 1 at position P - 1, then depth 2 there given the first draft, and so on: what
`model(ids, output_mtp_logits=k)` says of the drafted text, at the cost of the tokens that came since the last draft.

Letters: B = 1 row · T tokens · D hidden_size · V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.candidate_generator import CandidateGenerator

from nemotron_h.cache import JOURNAL, DepthCache
from nemotron_h.errors import InputError, UnsupportedError

DRAFTS = 3  # tokens per draft where a single head serves every depth

Choose = Callable[[Tensor, Tensor], Tensor]
"""(ids [B, T], logits [B, V] of the next) to the next id [B, 1]."""


class MTPDrafter:
    """Runs the MTP depths behind a growing text of one row.

    Depths 2 and more meet drafted tokens at their last positions; those are computed again once the text is certain.
    """

    def __init__(self, model: Any, depths: int) -> None:
        config = model.config
        self.model, self.ids_BT = model, torch.empty(1, 0, dtype=torch.long, device=model.device)
        heads = [min(depth, config.num_nextn_predict_layers) - 1 for depth in range(1, depths + 1)]
        self.caches = [DepthCache(config, head) for head in heads]
        # For each depth the certain hidden states of the one before that it has not consumed: one position at most.
        self.left_BTD: list[Tensor | None] = [None] * depths

    @torch.no_grad()
    def draft(self, new_BT: Tensor, hidden_BTD: Tensor, choose: Choose) -> Tensor:
        """Drafted ids [B, depths].

        Args:
            new_BT: Tokens that became certain since the last call. The model has read all but the last of the text.
            hidden_BTD: Trunk output behind `norm_f` at the positions that it read since the last call.
            choose: Picks a draft from its logits.
        """
        self.ids_BT = torch.cat([self.ids_BT, new_BT], dim=1)
        read, ids_BT = self.ids_BT.shape[1] - 1, self.ids_BT
        left: list[Tensor | None] = [None]
        for depth, (cache, left_BTD) in enumerate(zip(self.caches, self.left_BTD, strict=True), start=1):
            hidden_BTD = hidden_BTD if left_BTD is None else torch.cat([left_BTD, hidden_BTD], dim=1)
            start, certain = cache.length, max(0, read - depth + 1)
            embeds_BTD = self.model.model.embeddings(ids_BT[:, start + depth : read + depth])
            hidden_BTD = self.model.mtp.extend(depth, hidden_BTD, embeds_BTD, cache)
            cache.commit(read - start, certain - start)
            left.append(hidden_BTD[:, max(0, certain - 1) - start : certain - start])
            logits_BV = self.model.logits_of(hidden_BTD[:, -1:])[:, 0]
            ids_BT = torch.cat([ids_BT, choose(ids_BT, logits_BV)], dim=1)
        self.left_BTD = left[:-1]
        return ids_BT[:, read + 1 :]


class MTPCandidateGenerator(CandidateGenerator):
    """transformers' interface around `MTPDrafter`.

    Args:
        model: A `NemotronHForCausalLM` with an MTP head.
        generation_config: `num_assistant_tokens` is the draft length; unset, one token per head, or `DRAFTS` where
            there is one head.
        logits_processor: Applied to drafts as to the model's own choices.

    Raises:
        UnsupportedError: the model has no MTP head, or the prompt came as embeddings.
    """

    requires_model_outputs = True

    def __init__(self, model: Any, generation_config: Any, logits_processor: Any, model_kwargs: dict[str, Any]) -> None:
        if model.mtp is None:
            raise UnsupportedError(
                "use_mtp=True needs an MTP head, which this model lacks (num_nextn_predict_layers=0); leave it out, or"
                " try prompt_lookup_num_tokens=3"
            )
        if model_kwargs.get("inputs_embeds") is not None:
            raise UnsupportedError("use_mtp=True drafts from token ids: give input_ids, not inputs_embeds")
        self.drafter = MTPDrafter(model, _draft_length(generation_config, model.config.num_nextn_predict_layers))
        self.do_sample, self.processor = generation_config.do_sample, logits_processor
        # All layers' hidden states only where the caller wants them.
        everything = generation_config.output_hidden_states
        self.model_kwargs_overrides = {} if everything else {"output_hidden_states": -1}

    def get_candidates(  # type: ignore[override]
        self,
        input_ids: Tensor,
        model_kwargs: dict[str, Any],
        model_outputs: Any,
        is_first_iteration: bool,
        n_last_matches: int,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`input_ids` [1, T] with drafts behind, and in sampling their logits [1, drafts, V]."""
        if is_first_iteration:
            return input_ids, None  # the model must read the prompt first
        hidden_BTD = model_outputs.hidden_states[-1]
        if self.drafter.ids_BT.shape[1] == 0:
            new_BT, hidden_BTD = _real(input_ids[:, -hidden_BTD.shape[1] - 1 :], hidden_BTD, model_kwargs)
        else:
            new_BT, hidden_BTD = input_ids[:, -n_last_matches - 1 :], hidden_BTD[:, : n_last_matches + 1]
        text_BT = input_ids[:, : input_ids.shape[1] - new_BT.shape[1] - self.drafter.ids_BT.shape[1]]

        def choose(ids_BT: Tensor, logits_BV: Tensor) -> Tensor:
            scores_BV = self.processor(torch.cat([text_BT, ids_BT], dim=1), logits_BV.float())
            scores.append(scores_BV)
            return torch.multinomial(scores_BV.softmax(-1), 1) if self.do_sample else scores_BV.argmax(-1, keepdim=True)

        scores: list[Tensor] = []
        drafts_BT = self.drafter.draft(new_BT, hidden_BTD, choose)
        candidates_BT = torch.cat([input_ids, drafts_BT], dim=1)
        return candidates_BT, torch.stack(scores, dim=1) if self.do_sample else None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """The draft length is constant."""


def _draft_length(generation_config: Any, heads: int) -> int:
    asked = generation_config.num_assistant_tokens
    # `generate` has filled in transformers' default by now, which is meant for a whole assistant model.
    if asked in (None, GenerationConfig._get_default_generation_params()["num_assistant_tokens"]):
        return heads if heads > 1 else DRAFTS
    if type(asked) is not int or not 1 <= asked <= JOURNAL:
        raise InputError(f"num_assistant_tokens={asked!r}: use_mtp=True drafts 1 to {JOURNAL} tokens at a time")
    return asked


def _real(ids_BT: Tensor, hidden_BTD: Tensor, model_kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Without padding, of which a single row may have some anywhere in front of the newest token."""
    mask_BT = model_kwargs.get("attention_mask")
    if mask_BT is None:
        return ids_BT, hidden_BTD
    real_T = mask_BT[0, -ids_BT.shape[1] :].bool()
    return ids_BT[:, real_T], hidden_BTD[:, real_T[:-1]]
