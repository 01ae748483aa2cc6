"""`LLM` against the model itself: tokens, ends, logprobs, errors; the text side is in test_streaming.py."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from scripting import hooked, scripted
from torch import Tensor

from helpers import assert_close, tiny_model
from nemotron_h import LLM, SamplingParams
from nemotron_h.errors import ConfigError, InputError, ModelNotFoundError, UnsupportedError
from nemotron_h.generation.batch import most_rows

PROMPT = [40, 1999, 300, 300, 17, 901]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


def logits_of(llm: LLM, ids: list[int]) -> Tensor:
    """One forward pass over everything, without a cache. [T, V]"""
    with torch.no_grad():
        return llm.model(torch.tensor([ids]), use_cache=False).logits[0]


def naive_greedy(llm: LLM, ids: list[int], steps: int) -> list[int]:
    ids = list(ids)
    for _ in range(steps):
        ids.append(int(logits_of(llm, ids)[-1].argmax()))
    return ids[-steps:]


# Which tokens


def test_greedy_is_the_naive_loop_and_transformers_generate(llm: LLM) -> None:
    written = llm.generate(PROMPT, GREEDY)[0].token_ids
    assert len(set(written)) > 8  # a model that repeats itself would prove little
    assert written == naive_greedy(llm, PROMPT, 16)
    generated = llm.model.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False)
    assert written == generated[0, len(PROMPT) :].tolist()


def test_seeds_make_texts_reproducible(llm: LLM) -> None:
    def sample(seed: int | None) -> list[int]:
        return llm.generate(PROMPT, SamplingParams(seed=seed, max_tokens=12, ignore_eos=True))[0].token_ids

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)
    assert sample(None) != sample(None)


def test_n_samples_are_those_of_the_following_seeds(llm: LLM) -> None:
    together = llm.generate(PROMPT, SamplingParams(n=3, seed=10, max_tokens=8, ignore_eos=True))[0]
    alone = [llm.generate(PROMPT, SamplingParams(seed=seed, max_tokens=8, ignore_eos=True))[0] for seed in (10, 11, 12)]
    assert [output.token_ids for output in together.outputs] == [result.token_ids for result in alone]
    assert len({tuple(output.token_ids) for output in together.outputs}) == 3
    assert (together.text, together.token_ids, together.finish_reason) == (alone[0].text, alone[0].token_ids, "length")
    assert together.usage.completion_tokens == 24


def test_one_result_per_prompt_in_any_form(llm: LLM) -> None:
    text = "The quick brown fox"
    ids = llm.tokenizer(text)["input_ids"]
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in (text, ids, tuple(PROMPT))]
    assert alone[0].prompt_token_ids == alone[1].prompt_token_ids == ids
    assert alone[0] == alone[1]
    assert llm.generate([text, PROMPT], GREEDY) == [alone[0], alone[2]]
    assert llm.generate([ids, PROMPT], GREEDY) == [alone[1], alone[2]]
    assert llm.generate((text,), [GREEDY]) == [alone[0]]


def test_params_may_be_one_for_all_or_one_each(llm: LLM) -> None:
    short, long = SamplingParams(max_tokens=1), SamplingParams(max_tokens=3, ignore_eos=True)
    assert [len(r.token_ids) for r in llm.generate([PROMPT, PROMPT], [long, short])] == [3, 1]
    assert [len(r.token_ids) for r in llm.generate([PROMPT, PROMPT], short)] == [1, 1]
    assert llm.generate(PROMPT)[0].finish_reason in ("stop", "length")  # the defaults
    with pytest.raises(InputError, match="1 params for 2 prompts"):
        llm.generate([PROMPT, PROMPT], [short])
    for wrong in ({"max_tokens": 1}, {}, 0, "greedy", [None]):
        with pytest.raises(InputError, match="SamplingParams"):
            llm.generate(PROMPT, wrong)  # type: ignore[arg-type]


# Where a text ends


def test_the_tokens_that_end_a_text(llm: LLM) -> None:
    assert llm.stop_token_ids == {2, 11, 5, 9, 7}  # the family's, generation_config's, the config's
    for end in sorted(llm.stop_token_ids):
        with scripted(llm, [300, end, 301, 302]) as calls:
            result = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=3))[0]
        assert (result.token_ids, result.finish_reason) == ([300, end], "stop")
        assert result.text == llm.tokenizer.decode([300])
        assert calls == [len(PROMPT), 1]  # nothing was computed behind the end
        with scripted(llm, [300, end, 301, 302]):
            going_on = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))[0]
        assert (going_on.token_ids, going_on.finish_reason) == ([300, end, 301], "length")


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_stop_token_ids_end_a_text_too(llm: LLM, ignore_eos: bool) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, stop_token_ids=[600, 301], ignore_eos=ignore_eos)
    with scripted(llm, [300, 301, 302]):
        result = llm.generate(PROMPT, params)[0]
    assert (result.token_ids, result.finish_reason, result.text) == ([300, 301], "stop", llm.tokenizer.decode([300]))


def test_end_tokens_beyond_a_small_vocabulary_do_not_count() -> None:
    assert LLM(tiny_model(vocab_size=9, eos_token_id=3)).stop_token_ids == {2, 3}
    assert LLM(tiny_model(vocab_size=2, eos_token_id=None)).stop_token_ids == set()


@pytest.mark.parametrize(("length", "tokens"), [(9, 1), (8, 2), (1, 9)])
def test_max_model_len_is_exact(llm: LLM, length: int, tokens: int) -> None:
    llm.max_model_len = 10
    result = llm.generate([40] * length, SamplingParams(max_tokens=20, ignore_eos=True))[0]
    assert (len(result.token_ids), result.finish_reason) == (tokens, "length")
    events = list(llm.stream([40] * length, SamplingParams(max_tokens=20, ignore_eos=True)))
    assert (len(events), events[-1].finish_reason) == (tokens, "length")


@pytest.mark.parametrize("length", [10, 11, 5000])
def test_prompt_without_room_for_text_is_refused(llm: LLM, length: int) -> None:
    llm.max_model_len = 10
    with pytest.raises(InputError, match=f"{length} tokens, max_model_len=10"):
        llm.generate([40] * length)


def test_default_length_is_the_configs(llm: LLM) -> None:
    assert llm.max_model_len == llm.config.max_position_embeddings == 512
    assert LLM(llm.model, max_model_len=7).max_model_len == 7


# Probabilities


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    params = SamplingParams(seed=1, max_tokens=6, logprobs=4, ignore_eos=True, temperature=0.7, presence_penalty=2.0)
    result = llm.generate(PROMPT, params)[0]
    expected_TV = logits_of(llm, PROMPT + result.token_ids)[len(PROMPT) - 1 : -1].log_softmax(-1)
    assert result.logprobs is not None
    for step_V, found, token in zip(expected_TV, result.logprobs, result.token_ids, strict=True):
        best = step_V.topk(4).indices.tolist()
        assert list(found) == (best if token in best else [*best, token])
        assert_close(torch.tensor(list(found.values())), step_V[list(found)])
    assert any(len(found) == 5 for found in result.logprobs)  # the sampled token beside the four best


def test_logprobs_are_not_rounded(llm: LLM) -> None:
    found = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=1, logprobs=3))[0].logprobs
    with torch.no_grad():
        exact_V = llm.model(torch.tensor([PROMPT]), logits_to_keep=1).logits[0, -1].log_softmax(-1)
    assert found is not None
    assert list(found[0].values()) == exact_V.topk(3).values.tolist()


def test_logprobs_of_the_chosen_token_alone_or_of_all(llm: LLM) -> None:
    params = SamplingParams(seed=5, max_tokens=4, logprobs=0, ignore_eos=True)
    result = llm.generate(PROMPT, params)[0]
    assert result.logprobs is not None
    assert [list(found) for found in result.logprobs] == [[token] for token in result.token_ids]
    assert llm.generate(PROMPT, GREEDY)[0].logprobs is None
    small = LLM(tiny_model(vocab_size=4))
    all_of_them = small.generate([1, 2], SamplingParams(max_tokens=1, logprobs=1000))[0].logprobs
    assert all_of_them is not None
    assert set(all_of_them[0]) == {0, 1, 2, 3}


def test_prompt_logprobs_and_score(llm: LLM) -> None:
    expected_TV = logits_of(llm, PROMPT)[:-1].log_softmax(-1)
    result = llm.generate(PROMPT, SamplingParams(max_tokens=2, prompt_logprobs=2, temperature=0))[0]
    found = result.prompt_logprobs
    assert found is not None
    assert found[0] is None
    for step_V, logprobs, token in zip(expected_TV, found[1:], PROMPT[1:], strict=True):
        best = step_V.topk(2).indices.tolist()
        assert logprobs is not None
        assert list(logprobs) == (best if token in best else [*best, token])
        assert_close(torch.tensor(list(logprobs.values())), step_V[list(logprobs)])
    assert result.token_ids == llm.generate(PROMPT, SamplingParams(max_tokens=2, temperature=0))[0].token_ids

    scores = llm.score([PROMPT, [40]])
    actual = expected_TV.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    assert scores[0][0] is None
    assert_close(torch.tensor(scores[0][1:]), actual)
    assert scores[1] == [None]


def test_score_takes_a_prompt_that_fills_the_context(llm: LLM) -> None:
    llm.max_model_len = 6
    assert len(llm.score(PROMPT)[0]) == 6
    with pytest.raises(InputError, match="7 tokens"):
        llm.score([*PROMPT, 1])


# Counters


def test_usage_and_stats(llm: LLM) -> None:
    before = llm.stats()
    result = llm.generate(PROMPT, SamplingParams(max_tokens=4, ignore_eos=True, n=2))[0]
    after = llm.stats()
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.cached_tokens) == (6, 8, 0)
    passes = 3 if most_rows(llm.model) != 1 else 2 * 3  # of both samples together, where kernels keep their bits
    assert after["steps"] - before["steps"] == 1 + passes  # the last token is not read again
    assert after["tokens"]["prefill"] - before["tokens"]["prefill"] == 6
    assert after["tokens"]["decode"] - before["tokens"]["decode"] == 6
    assert all(after["seconds"][phase] > before["seconds"][phase] for phase in ("prefill", "decode"))
    zero = ("drafted", "accepted", "free_blocks", "total_blocks", "cache_hits", "cache_bytes")
    assert [after[name] for name in zero] == [0] * 6


@pytest.mark.parametrize("fails", [False, True])
def test_threads_are_set_while_the_model_runs_and_restored(llm: LLM, fails: bool) -> None:
    seen, before = [], torch.get_num_threads()

    def hook(*_: Any) -> None:
        seen.append(torch.get_num_threads())
        if fails:
            raise KeyError

    llm.threads = before + 1
    with hooked(llm, hook), pytest.raises(KeyError) if fails else nullcontext():
        llm.generate(PROMPT, GREEDY)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


# Things that go wrong


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("step", [0, 2])
def test_logits_that_are_not_finite_end_this_text_only(llm: LLM, value: float, step: int) -> None:
    params = SamplingParams(seed=0, max_tokens=5, logprobs=0, ignore_eos=True)
    expected = llm.generate([PROMPT, PROMPT[::-1]], params)
    last = PROMPT if step == 0 else [expected[0].token_ids[step - 1]]  # what the model reads in that pass
    poisoned = []

    def poison(_module: Any, args: Any, output: Any) -> Any:
        if args[0][0].tolist() == last and not poisoned:
            output.logits[0, -1, 3] = value
            poisoned.append(step)
        return output

    with hooked(llm, poison):
        broken, neighbour = llm.generate([PROMPT, PROMPT[::-1]], params)
    assert broken.finish_reason == "error"
    assert "not finite" in str(broken.error)
    assert broken.token_ids == expected[0].token_ids[:step]
    assert broken.logprobs is not None
    assert len(broken.logprobs) == step
    assert neighbour == expected[1]
    assert neighbour.error is None


WRONG_PROMPTS: list[tuple[Any, str]] = [
    ("", "empty"),
    ([], "empty"),
    ([[]], "empty"),
    (["a", ""], "empty"),
    ([-1], r"\[0, 2048\)"),
    ([2048], r"\[0, 2048\)"),
    ([2**40], r"\[0, 2048\)"),
    ([10**5000], r"\[0, 2048\)"),
    ([1, "a"], "text or a list"),
    ([True, False], "text or a list"),
    ([1.0], "text or a list"),
    ([None], "text or a list"),
    ([[1, 2.0]], "text or a list"),
    ([[[1]]], "text or a list"),
    (None, "NoneType"),
    (5, "int"),
    (b"abc", "bytes"),
    ([b"abc"], "bytes"),
    ({"prompt": "a"}, "dict"),
    (torch.tensor([1, 2]), "Tensor"),
]


@pytest.mark.parametrize(("prompt", "message"), WRONG_PROMPTS)
def test_unusable_prompts(llm: LLM, prompt: Any, message: str) -> None:
    calls: list[Callable[[Any], Any]] = [llm.generate, llm.score]
    calls += [] if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [llm.stream]
    for call in calls:
        with pytest.raises(InputError, match=message):
            call(prompt)


@pytest.mark.parametrize(
    ("name", "value"), [("logit_bias", {2048: 1.0}), ("stop_token_ids", [3, 2048]), ("stop_token_ids", [10**5000])]
)
def test_token_ids_of_params_beyond_the_vocabulary(llm: LLM, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        llm.generate(PROMPT, SamplingParams(**{name: value}))
    with pytest.raises(InputError, match=name):
        llm.stream(PROMPT, SamplingParams(**{name: value}))


def test_bias_for_more_ids_than_there_are(llm: LLM) -> None:
    with pytest.raises(InputError, match="logit_bias has id 299999"):
        llm.generate(PROMPT, SamplingParams(logit_bias=dict.fromkeys(range(300_000), 0.0)))


@pytest.mark.parametrize(
    ("prompts", "params"),
    [
        ([PROMPT, [2048]], GREEDY),
        ([PROMPT, "\ud800"], GREEDY),
        ([PROMPT, [1] * 512], GREEDY),
        ([PROMPT, PROMPT], [GREEDY, SamplingParams(stop_token_ids=[2048])]),
        ([PROMPT, PROMPT], [GREEDY, None]),
        ([PROMPT], [GREEDY, GREEDY]),
    ],
)
def test_errors_come_before_any_work(llm: LLM, prompts: Any, params: Any) -> None:
    before = llm.stats()["steps"]
    with pytest.raises(InputError):
        llm.generate(prompts, params)
    assert llm.stats()["steps"] == before


def test_stream_writes_one_text(llm: LLM) -> None:
    with pytest.raises(InputError, match=r"params\.n is 2"):
        llm.stream(PROMPT, SamplingParams(n=2))


UNSUPPORTED: dict[str, Any] = {"speculative": "mtp"}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_options_of_later_versions(llm: LLM, name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        LLM(llm.model, **{name: UNSUPPORTED[name]})


def test_quantization_packs_a_checkpoint_and_never_the_callers_model(checkpoint: Path, llm: LLM) -> None:
    with pytest.raises(InputError, match=r"call model.quantize\('int4'\) first"):
        LLM(llm.model, quantization="int4")
    assert llm.model.dtype == next(iter(llm.model.parameters())).dtype
    for name in ("bf16", "int8", "int4"):
        packed = LLM(checkpoint, quantization=name)
        assert packed.model.model.layers[0].mixer.in_proj.packing.name == name
        assert packed.generate(PROMPT, GREEDY)[0].token_ids == packed.generate(PROMPT, GREEDY)[0].token_ids
    with pytest.raises(ConfigError, match="'int5' is not known: use bf16, int8, int4"):
        LLM(checkpoint, quantization="int5")


def test_one_thread_is_enough_for_a_small_model(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LLM(llm.model).threads == 1
    assert LLM(llm.model, threads=2).threads == 2
    monkeypatch.setattr("nemotron_h.generation.llm._SMALL", 1)
    assert LLM(llm.model).threads is None


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, float("inf")])
@pytest.mark.parametrize("name", ["threads", "max_model_len", "max_num_seqs"])
def test_unusable_options(llm: LLM, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name}=.*integer"):
        LLM(llm.model, **{name: value})


def test_models_that_cannot_be_loaded(checkpoint: Path, llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        LLM(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match="give the directory"):
        LLM(checkpoint / "config.json")
    with pytest.raises(UnsupportedError, match="GGUF"):
        LLM("model.gguf")
    for wrong in (None, 5, llm.model.model):
        with pytest.raises(InputError, match=type(wrong).__name__):
            LLM(wrong)  # type: ignore[arg-type]


def test_a_path_a_string_and_a_model_are_the_same(checkpoint: Path, llm: LLM) -> None:
    expected = llm.generate(PROMPT, GREEDY)[0].token_ids
    for source in (os.fspath(checkpoint), llm.model):
        assert LLM(source).generate(PROMPT, GREEDY)[0].token_ids == expected
    assert LLM(checkpoint, dtype="bfloat16").model.dtype == torch.bfloat16
