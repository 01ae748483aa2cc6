"""Perplexity and bits per byte against a recomputation token by token."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemotron_h import LLM, InputError, demo_model
from nemotron_h.evaluation import TextScore, combine, perplexity, score_text

HELD_OUT = (Path(__file__).parent.parent / "data" / "held_out_austen.txt").read_text().split("\n\n", 1)[1].strip()


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(demo_model(), dtype=torch.float32)


def naive(llm: LLM, text: str, context: int, stride: int) -> list[float]:
    """Each token by a pass of its own over what its window shows, in float64 behind the logits."""
    ids = [llm.tokenizer.bos_token_id, *llm.tokenizer(text, add_special_tokens=False)["input_ids"]]
    nats, start = [], 0
    for target in range(1, len(ids)):
        while target >= start + context:
            start += stride
        with torch.no_grad():
            logits_V = llm.model(torch.tensor([ids[start:target]]), use_cache=False).logits[0, -1].double()
        nats.append(float(-logits_V.log_softmax(-1)[ids[target]]))
    return nats


@pytest.mark.parametrize(("context", "stride"), [(512, 256), (16, 8), (16, 15), (9, 1), (64, 32)])
def test_every_token_once_with_the_context_that_is_documented(
    llm: LLM, context: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Über die Wüste: 🚀 " + HELD_OUT[:180]
    for elements in (2**24, 2**15):  # windows in one piece, and in several
        monkeypatch.setattr(perplexity, "_LOGITS", elements)
        score = score_text(llm, text, context=context, stride=stride)
        expected = naive(llm, text, context, stride)
        assert score.tokens == len(expected)
        assert score.bytes == len(text.encode())
        assert score.nll == pytest.approx(math.fsum(expected), rel=1e-5)
        assert score.perplexity.value == pytest.approx(math.exp(math.fsum(expected) / len(expected)), rel=1e-5)
        assert score.bits_per_byte.value == pytest.approx(math.fsum(expected) / math.log(2) / score.bytes, rel=1e-5)
    assert score.windows == 1 + max(0, math.ceil((len(expected) + 1 - context) / stride))


def test_figure_of_the_shipped_model(llm: LLM) -> None:
    score = score_text(llm, HELD_OUT)
    bits = -sum(s for s in llm.score(HELD_OUT)[0] if s is not None) / math.log(2) / len(HELD_OUT.encode())
    assert score.bits_per_byte.value == pytest.approx(bits, abs=0.01)  # that one lacks the first token
    low, high = score.bits_per_byte.low, score.bits_per_byte.high
    assert low < score.bits_per_byte.value < high
    assert high - low < 0.5


def test_a_text_that_many_tokens_spell_counts_each_byte_once(llm: LLM) -> None:
    score = score_text(llm, "a🚀b" * 60)
    assert sum(size for *_, size in score.blocks) == score.bytes == 60 * 6
    assert sum(tokens for _, tokens, _ in score.blocks) == score.tokens


def test_without_a_start_token_the_first_token_is_given() -> None:
    llm, text = LLM(demo_model()), "The weather was fine."
    llm.tokenizer.bos_token = None
    ids = llm.tokenizer(text)["input_ids"]
    score = score_text(llm, text)
    assert (score.tokens, score.bytes) == (len(ids) - 1, len(text) - len(llm.tokenizer.decode(ids[:1])))


def test_confidence_is_the_spread_of_repeated_draws() -> None:
    """Texts drawn from known blocks: the interval holds the true ratio about 95 times in 100."""
    generator, hits, truth = torch.Generator().manual_seed(0), 0, 2.0 / 4.0
    for _ in range(300):
        sizes = torch.randint(300, 700, (40,), generator=generator)
        nats = sizes / 4 * (2.0 + torch.randn(40, generator=generator))
        blocks = [(float(n) * math.log(2), 128, int(s)) for n, s in zip(nats, sizes, strict=True)]
        low, high = TextScore("x", 1, 1, 1.0, 1, 1.0, blocks).bits_per_byte[1:]
        hits += low <= truth <= high
    assert 0.90 < hits / 300 < 0.98


def test_texts_together(llm: LLM) -> None:
    parts = [score_text(llm, HELD_OUT[:400]), score_text(llm, HELD_OUT[400:1200])]
    total = combine(parts)
    assert total.nll == pytest.approx(sum(part.nll for part in parts))
    assert total.bits_per_byte.value == pytest.approx(total.nll / math.log(2) / 1200)
    assert score_text(llm, "a").bits_per_byte.low is None


def test_progress_ends_with_everything(llm: LLM) -> None:
    seen: list[tuple[int, int]] = []
    score = score_text(llm, HELD_OUT[:900], context=64, progress=lambda *step: seen.append(step))
    assert len(seen) == score.windows > 3
    assert seen[-1] == (score.tokens, score.tokens)


def bad_calls() -> Iterator[tuple[str, dict[str, int]]]:
    yield "", {}
    yield "\ud800", {}
    for sizes in ({"context": 1}, {"context": 10**9}, {"stride": 0}, {"context": 8, "stride": 8}):
        yield "a text", sizes


@pytest.mark.parametrize(("text", "sizes"), bad_calls())
def test_refusals(llm: LLM, text: str, sizes: dict[str, int]) -> None:
    with pytest.raises(InputError):
        score_text(llm, text, **sizes)
    with pytest.raises(InputError, match="no tokenizer"):
        score_text(LLM(llm.model), "a text")
