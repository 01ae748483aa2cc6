"""Decoding with constant shapes: the same as with a growing cache, at constant addresses, compiled once."""

import copy
from typing import Any

import pytest
import torch
from test_cache import assert_same, fill
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, StaticCache

from helpers import BIASED, assert_close, draw_ids, tiny_model
from nemotron_h import CacheError, InputError, NemotronHForCausalLM, UnsupportedError
from nemotron_h.cache import NemotronHHybridStaticCache

GREEDY = {"max_new_tokens": 10, "eos_token_id": None, "do_sample": False}
STATIC = {**GREEDY, "cache_implementation": "static"}
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1]])


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def static(model: NemotronHForCausalLM, slots: int) -> NemotronHHybridStaticCache:
    return NemotronHHybridStaticCache(model.config, slots)


def addresses(cache: NemotronHHybridStaticCache) -> list[int]:
    tensors = [getattr(layer, name) for layer in cache.layers for name in layer.names]
    return [t.data_ptr() for t in tensors]


@pytest.mark.parametrize("pattern", ["ME*-M", "MM", "**", "E-"])
@pytest.mark.parametrize("window", [None, 4])
def test_same_tokens_as_a_growing_cache(pattern: str, window: int | None) -> None:
    model = tiny_model(hybrid_override_pattern=pattern, sliding_window=window, **BIASED).double()
    ids = draw_ids(model, 3, 6)
    for options in (
        {},
        {"attention_mask": MASK},
        {"attention_mask": MASK.flip(1)},
        {"num_beams": 3, "attention_mask": MASK},
        {"prefill_chunk_size": 2},
        {"max_cache_len": 40},
    ):
        result = model.generate(ids, **STATIC, **options)
        assert torch.equal(result, model.generate(ids, **GREEDY, **options)), options


@pytest.mark.parametrize("mask", [None, MASK])
@torch.no_grad()
def test_holds_what_a_growing_cache_holds(mask: Tensor | None) -> None:
    model = tiny_model(**BIASED)
    ids = draw_ids(model, 3, 6)
    growing = fill(model, ids, mask)
    for sizes in ([6], [2, 1, 3], [1] * 6):
        cache, past = static(model, 9), 0
        for size in sizes:
            new = slice(past, past + size)
            part = None if mask is None else mask[:, new]
            logits = model(ids[:, new], attention_mask=part, past_key_values=cache).logits
            past += size
        assert_same(cache, growing, str(sizes))
        assert_close(logits[:, -1], model(ids, attention_mask=mask).logits[:, -1])
    whole = torch.cat([mask if mask is not None else torch.ones_like(MASK), torch.ones(3, 1, dtype=torch.long)], dim=1)
    new = draw_ids(model, 3, 1, seed=1)
    expected = model(new, attention_mask=whole, past_key_values=copy.deepcopy(growing)).logits
    assert_close(model(new, attention_mask=whole, past_key_values=copy.deepcopy(cache)).logits, expected)

    cache.activate_past_recording()
    before = addresses(cache)
    model(draw_ids(model, 3, 3, seed=2), past_key_values=cache)
    cache.crop(-2)
    growing.activate_past_recording()
    model(draw_ids(model, 3, 3, seed=2), past_key_values=growing)
    growing.crop(-2)
    assert_same(cache, growing, "after a crop")
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    growing.reorder_cache(torch.tensor([2, 0, 1]))
    assert_same(cache, growing, "reordered")
    assert addresses(cache) == before
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close(model(ids, attention_mask=mask, past_key_values=cache).logits, model(ids, attention_mask=mask).logits)
    assert addresses(cache) == before


@torch.no_grad()
def test_slots_that_were_padding_may_be_real_after_a_crop() -> None:
    model = tiny_model(hybrid_override_pattern="M*")
    ids, new = draw_ids(model, 3, 6), draw_ids(model, 3, 2, seed=1)
    caches = [static(model, 9), fill(model, ids[:, :0])]
    for cache in caches:
        cache.activate_past_recording()
        model(ids, attention_mask=MASK.flip(1), past_key_values=cache)
        cache.crop(-2)
    found, expected = (model(new, past_key_values=cache).logits for cache in caches)
    assert_close(found, expected)
    assert_same(*caches)


