"""`LLM`: prompts in, texts out; several decode together (batch.py).

Letters: B rows · T tokens · V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron_h.adapters.active import ActiveAdapters
from nemotron_h.cache import NemotronHHybridDynamicCache
from nemotron_h.errors import InputError, ModelNotFoundError, UnsupportedError
from nemotron_h.family.fields import short
from nemotron_h.generation.batch import Batch, Stats, most_rows, prompt_logits
from nemotron_h.generation.params import SamplingParams
from nemotron_h.generation.results import Event, Result
from nemotron_h.generation.sequence import Request
from nemotron_h.generation.text import Text
from nemotron_h.modeling import NemotronHForCausalLM
from nemotron_h.quantization import is_packed

Prompt = str | Sequence[int]

# Base checkpoints declare 11 (<|im_end|>, <SPECIAL_11>) and end documents with 2 (</s>); chat ones the other way round.
FAMILY_STOP_IDS = (2, 11)
_NOTHING_ELSE = {"output_hidden_states": False, "output_attentions": False, "output_router_logits": False}
_SMALL = 2**22  # elements of the largest matrix; docs/log.md has the measurement


class LLM:
    """A model ready to write.

    Args:
        model: Checkpoint directory, hub id, or a `NemotronHForCausalLM`.
        dtype: "auto" keeps the checkpoint's.
        device: Where the model runs.
        threads: CPU threads while generating; None is torch's setting, but one for a model too small to gain from more.
        max_model_len: Longest prompt plus text; None is the config's `max_position_embeddings`.
        adapters: Adapters side by side, name to directory or hub id; a request chooses one by
            `SamplingParams(adapter=name)`, and without it the model writes as it would without adapters. A model given
            as an object is wrapped in place, its weights frozen (`load_adapter`).
        quantization: "bf16", "int8" or "int4" packs the weights of a checkpoint while they are read; None takes them as
            they are, packed ones included. A model in memory has `model.quantize("int4")`.
        max_num_seqs: Most texts that decode together, samples of one prompt included; others wait until one ends. It
            changes no token and no probability: no more go together than kernels take without changing a row's bits,
            which is fewer for plain weights than for packed ones. With adapters, in float16 and float64, off the CPU,
            and with modules or hooks of your own inside the blocks, one text is written after the other.
        speculative: Not in this version (`UnsupportedError`).
        prefix_cache, num_speculative_tokens: Accepted; this engine has neither.

    Raises:
        ModelNotFoundError, CheckpointError, ConfigError: as `NemotronHForCausalLM.from_pretrained`; for adapters as
            `load_adapter`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | NemotronHForCausalLM,
        quantization: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        threads: int | None = None,
        max_num_seqs: int = 16,
        max_model_len: int | None = None,
        prefix_cache: bool = True,
        speculative: str | None = None,
        num_speculative_tokens: int = 3,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    ) -> None:
        if speculative:
            raise UnsupportedError(f"LLM(speculative={speculative!r}) is not in this version; leave it out")
        for name, value in {"threads": threads, "max_model_len": max_model_len}.items():
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name}={short(value)}: must be an integer >= 1 or None")
        if type(max_num_seqs) is not int or max_num_seqs < 1:
            raise InputError(f"max_num_seqs={short(max_num_seqs)}: must be an integer >= 1")
        if isinstance(model, NemotronHForCausalLM):
            self.model, self._text = model, Text(None)
            if quantization is not None:  # would pack the caller's own model
                raise InputError(
                    f"LLM(model, quantization={quantization!r}): call model.quantize({quantization!r}) first"
                )
        elif not isinstance(model, str | os.PathLike):
            raise InputError(f"model must be a path, a hub id or a NemotronHForCausalLM, got {type(model).__name__}")
        else:
            name = os.fspath(model)
            if name.endswith(".gguf"):
                raise UnsupportedError(f"{name}: GGUF files are not read by this version")
            if Path(name).is_file():
                raise ModelNotFoundError(f"{name}: a file; give the directory that holds config.json and the weights")
            self.model = NemotronHForCausalLM.from_pretrained(name, dtype=dtype, quantization=quantization).to(device)
            self._text = Text.load(name)
        self.model.eval()
        self._adapters = ActiveAdapters(self.model, adapters) if adapters else None
        self.threads = 1 if threads is None and _is_small(self.config) else threads
        self.max_model_len = max_model_len or self.model.config.max_position_embeddings
        self.max_num_seqs = max_num_seqs
        self._stats = Stats()

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names for `SamplingParams(adapter=...)`."""
        return self._adapters.names if self._adapters is not None else ()

    def merge_adapter(self, name: str) -> None:
        """Put an adapter into the weights: every request has it from now on, at the speed of the plain model, and the
        other adapters are gone. Raises `InputError` for an unknown name."""
        self._check_adapter(name)
        assert self._adapters is not None
        if is_packed(getattr(self.config, "quantization_config", None)):
            raise UnsupportedError(
                "merge_adapter: packed weights take no changes; merge the adapter into the plain checkpoint, save that,"
                " and pack it while loading"
            )
        self.model, self._adapters = self._adapters.merge(name), None

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, or None."""
        return self._text.tokenizer

    @property
    def stop_token_ids(self) -> set[int]:
        """Tokens that end a text: generation_config's, the config's, and the family's."""
        ids: set[int] = {i for i in FAMILY_STOP_IDS if i < self.config.vocab_size}
        for declared in (self.model.generation_config.eos_token_id, self.config.eos_token_id):
            ids |= set(declared if isinstance(declared, list | tuple) else [] if declared is None else [declared])
        return ids

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Result]:
        """One `Result` per prompt, in order.

        Args:
            prompts: A text, a list of token ids, or a list of either.
            params: For all prompts, or one for each. Default: `SamplingParams()`.

        Raises:
            InputError: an empty prompt, ids outside the vocabulary, a prompt beyond `max_model_len`.
        """
        listed = _as_list(prompts)
        params = SamplingParams() if params is None else params
        chosen: list[Any] = list(params) if isinstance(params, list | tuple) else [params] * len(listed)
        if len(chosen) != len(listed):
            raise InputError(f"{len(chosen)} params for {len(listed)} prompts: give one for all, or one for each")
        for p in chosen:
            self._check_params(p)
        encoded = [self._encode(prompt) for prompt in listed]  # all errors before any work
        requests = [self._request(ids, p) for ids, p in zip(encoded, chosen, strict=True)]
        for adapter in dict.fromkeys(p.adapter for p in chosen):  # which a pass can have only one of
            own = [request for request in requests if request.params.adapter == adapter]
            for _ in self._batch(own, adapter).run(own):
                pass
        return [request.result() for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Event]:
        """The text of one prompt while it grows; `Event.text` pieces joined are `Result.text`. Errors as `generate`."""
        params = SamplingParams() if params is None else params
        self._check_params(params)
        ids = self._encode(prompt)
        if params.n != 1:
            raise InputError(f"stream() writes one text, params.n is {params.n}")
        request = self._request(ids, params)
        batch = self._batch([request], params.adapter)
        batch.read(request)
        return (event for _, event in batch.run([request]))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Result:
        """The assistant's next turn, by the checkpoint's chat template; special tokens in messages are plain text."""
        return self.generate([self.encode_chat(messages, tools, chat_template_kwargs)], params)[0]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, for `generate` and `stream`."""
        return self._text.encode_chat(messages, tools, chat_template_kwargs or {})

    def score(self, prompts: Prompt | Sequence[Prompt]) -> list[list[float | None]]:
        """Log-probability of every prompt token given those before it; None for the first."""
        scores = []
        for ids in [self._encode(prompt, room=0) for prompt in _as_list(prompts)]:
            found: list[float | None] = [None]
            cache = NemotronHHybridDynamicCache(self.config)
            for logits_TV, next_ids in prompt_logits(partial(self._forward, adapter=None), self.config, ids, cache):
                next_T = torch.tensor(next_ids, dtype=torch.long)
                actual = logits_TV[: len(next_ids)].log_softmax(-1).gather(1, next_T[:, None])
                found += actual[:, 0].tolist()
            scores.append(found)
        return scores

    def stats(self) -> dict[str, Any]:
        """Counters since the start; those of features that this engine lacks are 0."""
        s = self._stats
        phases = {"prefill": s.prefill, "decode": s.decode}
        return {
            "steps": s.steps,
            "drafted": 0,
            "accepted": 0,
            "free_blocks": 0,
            "total_blocks": 0,
            "cache_hits": 0,
            "cache_bytes": 0,
            "tokens": {name: phase.tokens for name, phase in phases.items()},
            "seconds": {name: phase.seconds for name, phase in phases.items()},
        }

    # Checking

    def _encode(self, prompt: Any, room: int = 1) -> list[int]:
        """Token ids of a prompt that leaves `room` tokens for text."""
        limit = self.max_model_len - room
        if isinstance(prompt, str):
            if self.tokenizer is not None and self._text.fewest_tokens(prompt) > limit:
                raise InputError(_too_long(f"{self._text.fewest_tokens(prompt)} tokens or more", self.max_model_len))
            ids = self._text.encode(prompt)
        elif isinstance(prompt, list | tuple) and all(type(i) is int for i in prompt):
            ids = list(prompt)
        else:
            raise InputError(f"a prompt must be a text or a list of token ids, got {type(prompt).__name__}")
        if not ids:
            raise InputError("the prompt is empty: give at least one token")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            low, high = short(min(ids)), short(max(ids))
            raise InputError(f"token ids must lie in [0, {self.config.vocab_size}), got {low} to {high}")
        if len(ids) > limit:
            raise InputError(_too_long(f"{len(ids)} tokens", self.max_model_len))
        return ids

    def _check_params(self, params: SamplingParams) -> None:
        if not isinstance(params, SamplingParams):
            raise InputError(f"params must be SamplingParams, got {type(params).__name__}")
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if ids and max(ids) >= self.config.vocab_size:
                end = self.config.vocab_size - 1
                raise InputError(f"{name} has id {short(max(ids))}, the vocabulary ends at {end}")
        self._check_adapter(params.adapter)
        if params.stops and self.tokenizer is None:
            raise InputError("stop texts need a tokenizer, which this checkpoint lacks: use stop_token_ids")

    def _check_adapter(self, name: str | None) -> None:
        if name is not None and name not in self.adapters:
            known = ", ".join(self.adapters) or "no adapters: give them as LLM(..., adapters={name: path})"
            raise InputError(f"adapter={short(name)}: this LLM has {known}")

    # Running

    def _request(self, ids: list[int], params: SamplingParams) -> Request:
        ends = set(params.stop_token_ids or []) | (set() if params.ignore_eos else self.stop_token_ids)
        return Request(ids, params, self._text, ends, min(params.max_tokens, self.max_model_len - len(ids)))

    def _batch(self, requests: Iterable[Request], adapter: str | None) -> Batch:
        """For requests with this adapter."""
        seats = min(self.max_num_seqs, sum(request.params.n for request in requests))
        limit = most_rows(self.model) if seats > 1 else None
        return Batch(
            self.config,
            partial(self._forward, adapter=adapter),
            self._stats,
            seats if limit is None else min(seats, limit),
        )

    @torch.no_grad()
    def _forward(
        self, ids: list[list[int]], cache: NemotronHHybridDynamicCache | None, all_logits: bool, adapter: str | None
    ) -> Tensor:
        """Float32 logits [B, T or 1, V] on the CPU; the cache is extended."""
        input_ids = torch.tensor(ids, dtype=torch.long, device=self.model.device)
        with self._adapters.using(adapter) if self._adapters else nullcontext(), _threads(self.threads):
            out = self.model(
                input_ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=0 if all_logits else 1,
                **_NOTHING_ELSE,
            )  # fmt: skip
        self._stats.steps += 1
        return out.logits.float().cpu()


def _too_long(tokens: str, max_model_len: int) -> str:
    return f"the prompt has {tokens}, max_model_len={max_model_len} leaves no room for text: give a shorter prompt"


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise InputError(
            f"prompts must be a text, a list of token ids, or a list of either, got {type(prompts).__name__}"
        )
    if not prompts:
        raise InputError("the prompt is empty: give a text, a list of token ids, or a list of either")
    return [prompts] if all(type(i) is int for i in prompts) else list(prompts)


def _is_small(config: Any) -> bool:
    """Whether a second thread gains nothing, and its barriers cost much where another process shares the core."""
    return config.vocab_size * config.hidden_size < _SMALL


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    if count is None or count == torch.get_num_threads():
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
