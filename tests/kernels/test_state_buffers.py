"""The two buffers of a Mamba layer's state: steps alternate between them, and nobody else's tensor is ever written."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import assert_close, draw_ids, tiny_model
from nemotron_h import NemotronHForCausalLM, NemotronHHybridDynamicCache
from nemotron_h.cache import MambaLayer, NemotronHHybridStaticCache
from nemotron_h.ops import _native, dispatch

PROMPT = 12
IDS_SEED = 3


def filled(model: NemotronHForCausalLM, steps: int = 0, rows: int = 2, cache: Any = None) -> Any:
    """A cache behind a prompt and so many steps of one token."""
    ids_BT = draw_ids(model, rows, PROMPT + steps, seed=IDS_SEED)
    cache = NemotronHHybridDynamicCache(model.config) if cache is None else cache
    model(ids_BT[:, :PROMPT], past_key_values=cache)
    for t in range(PROMPT, PROMPT + steps):
        model(ids_BT[:, t : t + 1], past_key_values=cache)
    return cache


def step(model: NemotronHForCausalLM, cache: Any, steps: int = 1, seed: int = 9, tokens: int = 1, **kwargs: Any) -> Any:
    out = None
    for index in range(steps):
        out = model(draw_ids(model, cache.batch_size, tokens, seed=seed + index), past_key_values=cache, **kwargs)
    return out


def layers(cache: Any) -> list[MambaLayer]:
    return [layer for layer in cache.layers if isinstance(layer, MambaLayer)]


def states(cache: Any) -> list[Tensor]:
    """The states themselves, by the way that gives no buffer away."""
    return [layer.recurrent_states for layer in layers(cache)]


def copies(cache: Any) -> list[Tensor]:
    return [state.clone() for state in states(cache)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def storages(cache: Any) -> set[int]:
    tensors = [*states(cache), *(buffer for layer in layers(cache) for buffer in layer._buffers)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@torch.no_grad()
def test_steps_alternate_between_two_buffers() -> None:
    model = tiny_model(hybrid_override_pattern="M*M")
    cache = filled(model, steps=2)
    seen = []
    for _ in range(6):
        step(model, cache)
        seen.append([state.data_ptr() for state in states(cache)])
    if _native.levels():
        assert seen[0::2] == [seen[0]] * 3
        assert seen[1::2] == [seen[1]] * 3
        assert len({*seen[0], *seen[1]}) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 3])
@torch.no_grad()
def test_the_same_as_the_reference(dtype: str, tokens: int, environment: Callable[..., None]) -> None:
    model = tiny_model(hybrid_override_pattern="M*M", mamba_ssm_cache_dtype=dtype)
    bound = {"bound": 2e-2} if dtype == "bfloat16" else {}
    fast = filled(model, steps=3)
    logits = step(model, fast, 3, tokens=tokens).logits
    assert {state.dtype for state in states(fast)} == {getattr(torch, dtype)}
    environment(NEMOTRON_H_IMPL="reference")
    slow = filled(model, steps=3)
    assert_close(logits, step(model, slow, 3, tokens=tokens).logits, **bound)
    assert_close(states(fast), states(slow), **bound)


@torch.no_grad()
def test_check_agrees_with_every_step(environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    environment(NEMOTRON_H_CHECK="1")
    checked, check = [], dispatch._check
    monkeypatch.setattr(dispatch, "_check", lambda op, *rest: checked.append(op.name) or check(op, *rest))
    for dtype in ("float32", "bfloat16"):
        model = tiny_model(hybrid_override_pattern="MEM", mamba_ssm_cache_dtype=dtype)
        step(model, filled(model, steps=2), 2, tokens=2)
    assert checked.count("mamba_step") >= 6


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@torch.no_grad()
def test_a_step_that_fails_changes_nothing(steps: int) -> None:
    model = tiny_model(hybrid_override_pattern="M*M")
    cache, untouched = filled(model, steps), filled(model, steps)
    before = copies(cache)
    for _ in range(2):
        handle = model.model.layers[2].mixer.out_proj.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(model, cache, seed=77)
        handle.remove()
        assert_equal(states(cache), before)
    for _ in range(3):
        assert torch.equal(step(model, cache).logits, step(model, untouched).logits)
    assert_equal(states(cache), states(untouched))


@torch.no_grad()
def test_what_was_handed_out_stays() -> None:
    """By the cache's lists, by `output_ssm_states`, by a hook."""
    model = tiny_model(hybrid_override_pattern="M*M")
    cache, kept = filled(model, steps=3), []

    def keep(*tensors: Tensor) -> None:
        kept.extend((tensor, tensor.clone()) for tensor in tensors)

    for _ in range(4):
        step(model, cache)
        keep(*cache.ssm_states)
    for _ in range(4):
        keep(*step(model, cache, output_ssm_states=True).ssm_states)
    handle = model.model.layers[0].mixer.hook_state.register_forward_hook(lambda point, args, state: keep(state))
    step(model, cache, 4)
    handle.remove()
    step(model, cache, 4)
    assert len(kept) == 4 * 3 + 8 + 4
    assert all(torch.equal(tensor, copy) for tensor, copy in kept)