def test_addresses_and_shapes_stay() -> None:
    model, seen = tiny_model(hybrid_override_pattern="ME*-M*"), []

    def watch(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        cache = output.past_key_values
        shapes = [tuple(getattr(layer, name).shape) for layer in cache.layers for name in layer.names]
        seen.append((addresses(cache), shapes))

    model.register_forward_hook(watch, with_kwargs=True)
    model.generate(draw_ids(model, 2, 6), **STATIC)
    assert len(seen) == 10
    assert all(step == seen[0] for step in seen)
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    assert seen[0][1].count((2, heads, 15, size)) == 4  # two layers; the last token is never read


@pytest.mark.parametrize("pattern", ["ME*-M", "MM"])
@pytest.mark.parametrize("padding", [0, 2])
def test_a_compiled_step_is_compiled_once(pattern: str, padding: int) -> None:
    model = tiny_model(hybrid_override_pattern=pattern)
    mask = torch.ones(2, 6, dtype=torch.long)  # else generate takes pad ids in a prompt for padding
    mask[0, :padding] = 0
    expected = [model.generate(draw_ids(model, 2, 6, seed=seed), attention_mask=mask, **GREEDY) for seed in (1, 2)]
    counter, forward = CompileCounterWithBackend("eager"), model.forward
    model.forward = torch.compile(forward, backend=counter, fullgraph=True)
    model._supports_logits_to_keep = lambda: True  # it looks at the signature of forward
    for seed in (1, 2):
        result = model.generate(draw_ids(model, 2, 6, seed=seed), attention_mask=mask, **STATIC)
        assert torch.equal(result, expected[seed - 1])
    assert counter.frame_count == 2  # the prompt and the step


def test_generate_compiles_the_step_itself() -> None:
    """`compile_config` as transformers documents it; on a CPU it compiles only when told to."""
    model, compiled = tiny_model(hybrid_override_pattern="M*E"), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled.append(inputs)
        return graph.forward

    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True
    options = {"attention_mask": torch.ones(2, 6, dtype=torch.long)}
    ids = draw_ids(model, 2, 6)
    assert torch.equal(
        model.generate(ids, **STATIC, **options, compile_config=config), model.generate(ids, **GREEDY, **options)
    )
    assert len(compiled) == 1  # the prompt is left as it is


def test_a_shorter_text_reuses_the_shapes() -> None:
    model = tiny_model()
    lengths = []
    for tokens in (9, 4, 12):
        output = model.generate(draw_ids(model, 1, tokens), **STATIC, return_dict_in_generate=True)
        lengths.append(output.past_key_values.get_max_length())
    assert lengths == [18, 18, 21]


@torch.no_grad()
def test_refusals() -> None:
    model = tiny_model()
    cache = static(model, 5)
    model(draw_ids(model, 1, 4), past_key_values=cache)
    with pytest.raises(CacheError, match="max_cache_len=5"):
        model(draw_ids(model, 1, 2), past_key_values=cache)
    assert cache.get_seq_length() == 4
    model(draw_ids(model, 1, 1), past_key_values=cache)
    with torch.enable_grad(), pytest.raises(CacheError, match="no_grad"):
        model(draw_ids(model, 1, 1), past_key_values=static(model, 5))
    for bad in (0, -1, 2.0, True):
        with pytest.raises(InputError, match="max_cache_len"):
            NemotronHHybridStaticCache(model.config, bad)
    with pytest.raises(CacheError, match="NemotronHHybridDynamicCache"):
        model(draw_ids(model, 1, 1), past_key_values=StaticCache(config=model.config, max_cache_len=8))
    with pytest.raises(UnsupportedError, match=r"NemotronHHybridDynamicCache\.load"):
        NemotronHHybridStaticCache.load("x", model.config)
    with pytest.raises(ValueError, match="Static"):
        model.generate(draw_ids(model, 1, 4), **STATIC, prompt_lookup_num_tokens=2)
