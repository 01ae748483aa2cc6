"""`LLM.generate` on a list: texts that decode together are, bit for bit, those that each prompt has alone."""

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scripting import hooked
from torch import nn

from helpers import tiny_model
from nemotron_h import LLM, NemotronHForCausalLM, NemotronHHybridDynamicCache, SamplingParams, peft_compat
from nemotron_h.cache import AttentionLayer, BatchCache, MambaLayer
from nemotron_h.errors import UnsupportedError
from nemotron_h.generation import Result
from nemotron_h.generation.batch import Batch, most_rows
from nemotron_h.generation.sampler import Sampler
from nemotron_h.ops import _native, block_step
from nemotron_h.ops.linear import native as linear

MODELS: dict[str, tuple[dict[str, Any], torch.dtype, str | None]] = {
    "float32": ({}, torch.float32, None),
    "bfloat16": ({"sliding_window": 3}, torch.bfloat16, None),
    "int4": ({}, torch.bfloat16, "int4"),
    "int8, float32": ({"moe_latent_size": 24, "attention_bias": True, "mlp_bias": True}, torch.float32, "int8"),
    "bf16 panels": ({"hybrid_override_pattern": "M*EM*-M", "residual_in_fp32": True}, torch.bfloat16, "bf16"),
    "states in bfloat16": ({"mamba_ssm_cache_dtype": "bfloat16"}, torch.bfloat16, "int4"),
    "Mamba alone": ({"hybrid_override_pattern": "MM"}, torch.float32, None),
    "attention alone": ({"hybrid_override_pattern": "*-*"}, torch.bfloat16, "int8"),
}


def made(name: str) -> NemotronHForCausalLM:
    changes, dtype, quantization = MODELS[name]
    model = tiny_model(eos_token_id=7, max_position_embeddings=64, **changes).to(dtype).eval()
    if quantization is not None:
        model.quantize(quantization)
    return model


@pytest.fixture(autouse=True)
def unchecked(environment: Callable[..., None]) -> None:
    """Texts decode together only where nobody asked for a check of every op."""


