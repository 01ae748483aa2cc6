"""`generate` with a cache and without, in chunks, over several turns; modes and caches that are refused."""

from typing import Any

import pytest
import torch
from generate_cases import BEAMS, GREEDY, PATTERNS, decode, double_model
from transformers import DynamicCache, EncoderDecoderCache, set_seed

from helpers import draw_ids
from nemotron_h import CacheError, NemotronHHybridDynamicCache, UnsupportedError

SAMPLES = {**GREEDY, "do_sample": True, "top_k": 0}
MODES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "samples": {**SAMPLES, "temperature": 1.3},
    "several samples": {**SAMPLES, "num_return_sequences": 3},
    "beams": BEAMS,
    "sampled beams": {**SAMPLES, "num_beams": 3},
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cache_and_chunks_change_nothing(pattern: str, mode: str, batch: int) -> None:
    model = double_model(pattern)
    ids = draw_ids(model, batch, 6, seed=batch)
    results = []
    for how in ({"use_cache": False}, {}, *({"prefill_chunk_size": size} for size in (1, 3, 40))):
        set_seed(8)
        results.append(model.generate(ids, attention_mask=torch.ones_like(ids), **MODES[mode], **how))
    assert all(torch.equal(result, results[0]) for result in results[1:])
    if mode == "greedy":
        assert torch.equal(results[0][:, 6:], torch.stack([decode(model, row) for row in ids]))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_turns_share_a_cache(pattern: str) -> None:
    model = double_model(pattern)
    cache, text = NemotronHHybridDynamicCache(model.config), draw_ids(model, 2, 3)
    for turn in range(3):
        before = text
        text = model.generate(text, attention_mask=torch.ones_like(text), **GREEDY, past_key_values=cache)
        assert torch.equal(text[:, before.shape[1] :], torch.stack([decode(model, row) for row in before])), turn
        assert cache.get_seq_length() == text.shape[1] - 1
        text = torch.cat([text, draw_ids(model, 2, 4, seed=turn)], dim=1)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_embeddings_as_prompt(pattern: str) -> None:
    model = double_model(pattern)
    ids = draw_ids(model, 2, 5)
    expected = torch.stack([decode(model, row) for row in ids])
    for use_cache in (True, False):
        embeds = model.get_input_embeddings()(ids).detach()
        assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY, use_cache=use_cache), expected), use_cache


@pytest.mark.parametrize(
    "mode",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"num_beams": 2, "force_words_ids": [[5]]},
        {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
    ],
    ids=lambda mode: next(reversed(mode)),
)
def test_modes_that_moved_to_hub_repositories(mode: dict[str, Any]) -> None:
    model = double_model("M*")
    with pytest.raises(UnsupportedError, match="never run"):
        model.generate(draw_ids(model, 1, 4), **GREEDY, **mode, trust_remote_code=True)
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(draw_ids(model, 1, 4), **GREEDY, **mode)


@pytest.mark.parametrize("name", ["quantized", "offloaded", "offloaded_static"])
def test_caches_refused_by_name(name: str) -> None:
    model = double_model("M*")
    with pytest.raises(UnsupportedError, match="NemotronHHybridDynamicCache"):
        model.generate(draw_ids(model, 1, 4), **GREEDY, cache_implementation=name)


def test_caches_refused_as_objects() -> None:
    model = double_model("M*")
    key = torch.ones(1, 2, 3, 12, dtype=torch.float64)
    filled = DynamicCache()
    filled.update(key, key, 0)
    foreign = {
        "offloading": DynamicCache(offloading=True),
        "both kinds": EncoderDecoderCache(DynamicCache(), DynamicCache()),
        "filled": filled,
        "tuple": ((key, key), (key, key)),
    }
    for name, cache in foreign.items():
        with pytest.raises(CacheError, match="NemotronHHybridDynamicCache") as raised:
            model.generate(draw_ids(model, 1, 4), **GREEDY, past_key_values=cache)
        assert type(cache).__name__ in str(raised.value), name


def test_cache_of_another_config() -> None:
    model, other = double_model("M*"), double_model("*M")
    with pytest.raises(CacheError, match="another model: layers_block_type"):
        model.generate(draw_ids(model, 1, 4), **GREEDY, past_key_values=NemotronHHybridDynamicCache(other.config))
