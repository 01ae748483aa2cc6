"""Rows with padding on the left, on the right and on both sides generate what each generates alone."""

from typing import Any

import pytest
import torch
from generate_cases import BEAMS, GREEDY, PATTERNS, batch_of, decode, double_model

from helpers import BIASED, draw_ids
from nemotron_h import NemotronHForCausalLM, UnsupportedError

LENGTHS = (2, 7, 4)
STARTS = {"left": [5, 0, 3], "right": [0, 0, 0], "mixed": [5, 0, 0], "both sides": [3, 0, 1]}


def rows_of(model: NemotronHForCausalLM, seed: int) -> list[torch.Tensor]:
    return [draw_ids(model, length, seed=10 * seed + length) for length in LENGTHS]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("side", STARTS)
def test_greedy_rows(pattern: str, side: str) -> None:
    model = double_model(pattern, **BIASED)
    rows = rows_of(model, seed=1)
    expected = torch.stack([decode(model, row) for row in rows])
    for use_cache in (True, False):
        for filler in (0, 31):
            result = model.generate(**batch_of(rows, STARTS[side], 7, filler), **GREEDY, use_cache=use_cache)
            assert torch.equal(result[:, 7:], expected), (use_cache, filler)


@pytest.mark.parametrize("pattern", ["ME*-M", "MMM", "**"])
@pytest.mark.parametrize("side", STARTS)
def test_beams_of_rows(pattern: str, side: str) -> None:
    model = double_model(pattern, **BIASED)
    rows = rows_of(model, seed=2)
    expected = torch.cat([model.generate(row[None], **BEAMS, use_cache=False)[:, len(row) :] for row in rows])
    for use_cache in (True, False):
        result = model.generate(**batch_of(rows, STARTS[side], 7), **BEAMS, use_cache=use_cache)
        assert torch.equal(result[:, 7:], expected), use_cache


@pytest.mark.parametrize("keep", [None, 1, 3])
@pytest.mark.parametrize("side", STARTS)
def test_whatever_logits_the_config_keeps(keep: int | None, side: str) -> None:
    model = double_model("ME*-M", num_logits_to_keep=keep, **BIASED)
    rows = rows_of(model, seed=3)
    expected = torch.stack([decode(model, row) for row in rows])
    for use_cache in (True, False):
        result = model.generate(**batch_of(rows, STARTS[side], 7), **GREEDY, use_cache=use_cache)
        assert torch.equal(result[:, 7:], expected), use_cache


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_chunks_of_the_prompt(size: int) -> None:
    model = double_model("ME*-M", **BIASED)
    rows = rows_of(model, seed=4)
    result = model.generate(**batch_of(rows, STARTS["left"], 7), **GREEDY, prefill_chunk_size=size)
    assert torch.equal(result[:, 7:], torch.stack([decode(model, row) for row in rows]))


@pytest.mark.parametrize("side", ["right", "mixed", "both sides"])
def test_chunks_of_a_prompt_that_ends_early_are_refused(side: str) -> None:
    model = double_model("M*")
    with pytest.raises(UnsupportedError, match=r"prefill_chunk_size with right padding.*pad on the left"):
        model.generate(**batch_of(rows_of(model, seed=5), STARTS[side], 7), **GREEDY, prefill_chunk_size=50)


@pytest.mark.parametrize("pattern", ["ME*-M", "MMM"])
def test_drafts_behind_padding(pattern: str) -> None:
    model, assistant = double_model(pattern), double_model("M*", seed=4)
    row = draw_ids(model, 4, seed=6)
    modes: list[dict[str, Any]] = [{"prompt_lookup_num_tokens": 2}, {"assistant_model": assistant}]
    for mode in modes:
        result = model.generate(**batch_of([row], [3], 7), **GREEDY, **mode)
        assert torch.equal(result[0, 7:], decode(model, row)), "left"
        with pytest.raises(UnsupportedError, match=r"assisted decoding with right padding.*pad on the left"):
            model.generate(**batch_of([row], [1], 7), **GREEDY, **mode)