@contextmanager
def passes(llm: LLM) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens of every pass of the model."""
    seen: list[tuple[int, int]] = []
    with hooked(llm, lambda _module, args, _output: seen.append(tuple(args[0].shape))):
        yield seen


def draw_params(rng: random.Random, **fixed: Any) -> SamplingParams:
    drawn: dict[str, Any] = {
        "max_tokens": rng.choice((1, 2, 3, 5, 8, 13)),
        "temperature": rng.choice((0, 0, 0.6, 1.0, 1.7)),
        "seed": rng.randrange(1000),
        "n": rng.choice((1, 1, 1, 2, 5)),
        "ignore_eos": rng.random() < 0.5,
        "logprobs": rng.choice((None, 0, 3)),
        "prompt_logprobs": rng.choice((None, None, 1)),
        "stop_token_ids": rng.choice((None, rng.sample(range(50), 4))),
    }
    for name, values in {
        "top_k": (0, 3), "top_p": (1.0, 0.8), "min_p": (0.0, 0.05), "repetition_penalty": (1.0, 1.3),
        "presence_penalty": (0.0, 0.7), "frequency_penalty": (0.0, 0.4), "logit_bias": (None, {3: 2.0, 11: -1.0}),
    }.items():  # fmt: skip
        drawn[name] = rng.choice(values)
    return SamplingParams(**{**drawn, **fixed})


def draw_prompts(rng: random.Random, count: int, vocabulary: int = 50) -> list[list[int]]:
    return [[rng.randrange(vocabulary) for _ in range(rng.choice((1, 2, 3, 5, 9, 17, 40)))] for _ in range(count)]


def alone(llm: LLM, prompt: Any, params: SamplingParams) -> Result:
    """The result of a call for each sample: one sequence, which keeps the cache of its prompt."""
    results = []
    for sample in range(params.n):
        with passes(llm) as seen:
            seed = None if params.seed is None else params.seed + sample
            results += llm.generate([prompt], replace(params, n=1, seed=seed))
        assert {rows for rows, _ in seen} == {1}
    outputs = [result.outputs[0] for result in results]
    usage = replace(results[0].usage, completion_tokens=sum(len(output.token_ids) for output in outputs))
    return replace(results[0], outputs=outputs, usage=usage)


def assert_same(found: list[Result], expected: list[Result]) -> None:
    """Dataclasses of numbers: equal where every bit is (no logarithm here is a zero with a sign or NaN)."""
    assert [result.prompt_token_ids for result in found] == [result.prompt_token_ids for result in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == other


@pytest.mark.parametrize("name", MODELS)
def test_bits_of_each_alone(name: str) -> None:
    model, rng = made(name), random.Random(name)
    llm, reasons = LLM(model), set()
    for seats in (2, 3, 16, 16):
        prompts = draw_prompts(rng, rng.choice((2, 5, 14)))
        params = [draw_params(rng) for _ in prompts]
        expected = [alone(llm, *each) for each in zip(prompts, params, strict=True)]
        llm.max_num_seqs = seats
        with passes(llm) as seen:
            assert_same(llm.generate(prompts, params), expected)
        prefills = [(1, len(prompt)) for prompt in prompts]
        assert sorted(each for each in seen if each[1] > 1) == sorted(each for each in prefills if each[1] > 1)
        assert max(rows for rows, _ in seen) <= seats
        reasons |= {output.finish_reason for result in expected for output in result.outputs}
    assert reasons == {"stop", "length"}


def test_texts_of_a_tokenizer_and_their_stop_texts(llm: LLM) -> None:
    rng, seats = random.Random(0), llm.max_num_seqs
    prompts: list[Any] = ["The quick brown fox", *draw_prompts(rng, 8, 2048), "Once"]
    plain = [SamplingParams(seed=i, max_tokens=12, logprobs=1, ignore_eos=i % 2 == 0) for i in range(len(prompts))]
    params = []
    for prompt, chosen in zip(prompts, plain, strict=True):
        text = alone(llm, prompt, chosen).text
        params.append(replace(chosen, stop=["nowhere", text[len(text) // 2 :][:3] or "never"], n=2))
    expected = [alone(llm, *each) for each in zip(prompts, params, strict=True)]
    assert sum(result.finish_reason == "stop" for result in expected) > 4
    try:
        for llm.max_num_seqs in (3, 16):
            assert_same(llm.generate(prompts, params), expected)
    finally:
        llm.max_num_seqs = seats


# Together


def simulated(lengths: list[int], seats: int) -> list[int]:
    """Rows of each decode step, for texts that end after so many tokens: who waits takes the first free seat."""
    waiting, going, rows = list(lengths), [], []
    while waiting or going:
        while waiting and len(going) < seats:
            tokens = waiting.pop(0) - 1  # the prompt's pass says the first
            going += [tokens] if tokens else []
        if going:
            rows.append(len(going))
        going = [tokens - 1 for tokens in going if tokens > 1]
    return rows


@pytest.mark.parametrize("seats", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("name", ["float32", "int4"])
def test_a_step_has_a_row_for_every_text_that_has_not_ended(name: str, seats: int) -> None:
    llm = LLM(made(name), max_num_seqs=seats)
    most = min(seats, most_rows(llm.model) or seats)
    rng, start = random.Random(seats), llm.stats()
    for _ in range(4):
        prompts = draw_prompts(rng, rng.randrange(1, 20))
        params = [
            SamplingParams(temperature=0, ignore_eos=True, max_tokens=rng.randrange(1, 9), n=rng.choice((1, 1, 3)))
            for _ in prompts
        ]
        lengths = [p.max_tokens for p in params for _ in range(p.n)]
        before = llm.stats()
        with passes(llm) as seen:
            llm.generate(prompts, params)
        after = llm.stats()
        steps, expected = [rows for rows, _ in seen], simulated(lengths, min(most, len(lengths)))
        assert len(seen) == len(prompts) + len(expected) == after["steps"] - before["steps"]
        assert sorted(steps) == sorted([1] * len(prompts) + expected)
        assert after["tokens"]["decode"] - before["tokens"]["decode"] == sum(expected) == sum(lengths) - len(lengths)
        assert after["tokens"]["prefill"] - before["tokens"]["prefill"] == sum(map(len, prompts))
        assert max(steps) <= seats
    for phase in ("prefill", "decode"):
        assert llm.stats()["seconds"][phase] > start["seconds"][phase]


def test_a_prompt_is_read_once_for_all_its_samples() -> None:
    llm = LLM(made("float32"), max_num_seqs=2)
    with passes(llm) as seen:
        (result,) = llm.generate([[1, 2, 3]], SamplingParams(n=9, seed=4, max_tokens=4, ignore_eos=True))
    assert seen.count((1, 3)) == 1
    assert result == alone(llm, [1, 2, 3], SamplingParams(n=9, seed=4, max_tokens=4, ignore_eos=True))
    assert len({tuple(output.token_ids) for output in result.outputs}) > 5


def test_many_samples_of_a_prompt_hold_it_only_while_they_grow() -> None:
    llm, kept = LLM(made("float32"), max_num_seqs=2), []
    with hooked(llm, lambda _module, args, _output: kept.append(alive(Sampler) - args[0].shape[0])):
        gc.collect()
        before = alive(Sampler)
        llm.generate([[1, 2, 3]], SamplingParams(n=9, seed=4, max_tokens=3, ignore_eos=True))
    assert set(kept[1:]) == {before}  # one for each row


def test_how_many_rows_keep_their_bits(environment: Callable[..., None]) -> None:
    steps = block_step.MOST_ROWS if _native.levels() else 1
    assert most_rows(made("float32")) == min(steps, linear.MOST_ROWS)
    model = made("int4")
    assert most_rows(model) == steps
    for changed in ({"mamba_ssm_cache_dtype": "float16"}, {"mlp_hidden_act": "silu"}):
        assert most_rows(tiny_model(**changed).bfloat16()) == 1
    assert most_rows(tiny_model().double()) == most_rows(tiny_model().half()) == 1
    for name in ("model.norm_f", "lm_head", "model.layers.0.mixer.norm", "model.layers.2.mixer.q_proj"):
        handle = model.get_submodule(name).register_forward_hook(lambda *_: None)
        assert most_rows(model) == 1
        handle.remove()
    assert most_rows(model) == steps
    for changes in ({"IMPL": "reference"}, {"CHECK": "1"}):
        environment(**{f"NEMOTRON_H_{name}": value for name, value in changes.items()})
        assert most_rows(model) == 1
        environment(**{f"NEMOTRON_H_{name}": "" for name in changes})
    for changed in ("lm_head", "model.norm_f", "model.layers.1", "model.layers.3.mixer"):
        model = made("int4")
        parent, _, leaf = changed.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Sequential(model.get_submodule(changed)))
        assert most_rows(model) == 1, changed


class Positions(nn.Module):
    """Attention of somebody's own, which asks the cache for all keys and the layout for the past."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_BTD: Any, layout: Any, cache: Any) -> Any:
        k_BKTd = self.inner.k_proj(x_BTD).unflatten(-1, (-1, self.inner.head_dim)).transpose(1, 2)
        keys, _ = cache.append(k_BKTd, k_BKTd)
        assert keys.shape[2] == layout.past + layout.tokens
        return x_BTD * keys.mean()


