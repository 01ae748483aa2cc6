"""The generation modes that transformers documents: the same tokens as its own class on the same weights.

Its mixers floor the time step at `time_step_min`; the floor is lifted first.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from helpers import assert_close, draw_ids, tiny_model
from nemotron_h import NemotronHForCausalLM, demo_model

SAMPLE = {"do_sample": True, "top_k": 0}


class Forbid(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(-1, input_ids[0, -1:], -torch.inf)


class AfterSeven(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 7 + 6)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "sampling": {**SAMPLE},
    "temperature": {**SAMPLE, "temperature": 0.6},
    "top k": {"do_sample": True, "top_k": 5},
    "top p": {**SAMPLE, "top_p": 0.7},
    "min p": {**SAMPLE, "min_p": 0.05},
    "typical": {**SAMPLE, "typical_p": 0.6},
    "epsilon and eta": {**SAMPLE, "epsilon_cutoff": 0.01, "eta_cutoff": 0.02},
    "several samples": {**SAMPLE, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "several beams": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True},
    "beam sampling": {**SAMPLE, "num_beams": 3},
    "repetition penalty": {"repetition_penalty": 1.4},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[5], [7, 9]]},
    "sequence bias": {"sequence_bias": [[[11], 4.0], [[3, 4], -9.0]]},
    "suppressed": {"suppress_tokens": [1, 2, 3, 4], "begin_suppress_tokens": [8]},
    "forced end": {"forced_eos_token_id": 9},
    "long beams": {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0, "eos_token_id": [4, 5, 6, 7]},
    "beams with penalties": {"num_beams": 3, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "no time": {"max_time": 0.0},
    "longest length": {"max_new_tokens": None, "max_length": 11},
    "shortest length": {"min_new_tokens": 6, "eos_token_id": list(range(20))},
    "end tokens": {"eos_token_id": [11, 13, 17, 19, 23, 29, 31]},
    "exponential decay": {"exponential_decay_length_penalty": (2, 1.3), "eos_token_id": 7},
    "watermark": {**SAMPLE, "watermarking_config": {"bias": 2.5, "seeding_scheme": "lefthash"}},
    "guidance": {"guidance_scale": 1.5},
    "processor": {"logits_processor": LogitsProcessorList([Forbid()])},
    "criterion": {"stopping_criteria": StoppingCriteriaList([AfterSeven()])},
    "invalid logits removed": {"remove_invalid_values": True, "renormalize_logits": True, **SAMPLE},
}


@pytest.fixture(scope="module", params=["ME*-M", "*EM"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    ours = tiny_model(hybrid_override_pattern=request.param, moe_latent_size=None)
    directory: Path = tmp_path_factory.mktemp("model")
    ours.save_pretrained(directory)
    return ours, their_model(directory)


def their_model(directory: Path, **options: Any) -> Any:
    theirs = transformers.NemotronHForCausalLM.from_pretrained(directory, **options).eval()
    if theirs.config.tie_word_embeddings:  # which it ignores
        theirs.lm_head.weight = theirs.model.embeddings.weight
    for module in theirs.modules():
        if isinstance(module, NemotronHMamba2Mixer):
            module.time_step_limit = (0.0, float("inf"))
    return theirs


def run(model: nn.Module, ids: Tensor, **options: Any) -> Any:
    set_seed(3)
    options = {"max_new_tokens": 14, "eos_token_id": None, "do_sample": False, "pad_token_id": 0, **options}
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, output_scores=True, **options)


@pytest.mark.parametrize("mode", MODES)
def test_same_tokens_as_transformers_class(pair: tuple[Any, Any], mode: str) -> None:
    ours, theirs = pair
    assert type(ours) is NemotronHForCausalLM
    assert type(theirs).__module__.startswith("transformers.")
    batch = 1 if mode in ("guidance", "processor") else 2
    ids = draw_ids(ours, batch, 6)
    result, expected = (run(model, ids, **MODES[mode]) for model in (ours, theirs))
    assert torch.equal(result.sequences, expected.sequences)
    assert len(result.scores) == len(expected.scores)
    if "num_beams" in MODES[mode]:
        assert_close(result.sequences_scores, expected.sequences_scores)
    assert_close(list(result.logits), list(expected.logits), mode)


def test_modes_change_the_text(pair: tuple[Any, Any]) -> None:
    """The comparison would say nothing if the options had no effect."""
    ours, _ = pair
    ids = draw_ids(ours, 1, 6)
    options = [{**mode, "num_return_sequences": 1} for mode in MODES.values()]
    texts = {tuple(run(ours, ids, **option).sequences[0].tolist()) for option in options}
    assert len(texts) > len(MODES) // 2


def test_configuration_object(pair: tuple[Any, Any]) -> None:
    config = GenerationConfig(
        **SAMPLE, temperature=0.8, num_return_sequences=2, max_new_tokens=14, eos_token_id=None, pad_token_id=0
    )
    ids, texts = draw_ids(pair[0], 2, 6), []
    for model in pair:
        set_seed(3)
        texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config))
    assert torch.equal(texts[0], texts[1])
    assert texts[0].shape == (4, 20)


def test_left_padded_batch(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    ids = draw_ids(ours, 2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    ids = torch.where(mask.bool(), ids, 0)
    result, expected = (run(model, ids, attention_mask=mask) for model in (ours, theirs))
    alone = run(ours, ids[:1, 2:])
    assert torch.equal(result.sequences[:1, 6:], alone.sequences[:, 4:]), "ours: as the row alone"
    assert torch.equal(result.sequences, expected.sequences)


def test_inner_states_while_generating(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    ids = draw_ids(ours, 1, 6)
    result, expected = (run(model, ids, output_hidden_states=True, max_new_tokens=4) for model in (ours, theirs))
    for step, (mine, yours) in enumerate(zip(result.hidden_states, expected.hidden_states, strict=True)):
        assert_close(list(mine), list(yours), f"step {step}")


def test_attentions_while_generating(tmp_path: Path) -> None:
    ours = tiny_model(hybrid_override_pattern="*EM*", moe_latent_size=None)
    ours.save_pretrained(tmp_path)
    ours = NemotronHForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    theirs = their_model(tmp_path, attn_implementation="eager")
    ids = draw_ids(ours, 2, 6)
    result, expected = (run(model, ids, output_attentions=True, max_new_tokens=4) for model in (ours, theirs))
    assert [len(step) for step in result.attentions] == [2] * 4
    for step, (mine, yours) in enumerate(zip(result.attentions, expected.attentions, strict=True)):
        assert_close(list(mine), list(yours), f"step {step}")


def test_a_second_turn_behind_the_first_ones_cache(pair: tuple[Any, Any]) -> None:
    ours, _ = pair
    first = [run(model, draw_ids(ours, 2, 6)) for model in pair]
    assert torch.equal(first[0].sequences, first[1].sequences)
    text = torch.cat([first[0].sequences, draw_ids(ours, 2, 1, seed=4)], dim=1)
    result, expected = (
        run(model, text, past_key_values=turn.past_key_values) for model, turn in zip(pair, first, strict=True)
    )
    fresh = run(ours, text)
    assert torch.equal(result.sequences, fresh.sequences)
    assert_close(list(result.logits), list(fresh.logits), "with the first turn's cache")
    assert len(expected.logits) == len(result.logits)


@pytest.mark.parametrize("mode", ["greedy", "several beams", "sampling", "repetition penalty"])
def test_shipped_model(mode: str) -> None:
    ours = NemotronHForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()
    theirs = their_model(demo_model(), dtype=torch.float32)
    ids = draw_ids(ours, 2, 9)
    result, expected = (run(model, ids, **MODES[mode]) for model in (ours, theirs))
    assert torch.equal(result.sequences, expected.sequences)
    assert_close(list(result.logits), list(expected.logits), mode)
