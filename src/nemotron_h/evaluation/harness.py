"""Our `LLM` as a model of lm-eval (extra `eval`): `simple_evaluate(model=NemotronHLM(llm), tasks=[...])`.

Importing this module registers the model name "nemotron_h" with lm-eval.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from nemotron_h.cache import NemotronHHybridDynamicCache
from nemotron_h.errors import InputError, UnsupportedError
from nemotron_h.generation import LLM, SamplingParams

_PASSED_ON = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


@register_model("nemotron_h")
class NemotronHLM(TemplateLM):
    """Log-likelihoods and texts of an `LLM`, request by request; a context that several continuations share is read
    once.

    Args:
        llm: An `LLM`, or what `LLM(...)` takes as its model.
        max_gen_toks: Longest text where a task does not say.
        kwargs: For `LLM(...)`, where `llm` is not one already; lm-eval's own (batch_size, device) are accepted.
    """

    def __init__(self, llm: Any, max_gen_toks: int = 256, **kwargs: Any) -> None:
        super().__init__()
        if not isinstance(llm, LLM):
            own = {name: value for name, value in kwargs.items() if name not in ("batch_size", "max_batch_size")}
            llm = LLM(llm, **{name: value for name, value in own.items() if value is not None})
        if llm.tokenizer is None:
            raise InputError("lm-eval needs a tokenizer, which this checkpoint lacks")
        self.llm, self.tokenizer, self.max_gen_toks = llm, llm.tokenizer, max_gen_toks

    @property
    def max_length(self) -> int:
        return self.llm.max_model_len

    @property
    def eot_token_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        return min(self.llm.stop_token_ids) if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer(string, verbose=False, **special)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise InputError(f"a continuation has {len(continuation)} tokens, the model reads {self.max_length}")
            groups[tuple((context + continuation)[-self.max_length - 1 :][: -len(continuation)])].append(index)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring continuations") as bar:
            for context, members in groups.items():
                read = self._read(context)
                for index in members:
                    results[index] = self._score(read, requests[index][2], last=index == members[-1])
                bar.update(len(members))
        return results

    @torch.no_grad()
    def _read(self, context: tuple[int, ...]) -> tuple[torch.Tensor, NemotronHHybridDynamicCache]:
        """Logits [1, V] behind the context, and the cache."""
        cache = NemotronHHybridDynamicCache(self.llm.config)
        ids_BT = torch.tensor([context], device=self.llm.model.device)
        return self.llm.model(ids_BT, past_key_values=cache, logits_to_keep=1).logits[0], cache

    @torch.no_grad()
    def _score(self, read: Any, continuation: list[int], last: bool) -> tuple[float, bool]:
        logits_TV, cache = read
        if len(continuation) > 1:
            own = cache if last else copy.deepcopy(cache)
            ids_BT = torch.tensor([continuation[:-1]], device=self.llm.model.device)
            logits_TV = torch.cat([logits_TV, self.llm.model(ids_BT, past_key_values=own).logits[0]])
        target_T = torch.tensor(continuation, device=logits_TV.device)
        chosen_T = logits_TV.log_softmax(-1).gather(-1, target_T[:, None])[:, 0]
        return float(chosen_T.double().sum()), bool((logits_TV.argmax(-1) == target_T).all())

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        results = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm, desc="Scoring texts"):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            results.append(sum(score for score, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        arguments = [request.args for request in requests]
        return [self._write(*pair) for pair in tqdm(arguments, disable=disable_tqdm, desc="Writing")]

    def _write(self, context: str, gen_kwargs: dict[str, Any]) -> str:
        options: dict[str, Any] = {**normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks)}
        until = handle_stop_sequences(options.pop("until", None), eos=None)
        room = self.max_length - options["max_gen_toks"]
        if room < 1:
            raise UnsupportedError(f"max_gen_toks={options['max_gen_toks']}: the model reads {self.max_length} tokens")
        sampled = bool(options.get("do_sample")) and options.get("temperature") != 0
        passed_on: dict[str, Any] = {
            name: options[name] for name in _PASSED_ON if sampled and options.get(name) is not None
        }
        chosen: dict[str, Any] = {"temperature": 0.0} | passed_on
        stops = [text for text in until if text] or None
        params = SamplingParams(max_tokens=options["max_gen_toks"], stop=stops, **chosen)
        return self.llm.generate([self.tok_encode(context)[-room:]], params)[0].text
