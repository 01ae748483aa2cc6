"""Steps of a recording cache: the bits and the journal of the modules one after the other, and what is taken back.

Letters: B batch · T tokens · H heads · P head size · G groups · N state size · C channels · K taps.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import tiny_model
from nemotron_h import NemotronHForCausalLM, NemotronHHybridDynamicCache
from nemotron_h.cache import MambaLayer, NemotronHHybridStaticCache
from nemotron_h.cache.journal import JOURNAL, Step
from nemotron_h.ops import _native, threads
from nemotron_h.ops.causal_conv1d import native as conv
from nemotron_h.ops.linear import native as linears
from nemotron_h.ops.mamba_step import MambaSizes, native, reference
from nemotron_h.ops.ssd import native as ssd

pytestmark = pytest.mark.usefixtures("unchecked")
SIZES = [
    (1, 1, MambaSizes(4, 8, 2, 16, (0.0, float("inf")), 1e-5), 4, torch.bfloat16),
    (3, 5, MambaSizes(6, 5, 3, 12, (0.01, 0.5), 1e-5), 2, torch.float32),
    (2, 16, MambaSizes(2, 80, 1, 96, (0.0, float("inf")), 1e-6), 5, torch.bfloat16),
]
MODELS: list[tuple[dict[str, Any], str | None, torch.dtype]] = [
    ({}, None, torch.float32),
    ({"use_conv_bias": False, "time_step_limit": (0.01, 0.5)}, None, torch.bfloat16),
    ({}, "int4", torch.bfloat16),
    ({"mamba_ssm_cache_dtype": "bfloat16"}, "int4", torch.bfloat16),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step records is written whole, and nothing of it lies in scratch, which the next op writes over."""
    right = native.record_buffers

    def nan(*args: Any) -> tuple[Tensor, ...]:
        return tuple(buffer.fill_(float("nan")) for buffer in right(*args))

    monkeypatch.setattr(native, "record_buffers", nan)
    monkeypatch.setattr("nemotron_h.steps.record_buffers", nan)


def poison_scratch() -> None:
    linears.scratch(1).fill_(255)


def made(changes: dict[str, Any], quantization: str | None, dtype: torch.dtype) -> NemotronHForCausalLM:
    model = tiny_model(hybrid_override_pattern="M*ME-M", **changes).to(dtype).eval()
    if quantization is not None:
        model.quantize(quantization)
    return model


def by_modules(model: NemotronHForCausalLM, whole_mixers: bool = False) -> NemotronHForCausalLM:
    """The same model whose blocks never step as a whole, and whose mixers, but for `whole_mixers`, call every op."""
    model = copy.deepcopy(model)
    for block in model.model.layers:
        block.step = lambda *_: None
        if block.block_type == "mamba" and not whole_mixers:
            block.mixer._few_tokens = lambda *_: None
    return model


