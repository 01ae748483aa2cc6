"""Assisted decoding and prompt lookup: drafts of any quality, and always the text of plain greedy decoding."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import draw_ids, draw_weights, tiny_model
from nemotron_h import CacheError, NemotronHForCausalLM, NemotronHHybridDynamicCache, UnsupportedError
from nemotron_h.cache import JOURNAL

GREEDY = {"max_new_tokens": 24, "eos_token_id": None, "do_sample": False}
PATTERNS = ["ME*-M", "MM", "**", "E-"]


def greedy(model: NemotronHForCausalLM, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **options})


def assistants(model: NemotronHForCausalLM) -> dict[str, NemotronHForCausalLM]:
    """One that is always right, one that mostly is, and one that never is."""
    close = copy.deepcopy(model)
    with torch.no_grad():
        close.lm_head.weight += 0.05 * torch.randn(
            close.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)
        )
    other = tiny_model(hybrid_override_pattern="M*", vocab_size=model.config.vocab_size).double()
    return {"itself": copy.deepcopy(model), "close": close, "other": draw_weights(other, seed=9)}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("quality", ["itself", "close", "other"])
def test_same_text_as_plain_decoding(pattern: str, quality: str) -> None:
    model = tiny_model(hybrid_override_pattern=pattern, vocab_size=11).double()
    assistant = assistants(model)[quality]
    for tokens, drafts, schedule in ((1, 1, "constant"), (2, 5, "heuristic"), (JOURNAL + 6, 20, "heuristic_transient")):
        ids = draw_ids(model, 1, tokens, seed=drafts)
        assistant.generation_config.num_assistant_tokens = drafts
        assistant.generation_config.num_assistant_tokens_schedule = schedule
        for options in ({}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}):
            assisted = greedy(model, ids, assistant_model=assistant, **options)
            assert torch.equal(assisted, greedy(model, ids, **options)), (tokens, options)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_prompt_lookup(pattern: str) -> None:
    model = tiny_model(hybrid_override_pattern=pattern, vocab_size=7).double()
    for tokens, drafts in ((2, 1), (9, 3), (JOURNAL + 20, 10)):
        ids = draw_ids(model, 1, tokens, seed=tokens)
        for options in ({}, {"max_matching_ngram_size": 1}, {"eos_token_id": [5]}):
            looked_up = greedy(model, ids, prompt_lookup_num_tokens=drafts, **options)
            assert torch.equal(
                looked_up, greedy(model, ids, **{k: v for k, v in options.items() if k == "eos_token_id"})
            )


def test_a_right_assistant_saves_passes_and_the_model_reads_no_token_twice() -> None:
    model = tiny_model(vocab_size=13).double()
    ids, read = draw_ids(model, 1, 9), []
    assistant = assistants(model)["itself"]
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assistant.generation_config.eos_token_id = None  # it would end a draft
    model.model.register_forward_hook(lambda *args: read.append(args[2][0].shape[1]))
    greedy(model, ids, assistant_model=assistant)
    assert read == [9 + 5, 6, 6, 6]  # 24 tokens, all drafts right


@pytest.mark.parametrize("quality", ["close", "other"])
def test_cache_afterwards_goes_on(quality: str) -> None:
    model = tiny_model().double()
    ids = draw_ids(model, 1, 6)
    cache = NemotronHHybridDynamicCache(model.config)
    first = greedy(model, ids, assistant_model=assistants(model)[quality], max_new_tokens=9, past_key_values=cache)
    assert cache.get_seq_length() == first.shape[1] - 1
    second = greedy(model, first, past_key_values=cache, max_new_tokens=15)
    assert torch.equal(second, greedy(model, ids))


def test_sampled_drafts_keep_the_distribution() -> None:
    """The token behind the first against the model's own probabilities: 1500 texts over 5 words."""
    model = tiny_model(vocab_size=5, hybrid_override_pattern="M*").double()
    assistant, ids = assistants(model)["other"], torch.tensor([[1, 3]])
    assistant.generation_config.num_assistant_tokens = 2
    torch.manual_seed(0)
    counts, runs = torch.zeros(5, 5), 1500
    for _ in range(runs):
        text = greedy(model, ids, max_new_tokens=2, do_sample=True, top_k=0, assistant_model=assistant)[0]
        counts[text[2], text[3]] += 1
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    with torch.no_grad():
        logprobs = model(torch.cat([ids.expand(25, -1), pairs], dim=1)).logits[:, 1:3].log_softmax(-1)
    expected = logprobs.gather(-1, pairs[..., None])[..., 0].sum(-1).exp().view(5, 5) * runs
    assert float(((counts - expected) ** 2 / expected).sum()) < 60  # 24 degrees of freedom: 99.99 % lie below 56


@pytest.mark.parametrize("seed", range(4))
def test_prompts_in_pieces(seed: int) -> None:
    """Also where the text ends with a pad id, from which transformers guesses padding for the assistant."""
    model = tiny_model(hybrid_override_pattern="*M", vocab_size=5).double()
    assistant = assistants(model)["other"]
    ids = torch.cat([draw_ids(model, 1, 8, seed=seed), torch.tensor([[model.config.pad_token_id]])], dim=1)
    expected = greedy(model, ids)
    assert torch.equal(greedy(model, ids, assistant_model=assistant, prefill_chunk_size=3), expected)


def test_refusals() -> None:
    model = tiny_model()
    ids = draw_ids(model, 1, 4)
    with pytest.raises(ValueError, match="batch_size = 1"):
        greedy(model, draw_ids(model, 2, 4), prompt_lookup_num_tokens=2)
    with pytest.raises(UnsupportedError, match="right padding"):
        model.generate(ids, attention_mask=torch.tensor([[1, 1, 1, 0]]), **GREEDY, prompt_lookup_num_tokens=2)
    other = NemotronHHybridDynamicCache(tiny_model(hybrid_override_pattern="M*").config)
    with pytest.raises(CacheError, match="another model"):
        greedy(model, ids, prompt_lookup_num_tokens=2, past_key_values=other)
