"""generation_config.json: values of the wrong type are refused when a model loads, not deep inside `generate`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from nemotron_h.errors import CheckpointError
from nemotron_h.family.fields import boolean, integer, number, short, token_ids
from nemotron_h.strict_json import load_json


def check_generation_config(file: Path) -> None:
    """Raises CheckpointError, one line naming file, key, value and rule, for what `generate` could not act on.

    Keys that are not in the table below are left to transformers.
    """
    values = load_json(file, "generation config")
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: must hold an object, holds a {type(values).__name__}")
    for key, value in values.items():
        rule = _RULES[key](value) if key in _RULES and value is not None else None
        if rule is not None:
            raise CheckpointError(f"{file}: {key}={short(value)}: must be {rule}")
    try:
        GenerationConfig.from_dict(values)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {str(error).splitlines()[0]}") from error


def _early_stopping(value: Any) -> str | None:
    return None if type(value) is bool or value == "never" else "true, false or 'never'"


def _texts(value: Any) -> str | None:
    listed = isinstance(value, list) and all(isinstance(text, str) for text in value)
    return None if isinstance(value, str) or listed else "a text or a list of texts"


def _id_list(value: Any) -> str | None:
    return None if value == [] or (isinstance(value, list) and token_ids(value) is None) else "a list of token ids"


def _id_lists(value: Any) -> str | None:
    fits = isinstance(value, list) and value and all(isinstance(v, list) and token_ids(v) is None for v in value)
    return None if fits else "a non-empty list of lists of token ids"


_ANY = number(-math.inf, math.inf, open_low=True, open_high=True)
_NOT_NEGATIVE = number(0, math.inf, open_high=True)
_POSITIVE = number(0, math.inf, open_low=True, open_high=True)
_SHARE = number(0, 1)
_RULES: dict[str, Callable[[Any], str | None]] = (
    dict.fromkeys(("max_length", "max_new_tokens", "num_beams", "num_beam_groups", "num_return_sequences",
                   "prompt_lookup_num_tokens", "max_matching_ngram_size"), integer(1))
    | dict.fromkeys(("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size", "bos_token_id", "pad_token_id",
                     "encoder_no_repeat_ngram_size", "forced_bos_token_id", "decoder_start_token_id"), integer(0))
    | dict.fromkeys(("eos_token_id", "forced_eos_token_id"), token_ids)
    | dict.fromkeys(("temperature", "penalty_alpha", "diversity_penalty"), _NOT_NEGATIVE)
    | dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "max_time"), _POSITIVE)
    | dict.fromkeys(("length_penalty", "guidance_scale"), _ANY)
    | dict.fromkeys(("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"), _SHARE)
    | dict.fromkeys(("do_sample", "use_cache", "use_mtp", "renormalize_logits", "remove_invalid_values",
                     "return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
                     "output_hidden_states"), boolean)
    | dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _id_list)
    | {"bad_words_ids": _id_lists, "stop_strings": _texts, "early_stopping": _early_stopping}
)  # fmt: skip