def test_modules_of_your_own_have_a_cache_of_one_text() -> None:
    model = tiny_model()
    model.model.layers[2].mixer = Positions(model.model.layers[2].mixer)
    llm, params = LLM(model), SamplingParams(temperature=0, max_tokens=4, n=2)
    prompts = draw_prompts(random.Random(1), 5)
    with passes(llm) as seen:
        found = llm.generate(prompts, params)
    assert {rows for rows, _ in seen} == {1}
    assert_same(found, [alone(llm, prompt, params) for prompt in prompts])


def test_adapters_never_share_a_step(tmp_path_factory: pytest.TempPathFactory) -> None:
    paths = {}
    for seed, name in enumerate(("a", "b")):
        model = tiny_model()
        with peft_compat(model):
            adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj", "in_proj"]))
        torch.manual_seed(seed)
        for key, tensor in adapted.named_parameters():
            if "lora_" in key:
                nn.init.normal_(tensor, std=0.2)
        paths[name] = tmp_path_factory.mktemp(name)
        adapted.save_pretrained(paths[name])
    llm = LLM(tiny_model(), adapters=paths)
    rng, now = random.Random(3), []
    prompts = draw_prompts(rng, 12)
    params = [draw_params(rng, adapter=rng.choice((None, "a", "b"))) for _ in prompts]
    expected = [alone(llm, *each) for each in zip(prompts, params, strict=True)]
    assert llm._adapters is not None
    switch = llm._adapters._switch
    llm._adapters._switch = lambda name: (now.append(name), switch(name))[1]  # type: ignore[method-assign]
    assert_same(llm.generate(prompts, params), expected)
    assert len(now) == len(set(now)) <= 3  # one group after the other
    assert len({str(alone(llm, [1, 2, 3], SamplingParams(seed=1, adapter=name))) for name in (None, "a", "b")}) == 3