@torch.no_grad()
def test_a_state_of_the_callers_stays() -> None:
    model = tiny_model(hybrid_override_pattern="MM")
    cache = filled(model, steps=3)
    mine = torch.randn_like(states(cache)[0])
    before = mine.clone()
    layers(cache)[0].recurrent_states = mine
    step(model, cache, 4)
    assert torch.equal(mine, before)


@torch.no_grad()
def test_a_state_of_another_dtype_returns_to_the_caches() -> None:
    """It is read as it is, and the next one is not rounded to it."""
    model = tiny_model(hybrid_override_pattern="M")
    cache, expected = filled(model, steps=3), filled(model, steps=3)
    narrow = states(cache)[0].bfloat16()
    layers(cache)[0].recurrent_states, layers(expected)[0].recurrent_states = narrow, narrow.float()
    for _ in range(2):
        step(model, cache)
        step(model, expected)
        assert states(cache)[0].dtype == torch.float32
        assert_equal(states(cache), states(expected))


@torch.no_grad()
def test_rows_put_in_by_hand() -> None:
    model = tiny_model(hybrid_override_pattern="M")
    cache, expected = filled(model, steps=3), filled(model, steps=3)
    expected.batch_select_indices(torch.tensor([1]))
    (layer,) = layers(cache)
    layer.recurrent_states, layer.conv_states = layer.recurrent_states[1:].clone(), layer.conv_states[1:].clone()
    cache._batch = 1
    for _ in range(3):
        assert_close(step(model, cache).logits, step(model, expected).logits)


@torch.no_grad()
def test_reset_gives_the_memory_back() -> None:
    model = tiny_model(hybrid_override_pattern="MM")
    for cache in (filled(model, steps=3), filled(model, 3, cache=NemotronHHybridStaticCache(model.config, 40))):
        assert any(layer._buffers for layer in layers(cache)) or not _native.levels()
        cache.reset()
        assert not any(layer._buffers for layer in layers(cache))
        filled(model, steps=3, cache=cache)
        assert_close(states(cache), states(filled(model, steps=3)))


def deep(cache: Any, path: Path, model: NemotronHForCausalLM) -> Any:
    return copy.deepcopy(cache)


def shallow(cache: Any, path: Path, model: NemotronHForCausalLM) -> Any:
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def through_a_file(cache: Any, path: Path, model: NemotronHForCausalLM) -> Any:
    cache.save(path)
    return NemotronHHybridDynamicCache.load(path, model.config)