def ids(rows: int, tokens: int, seed: int) -> Tensor:
    return torch.randint(0, 50, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def recording(model: NemotronHForCausalLM, rows: int = 1) -> Any:
    cache = NemotronHHybridDynamicCache(model.config)
    model(ids(rows, 6, 0), past_key_values=cache)
    cache.activate_past_recording()
    return cache


@torch.no_grad()
def passed(model: NemotronHForCausalLM, cache: Any, tokens: int, seed: int = 1) -> Tensor:
    return model(ids(cache.batch_size, tokens, seed), past_key_values=cache).logits


def mamba(cache: Any) -> list[MambaLayer]:
    return [layer for layer in cache.layers if isinstance(layer, MambaLayer)]


def assert_same(cache: Any, other: Any) -> None:
    """States, windows and journals, bit for bit."""
    for one, two in zip(mamba(cache), mamba(other), strict=True):
        assert torch.equal(one.recurrent_states, two.recurrent_states)
        assert torch.equal(one.conv_states, two.conv_states)
        assert (one.journal is None) == (two.journal is None)
        if one.journal is not None and two.journal is not None:
            assert torch.equal(one.journal.state_BHPN, two.journal.state_BHPN)
            assert torch.equal(one.journal.window_BCW, two.journal.window_BCW)
            for a, b in zip(one.journal.steps, two.journal.steps, strict=True):
                assert_steps(a, b)


def assert_steps(a: Step, b: Step) -> None:
    for name, tensor in a._asdict().items():
        other = getattr(b, name)
        assert (tensor is None) == (other is None), name
        assert tensor is None or (tensor.dtype is other.dtype and torch.equal(tensor, other)), name


@pytest.mark.parametrize(("batch", "tokens", "sizes", "taps", "dtype"), SIZES)
def test_what_the_kernel_records(batch: int, tokens: int, sizes: MambaSizes, taps: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    width, state = sizes.inner + sizes.channels + sizes.heads, (batch, sizes.heads, sizes.head_dim, sizes.state)
    args = (
        torch.randn(batch, tokens, width).to(dtype), sizes, torch.randn(sizes.channels, taps), None,
        torch.randn(sizes.heads), -torch.rand(sizes.heads), torch.randn(sizes.heads), torch.randn(sizes.inner),
        torch.randn(batch, sizes.channels, taps - 1).to(dtype), torch.randn(state), None,
    )  # fmt: skip
    inputs = args[0][..., sizes.inner : sizes.inner + sizes.channels]
    expected = (
        *native.mamba_step(*args),
        inputs,
        conv.causal_conv1d(inputs, args[2], None, "silu", args[8], None, None)[0],
        ssd.time_step(args[0][..., sizes.inner + sizes.channels :], args[4], sizes.limit),
    )
    for level in _native.levels():
        for count in (1, 2):
            _native.extension().set_threads(count)
            threads._set = torch.get_num_threads()
            result = native.mamba_step(*args, True, level=level)
            poison_scratch()
            assert len(result) == 6
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    threads._set = None
    for fast, slow in zip(result[3:], reference.mamba_step(*args, True)[3:], strict=True):
        assert fast.dtype is slow.dtype
        assert torch.allclose(fast, slow, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize(("changes", "quantization", "dtype"), MODELS)
def test_the_journal_of_the_modules(
    changes: dict[str, Any], quantization: str | None, dtype: torch.dtype, taken: list[str]
) -> None:
    model = made(changes, quantization, dtype)
    plain, mixers = by_modules(model), by_modules(model, whole_mixers=True)
    for rows, sizes in ((1, range(1, 17)), (2, (3, 8)), (1, (16,) * 6)):
        caches = [recording(each, rows) for each in (model, plain, mixers)]
        for seed, tokens in enumerate(sizes):
            taken.clear()
            found, *others = (passed(each, cache, tokens, seed) for each, cache in
                              zip((model, plain, mixers), caches, strict=True))  # fmt: skip
            poison_scratch()
            fits = quantization is not None or rows * tokens <= linears.MOST_ROWS
            assert taken.count("mamba") == (3 if fits else 0), tokens
            assert all(torch.equal(found, other) for other in others), tokens
            assert all(torch.isfinite(found).flatten())
        assert_same(caches[0], caches[1])
        assert_same(caches[2], caches[1])
    assert mamba(caches[0])[0].journal.slots >= JOURNAL  # the oldest passes were folded into the state


@pytest.mark.parametrize(("changes", "quantization", "dtype"), MODELS)
@pytest.mark.parametrize("tokens", [2, 4, 7, 16])
def test_some_are_taken_back(
    changes: dict[str, Any], quantization: str | None, dtype: torch.dtype, tokens: int
) -> None:
    model = made(changes, quantization, dtype)
    plain = by_modules(model)
    caches = recording(model), recording(plain)
    for seed, rejected in enumerate((1, tokens - 1, 0, tokens)):
        before = [layer.recurrent_states.clone() for layer in mamba(caches[0])]
        kept = [layer.recurrent_states for layer in mamba(caches[0])]
        assert torch.equal(passed(model, caches[0], tokens, seed), passed(plain, caches[1], tokens, seed))
        assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))  # the old state is not written over
        poison_scratch()
        for cache in caches:
            cache.crop(-rejected)
        assert_same(*caches)
    assert torch.equal(passed(model, caches[0], 1), passed(plain, caches[1], 1))


def test_rejected_tokens_leave_no_trace() -> None:
    model = made({}, "int4", torch.bfloat16)
    drafted, straight = recording(model), recording(model)
    for seed in range(3):
        text, wrong = ids(1, 2, seed), ids(1, 3, seed + 50)
        with torch.no_grad():
            model(torch.cat([text, wrong], dim=1), past_key_values=drafted)
            poison_scratch()
            drafted.crop(-3)
            model(text, past_key_values=straight)
            straight.crop(0)
        assert_same(drafted, straight)


def test_a_static_cache_records_too() -> None:
    model = made({}, "int4", torch.bfloat16)
    caches = NemotronHHybridStaticCache(model.config, 60), NemotronHHybridDynamicCache(model.config)
    for cache in caches:
        with torch.no_grad():
            model(ids(1, 6, 0), past_key_values=cache)
        cache.activate_past_recording()
        for seed in range(2):
            passed(model, cache, 4, seed)
            cache.crop(-2)
            passed(model, cache, 3, seed)
    assert_same(*caches)


def test_hooks_see_a_recorded_step(taken: list[str]) -> None:
    model = made({}, "int4", torch.bfloat16)
    watched, plain = recording(model), recording(model)
    passed(model, plain, 4)
    seen: list[int] = []
    handles = [
        block.mixer.hook_x.register_forward_hook(lambda *_: seen.append(1))
        for block in model.model.layers
        if block.block_type == "mamba"
    ]
    taken.clear()
    passed(model, watched, 4)
    for handle in handles:
        handle.remove()
    assert "mamba" not in taken
    assert len(seen) == 3
    assert_same(watched, plain)


def test_rates_changed_in_place_reach_the_journal() -> None:
    model = made({}, "int4", torch.bfloat16)
    cache = recording(model)
    passed(model, cache, 2)
    with torch.no_grad():
        for block in model.model.layers:
            if block.block_type == "mamba":
                block.mixer.A_log += 0.5
    plain, other = by_modules(model), copy.deepcopy(cache)
    assert torch.equal(passed(model, cache, 3), passed(plain, other, 3))
    assert_same(cache, other)


@pytest.mark.parametrize(("heads", "head_dim"), [(64, 64), (128, 80)])
def test_memory_of_a_token(heads: int, head_dim: int) -> None:
    """At most 64 KiB for a token and layer of 3-Nano and of Nano-9B-v2."""
    channels = heads * head_dim + 2 * 8 * 128
    buffers = native.record_buffers(torch.empty(0, dtype=torch.bfloat16), 1, 4, channels, heads)
    assert sum(buffer.nbytes for buffer in buffers) <= 4 * 64 * 1024