# Things that go wrong


@pytest.mark.parametrize("name", ["float32", "int4", "int8, float32"])
def test_a_text_whose_numbers_break_does_not_touch_its_neighbours(name: str) -> None:
    llm, rng = LLM(made(name), max_num_seqs=4), random.Random(5)
    prompts = [[token] for token in rng.sample(range(50), 10)]
    params = SamplingParams(temperature=0.8, seed=2, max_tokens=10, logprobs=2, ignore_eos=True)
    expected = [alone(llm, prompt, params) for prompt in prompts]
    for victim, step in ((0, 1), (3, 4), (9, 2), (5, 0)):
        with broken_at(llm, prompts[victim][0], step):
            found = llm.generate(prompts, params)
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            if index != victim:
                assert one == other
        assert found[victim].finish_reason == "error"
        assert "not finite" in str(found[victim].error)
        assert found[victim].token_ids == expected[victim].token_ids[:step]
        assert (found[victim].logprobs or []) == (expected[victim].logprobs or [])[:step]
    assert_same(llm.generate(prompts, params), expected)


@contextmanager
def broken_at(llm: LLM, prompt: int, step: int) -> Iterator[None]:
    """Behind the embedding, NaN for the text of this prompt in the pass that decides its token `step`."""
    rows: list[list[int]] = []
    read, settle = Batch.read, Batch._settle

    def reading(self: Batch, request: Any) -> None:
        rows[:] = [request.ids]
        read(self, request)

    def settling(self: Batch, joining: Any) -> None:
        settle(self, joining)
        rows[:] = [sequence.sampler.said for sequence in self.rows]

    def poison(_module: Any, _args: Any, output: Any) -> Any:
        bad = [said[0] == prompt and len(said) == 1 + step for said in rows]
        return torch.where(torch.tensor(bad)[:, None, None], torch.nan, output)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "read", reading)
        patch.setattr(Batch, "_settle", settling)
        handle = llm.model.model.embeddings.register_forward_hook(poison)
        try:
            yield
        finally:
            handle.remove()


def test_an_interrupted_call_leaves_nothing_behind() -> None:
    llm, rng = LLM(made("int4"), max_num_seqs=3), random.Random(8)
    prompts = [[token, 4] for token in range(5)]
    params = [SamplingParams(seed=1, max_tokens=rng.randrange(1, 5), ignore_eos=True, n=1 + i % 2) for i in range(5)]
    expected = [alone(llm, *each) for each in zip(prompts, params, strict=True)]
    with passes(llm) as seen:
        llm.generate(prompts, params)
    gc.collect()
    before = alive(AttentionLayer)
    for last in range(len(seen)):
        counted: list[int] = []

        def interrupt(*_: Any, counted: list[int] = counted, last: int = last) -> None:
            counted.append(1)
            if len(counted) > last:
                raise KeyboardInterrupt

        for where in (llm.model, llm.model.model.norm_f):
            counted.clear()
            handle = where.register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(prompts, params)
            handle.remove()
    gc.collect()
    assert alive(AttentionLayer) == before
    assert_same(llm.generate(prompts, params), expected)


def alive(kind: type) -> int:
    return sum(issubclass(type(thing), kind) for thing in gc.get_objects())  # isinstance would ask for __class__


def test_a_text_that_ended_holds_no_memory() -> None:
    llm, rng = LLM(made("int4"), max_num_seqs=3), random.Random(9)
    prompts = draw_prompts(rng, 9)
    params = [SamplingParams(temperature=0, max_tokens=rng.randrange(1, 9), ignore_eos=True) for _ in prompts]
    gc.collect()
    before = alive(AttentionLayer)
    kept: list[bool] = []

    def count(_module: Any, args: Any, output: Any) -> None:
        cache = output.past_key_values
        rows = cache.layers[2].rows if isinstance(cache, BatchCache) else []
        if rows:
            kept.append(alive(AttentionLayer) - before == len(rows) == args[0].shape[0])
            states = [layer.recurrent_states for layer in cache.layers if isinstance(layer, MambaLayer)]
            assert all(state.untyped_storage().nbytes() <= 3 * state[0].nbytes for state in states)

    with hooked(llm, count):
        llm.generate(prompts, params)
    assert all(kept)
    assert (not kept) == (most_rows(llm.model) == 1)
    assert alive(AttentionLayer) == before