def by_hand(cache: Any, path: Path, model: NemotronHForCausalLM) -> Any:
    twin = copy.deepcopy(cache)
    for layer, state, window in zip(layers(twin), cache.ssm_states, cache.conv_states, strict=True):
        layer.recurrent_states, layer.conv_states = state, window
    return twin


@pytest.mark.parametrize("twin_of", [deep, shallow, through_a_file, by_hand])
@torch.no_grad()
def test_two_caches_share_no_buffer(twin_of: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model(hybrid_override_pattern="MM")
    cache = filled(model, steps=3)
    twin = twin_of(cache, tmp_path / "cache.safetensors", model)
    for turn in range(4):  # in turns, with different tokens
        step(model, cache, seed=100 + turn)
        step(model, twin, seed=200 + turn)
        if turn:
            assert not storages(cache) & storages(twin)
    for seed, found in ((100, cache), (200, twin)):
        expected = filled(model, steps=3)
        step(model, expected, 4, seed=seed)
        assert_close(states(found), states(expected), f"seed {seed}", 1e-6)


@torch.no_grad()
def test_rows_that_move() -> None:
    model = tiny_model(hybrid_override_pattern="M*M")
    for rows, change in (
        ([1, 0], lambda cache: cache.reorder_cache(torch.tensor([1, 0]))),
        ([1], lambda cache: cache.batch_select_indices(torch.tensor([1]))),
        ([0, 0, 1, 1], lambda cache: cache.batch_repeat_interleave(2)),
    ):
        cache, plain = filled(model, steps=3), filled(model, steps=3)
        change(cache)
        step(model, cache, 4, seed=50)
        ids = [draw_ids(model, len(rows), 1, seed=50 + index) for index in range(4)]
        for position, row in enumerate(rows):
            alone = copy.deepcopy(plain)
            alone.batch_select_indices(torch.tensor([row]))
            for id_B1 in ids:
                model(id_B1[position : position + 1], past_key_values=alone)
            assert_close([state[position : position + 1] for state in states(cache)], states(alone))


@torch.no_grad()
def test_a_journal_keeps_the_old_states() -> None:
    model = tiny_model(hybrid_override_pattern="MM")
    cache, expected = filled(model, steps=3), filled(model, steps=3)
    cache.activate_past_recording()
    for _ in range(2):
        step(model, cache, 4, seed=60)
        cache.crop(-4)
        assert_close(states(cache), states(expected))
        assert_close(step(model, cache, seed=70).logits, step(model, expected, seed=70).logits)
        cache.crop(0)


@torch.no_grad()
def test_a_static_cache_keeps_its_addresses() -> None:
    model = tiny_model(hybrid_override_pattern="M*M")
    cache = filled(model, 1, cache=NemotronHHybridStaticCache(model.config, 40))
    growing = filled(model, 1)
    before = [state.data_ptr() for state in states(cache)]
    for _ in range(4):
        assert_close(step(model, cache).logits, step(model, growing).logits)
        assert [state.data_ptr() for state in states(cache)] == before
    assert_equal(states(cache), states(growing))


def test_a_graph_keeps_the_state_that_it_read() -> None:
    model = tiny_model(hybrid_override_pattern="MM")

    def gradients(later: int) -> list[Tensor]:
        with torch.no_grad():
            cache = filled(model, steps=3)
        loss = step(model, cache, seed=80, tokens=2).logits.square().sum()
        with torch.no_grad():
            step(model, cache, later)
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    assert_equal(gradients(later=4), gradients(later=0))


def test_a_pass_under_grad_takes_no_buffer() -> None:
    """Nothing requires grad, so the kernel runs, but a later pass may save the state for its graph."""
    model = tiny_model(hybrid_override_pattern="MM").requires_grad_(False)
    with torch.no_grad():
        cache = filled(model, steps=3)
    kept = states(cache)
    before = copies(cache)
    step(model, cache, 4)
    with torch.no_grad():
        step(model, cache, 4)
    assert_equal(kept, before)
