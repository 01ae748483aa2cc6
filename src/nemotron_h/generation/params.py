"""`SamplingParams`: how tokens are chosen and where a text ends. One table holds the ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemotron_h.errors import InputError, UnsupportedError
from nemotron_h.family.fields import INT_MAX, short

Check = Callable[[Any], bool]

MAX_STOPS, MAX_STOP_LENGTH = 64, 1024  # every token is compared with all of them


def _integer(low: int, high: int = INT_MAX, optional: bool = False) -> Check:
    return lambda v: (optional and v is None) or (type(v) is int and low <= v <= high)


def _number(low: float, high: float, open_low: bool = False) -> Check:
    """NaN fails every comparison, infinities fail one."""
    return lambda v: type(v) in (int, float) and (low < v if open_low else low <= v) and v <= high


def _stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    if texts is None:
        return True
    listed = isinstance(texts, list | tuple) and len(texts) <= MAX_STOPS
    return listed and all(isinstance(t, str) and 0 < len(t) <= MAX_STOP_LENGTH for t in texts)


def _ids(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple) and all(type(v) is int and v >= 0 for v in value))


def _bias(value: Any) -> bool:
    if value is None:
        return True
    number = _number(-100, 100)
    return isinstance(value, Mapping) and all(type(k) is int and k >= 0 and number(v) for k, v in value.items())


_RULES: dict[str, tuple[str, Check]] = {
    "max_tokens": (f"an integer from 1 to {INT_MAX}", _integer(1)),
    "temperature": ("a number from 0 to 100", _number(0, 100)),
    "top_p": ("a number in (0, 1]", _number(0, 1, open_low=True)),
    "top_k": (f"an integer from 0 (all) to {INT_MAX}", _integer(0)),
    "min_p": ("a number in [0, 1]", _number(0, 1)),
    "repetition_penalty": ("a number from 0.01 to 100", _number(0.01, 100)),
    "presence_penalty": ("a number from -100 to 100", _number(-100, 100)),
    "frequency_penalty": ("a number from -100 to 100", _number(-100, 100)),
    "seed": ("an integer from 0 to 2**62 or None", _integer(0, 2**62, optional=True)),
    "stop": (f"a text, a list of at most {MAX_STOPS} texts, each of 1 to {MAX_STOP_LENGTH} characters, or None", _stop),
    "stop_token_ids": ("a list of token ids, all integers >= 0, or None", _ids),
    "ignore_eos": ("True or False", lambda v: type(v) is bool),
    "logprobs": ("an integer from 0 to 1000 or None", _integer(0, 1000, optional=True)),
    "prompt_logprobs": ("an integer from 0 to 1000 or None", _integer(0, 1000, optional=True)),
    "logit_bias": ("a dict from token ids to numbers from -100 to 100, or None", _bias),
    "n": ("an integer from 1 to 1024", _integer(1, 1024)),
    "adapter": ("a text or None", lambda v: v is None or isinstance(v, str)),
}
_LATER = ("thinking_budget", "json_schema", "regex", "grammar")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens; `temperature=0` is greedy and deterministic, and so is any `seed`.

    Args:
        max_tokens: Most tokens to generate.
        temperature: Divides the logits; 0 takes the best token.
        top_p: Keep the smallest set of tokens whose probability reaches it.
        top_k: Keep the k best tokens; 0 keeps all.
        min_p: Keep tokens at least this fraction as probable as the best.
        repetition_penalty: Divides positive and multiplies negative logits of tokens in prompt and text.
        presence_penalty, frequency_penalty: Subtracted once, or per occurrence, for tokens in the text.
        seed: Makes sampling reproducible; sample i of `n` uses seed + i.
        stop: Text or texts that end generation and are not returned.
        stop_token_ids: Further tokens that end it, beside the checkpoint's.
        ignore_eos: Go on past the checkpoint's end tokens.
        logprobs, prompt_logprobs: Log-probabilities of that many best tokens, the actual one always among them.
        logit_bias: Added to the logits of single tokens.
        n: Samples per prompt.
        adapter: Name of one of the LLM's adapters; None is the model without any.

    Raises:
        InputError: naming the parameter, its value and its range.
        UnsupportedError: thinking_budget, json_schema, regex and grammar are not in this version.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    n: int = 1
    thinking_budget: int | None = None
    json_schema: Any = None
    regex: str | None = None
    grammar: str | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        for name in _LATER:
            if getattr(self, name) is not None:
                raise UnsupportedError(f"SamplingParams({name}=...) is not in this version; leave it out")
        for name, (rule, check) in _RULES.items():
            if not check(getattr(self, name)):
                raise InputError(f"{name}={short(getattr(self, name))}: must be {rule}")

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
