"""`generate` of transformers on our model: cache or none, any padding, beams, sampling; what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerFast, StaticCache, set_seed

from helpers import BIASED, draw_ids, tiny_model
from nemotron_h import NemotronHForCausalLM, NemotronHHybridDynamicCache
from nemotron_h.errors import CacheError, InputError, UnsupportedError

PATTERNS = ["ME*-M", "MM", "**", "E", "-*"]
GREEDY = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": False}


def naive(model: NemotronHForCausalLM, ids: Tensor, steps: int = 12) -> Tensor:
    """Greedy decoding by full forward passes of the rows alone."""
    for _ in range(steps):
        with torch.no_grad():
            rows = [model(row[None], use_cache=False).logits[0, -1].argmax() for row in ids]
        ids = torch.cat([ids, torch.stack(rows)[:, None]], dim=1)
    return ids


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    """Rows of unequal length in one batch, padding on the left, on the right, or in the middle."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        free = width - len(row)
        gap = {"left": 0, "right": len(row), "middle": len(row) // 2}[side]
        places = [j if j < gap else j + free for j in range(len(row))]
        ids[i, places], mask[i, places] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_greedy(pattern: str, tokens: int) -> None:
    model = tiny_model(hybrid_override_pattern=pattern)
    ids = draw_ids(model, 2, tokens)
    expected = naive(model, ids)
    for kwargs in ({}, {"use_cache": False}, {"cache_implementation": "dynamic"}):
        assert torch.equal(model.generate(ids, **GREEDY, **kwargs), expected), kwargs


@pytest.mark.parametrize("keep", [None, 0, 1, 3])
def test_logits_of_the_prompt(keep: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`num_logits_to_keep` decides how many the first pass computes, nothing else."""
    model = tiny_model(num_logits_to_keep=keep)
    ids = draw_ids(model, 1, 6)
    widths: list[int] = []
    forward = model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        widths.append(output.logits.shape[1])
        return output

    monkeypatch.setattr(model, "forward", counting)
    model._supports_logits_to_keep = lambda: True  # it looks at the signature of forward
    result = model.generate(ids, **GREEDY)
    assert widths == [keep or 6] + [1] * 11
    monkeypatch.undo()
    assert torch.equal(result, naive(model, ids))


@pytest.mark.parametrize("pattern", ["ME*-M", "MM", "**"])
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padded_rows_are_the_rows_alone(pattern: str, side: str) -> None:
    model = tiny_model(hybrid_override_pattern=pattern, **BIASED)
    rows = [draw_ids(model, n, seed=n) for n in (2, 9, 5)]
    batch = padded(rows, side)
    width = batch["input_ids"].shape[1]
    for kwargs in ({}, {"use_cache": False}):
        result = model.generate(**batch, **GREEDY, **kwargs)
        for row, generated in zip(rows, result, strict=True):
            assert torch.equal(generated[width:], naive(model, row[None])[0, len(row) :])


@pytest.mark.parametrize("side", ["left", "right"])
def test_beams(side: str) -> None:
    model = tiny_model(**BIASED)
    rows = [draw_ids(model, n, seed=n) for n in (3, 6)]
    options = GREEDY | {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.0}
    alone = [model.generate(row[None], **options, use_cache=False)[:, len(row) :] for row in rows]
    result = model.generate(**padded(rows, side), **options)
    assert torch.equal(result[:, 6:], torch.cat(alone))
    assert not torch.equal(result[::2, 6:], model.generate(**padded(rows, side), **GREEDY)[:, 6:]), "beams find others"


def test_sampling_follows_the_seed() -> None:
    model = tiny_model()
    ids = draw_ids(model, 1, 4)
    options = GREEDY | {"do_sample": True, "temperature": 1.5}

    def draw(seed: int, **kwargs: Any) -> Tensor:
        set_seed(seed)
        return model.generate(ids, **(options | kwargs))

    assert torch.equal(draw(1), draw(1))
    assert torch.equal(draw(1), draw(1, use_cache=False))
    assert len({tuple(draw(seed)[0].tolist()) for seed in range(5)}) == 5
    assert torch.equal(draw(1, top_k=1), naive(model, ids))


@pytest.mark.parametrize("pattern", ["ME*-M", "MM"])
def test_speculation_of_transformers(pattern: str) -> None:
    """Drafts of any quality leave the result as it is: states are rolled back exactly."""
    model, assistant = tiny_model(hybrid_override_pattern=pattern), tiny_model(seed=5, hybrid_override_pattern="M*")
    ids = draw_ids(model, 1, 5).repeat(1, 3)
    expected = naive(model, ids)
    assert torch.equal(model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(model.generate(ids, **GREEDY, assistant_model=assistant), expected)
    assert torch.equal(
        model.generate(ids, **GREEDY, assistant_model=tiny_model(hybrid_override_pattern=pattern)), expected
    )


def test_prefill_in_chunks() -> None:
    model = tiny_model(**BIASED)
    rows = [draw_ids(model, n, seed=n) for n in (4, 11)]
    batch = padded(rows, "left")
    expected = model.generate(**batch, **GREEDY)
    for size in (1, 4, 64):
        assert torch.equal(model.generate(**batch, **GREEDY, prefill_chunk_size=size), expected)


def test_what_cannot_be_right_padded() -> None:
    model = tiny_model()
    batch = padded([draw_ids(model, 3), draw_ids(model, 6)], "right")
    with pytest.raises(UnsupportedError, match=r"prefill_chunk_size with right padding.*pad on the left"):
        model.generate(**batch, **GREEDY, prefill_chunk_size=2)
    single = {name: tensor[:1] for name, tensor in batch.items()}
    for kwargs in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": tiny_model(seed=1)}):
        with pytest.raises(UnsupportedError, match="assisted decoding with right padding"):
            model.generate(**single, **GREEDY, **kwargs)


@pytest.mark.parametrize("name", ["offloaded", "offloaded_static", "quantized", "sliding_window"])
def test_other_caches_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match="NemotronHHybridDynamicCache"):
        tiny_model().generate(torch.tensor([[3, 4]]), **GREEDY, cache_implementation=name)


def test_continuous_batching() -> None:
    model = tiny_model()
    with pytest.raises(UnsupportedError, match="use LLM"):
        model.generate(torch.tensor([[3, 4]]), cache_implementation="paged")
    with pytest.raises(UnsupportedError, match="use LLM"):
        model.generate_batch([[3, 4]])
    with pytest.raises(UnsupportedError, match="use LLM"):
        model.init_continuous_batching()


def test_caches_that_are_given() -> None:
    model = tiny_model()
    ids = draw_ids(model, 1, 8)
    expected = naive(model, ids)
    for cache in (DynamicCache(), DynamicCache(config=model.config), NemotronHHybridDynamicCache(model.config)):
        result = model.generate(ids, **GREEDY, past_key_values=cache)
        assert torch.equal(result, expected)
        assert isinstance(cache, NemotronHHybridDynamicCache), "the caller's own object holds the state"
        assert cache.get_seq_length() == 19
    more = model.generate(result, **GREEDY, past_key_values=cache)
    assert torch.equal(more, naive(model, ids, 24)), "and continues from there"

    filled = DynamicCache()
    filled.update(torch.ones(1, 2, 3, 12), torch.ones(1, 2, 3, 12), 0)
    static = StaticCache(config=model.config, max_cache_len=30)
    for foreign in (filled, static):
        with pytest.raises(CacheError, match="NemotronHHybridDynamicCache"):
            model.generate(ids, **GREEDY, past_key_values=foreign)


def test_second_turn_with_right_padding() -> None:
    """The row's last token stands before the end of the new turn, behind a cache."""
    model = tiny_model(**BIASED)
    turns = [
        (draw_ids(model, 4, seed=1), draw_ids(model, 5, seed=2)),
        (draw_ids(model, 6, seed=3), draw_ids(model, 2, seed=4)),
    ]
    first, second = (padded([turn[i] for turn in turns], "right") for i in range(2))
    cache = NemotronHHybridDynamicCache(model.config)
    with torch.no_grad():
        model(**first, past_key_values=cache)
    whole = {name: torch.cat([first[name], second[name]], dim=1) for name in first}
    result = model.generate(**whole, **GREEDY, past_key_values=cache)
    for turn, generated in zip(turns, result, strict=True):
        assert torch.equal(generated[11:], naive(model, torch.cat(turn)[None])[0, sum(map(len, turn)) :])


def test_code_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text("raise SystemExit('it ran')")
    model, ids = tiny_model(), torch.tensor([[3, 4]])
    for name in (str(tmp_path), "transformers-community/group-beam-search"):
        with pytest.raises(UnsupportedError, match="never run"):
            model.generate(ids, **GREEDY, custom_generate=name, trust_remote_code=True)
    with pytest.raises(UnsupportedError, match="never run"):
        model.generate(ids, **GREEDY, num_beams=2, num_beam_groups=2, diversity_penalty=0.5, trust_remote_code=True)

    def own(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
        return input_ids + 1

    assert torch.equal(model.generate(ids, **GREEDY, custom_generate=own), ids + 1), "a function of the caller's is"


def test_the_pages_example(tmp_path: Path) -> None:
    """`generate(inputs.input_ids, max_length=30)`, then `batch_decode`."""
    words = {f"w{i}": i for i in range(50)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="w0", pad_token="w0").save_pretrained(tmp_path)
    tiny_model(eos_token_id=None).save_pretrained(tmp_path)

    model = NemotronHForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = "w5 w9 w31 w40"
    inputs = tokenizer(prompt, return_tensors="pt")
    generate_ids = model.generate(inputs.input_ids, max_length=30)
    text = tokenizer.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
    assert generate_ids.shape == (1, 30)
    assert text.startswith(prompt)
    assert torch.equal(generate_ids, naive(model, inputs.input_ids, 26))


def test_bad_input() -> None:
    model = tiny_model()
    for ids in (torch.tensor([[3, 50]]), torch.tensor([[-1, 3]])):
        with pytest.raises(InputError, match="vocab_size=50"):
            model.generate(ids, **GREEDY)
    for shape in ((1, 0), (0, 3)):
        with pytest.raises(InputError, match="the prompt is empty"):
            model.generate(torch.empty(shape, dtype=torch.long), **GREEDY)
    with pytest.raises(InputError, match="the prompt is empty"):
        model.generate(inputs_embeds=torch.empty(1, 0, 32), **GREEDY)
    assert model.generate(**GREEDY).shape == (1, 13), "without a prompt it starts from bos_token_id"