def test_streams_are_what_they_were_and_may_lie_between() -> None:
    llm = LLM(made("int4"), max_num_seqs=4)
    params = SamplingParams(seed=6, max_tokens=8, logprobs=1, ignore_eos=True)
    expected = [alone(llm, prompt, params) for prompt in ([1, 2], [3, 4, 5], [6])]
    with passes(llm) as seen:
        stream, other = llm.stream([1, 2], params), llm.stream([3, 4, 5], params)
        assert seen == [(1, 2), (1, 3)]  # the prompts are read at once, tokens when they are asked for
        events = [next(stream), next(stream)], [next(other)]
        assert len(seen) == 3
    results = llm.generate([[1, 2], [3, 4, 5], [6]], params)
    events[0].extend(stream)
    events[1].extend(other)
    for said, result in zip(events, expected, strict=False):
        assert [event.token_id for event in said] == result.token_ids
        assert [event.logprobs for event in said] == result.logprobs
    assert_same(results, expected)


# The cache


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("name", ["float32", "int4", "bf16 panels", "bfloat16"])
@torch.no_grad()
def test_rows_come_and_go_as_they_like(name: str, kv_dtype: str | None) -> None:
    """Against a cache for each, whose logits must be the same bits."""
    model, rng = made(name), random.Random(name)
    most = most_rows(model) or 8
    together, single = BatchCache(model.config), []

    def read() -> NemotronHHybridDynamicCache:
        cache = NemotronHHybridDynamicCache(model.config, kv_dtype=kv_dtype)
        torch.manual_seed(len(single))
        ids = torch.randint(0, 50, (1, rng.choice((1, 2, 5, 300))))
        single.append(model(ids, past_key_values=cache).past_key_values)
        return model(ids, past_key_values=NemotronHHybridDynamicCache(model.config, kv_dtype=kv_dtype)).past_key_values

    for _ in range(30):
        rows = len(single)
        change = rng.choice(("join", "replace", "drop", "none"))
        if change == "join" and rows < most or not rows:
            together.join([read() for _ in range(rng.randint(1, max(1, min(3, most - rows))))])
        elif change == "replace":
            row = rng.randrange(rows)
            together.replace(row, read())
            single[row] = single.pop()
        elif change == "drop":
            row = rng.randrange(rows)
            together.drop(row)
            single[row] = single[-1]
            single.pop()
        if not single:
            continue
        ids = torch.tensor([[rng.randrange(50)] for _ in single])
        found = model(ids, past_key_values=together).logits
        for row, cache in enumerate(single):
            assert torch.equal(found[row : row + 1], model(ids[row : row + 1], past_key_values=cache).logits)
        assert together.row_lengths == [cache.length for cache in single]
        assert together.get_seq_length() == max(together.row_lengths)
        assert together.batch_size == len(single)


@pytest.mark.parametrize("level", _native.levels()[-1:])  # only kernels write a state in place
@torch.no_grad()
def test_a_step_behind_a_row_that_left_allocates_no_states(level: str) -> None:
    model = made("int4")
    cache = BatchCache(model.config)
    cache.join([model(torch.tensor([[i, 3]]), use_cache=True).past_key_values for i in range(4)])
    layer: Any = cache.layers[0]
    step = [model(torch.ones(4, 1, dtype=torch.long), past_key_values=cache) and layer.recurrent_states.data_ptr()]
    step += [model(torch.ones(4, 1, dtype=torch.long), past_key_values=cache) and layer.recurrent_states.data_ptr()]
    for rows in (3, 2, 1):
        cache.drop(0)
        for _ in range(2):
            model(torch.ones(rows, 1, dtype=torch.long), past_key_values=cache)
            assert layer.recurrent_states.data_ptr() in step
            assert layer.recurrent_states.shape[0] == rows


def test_what_a_cache_of_many_lengths_refuses(tmp_path: Any) -> None:
    cache = BatchCache(made("int4").config)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: cache.crop(0), cache.reset, lambda: cache.save(tmp_path / "x"),
        lambda: cache.reorder_cache(torch.tensor([0])), lambda: cache.batch_repeat_interleave(2),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(UnsupportedError, match="join, replace and drop"):
            call()
