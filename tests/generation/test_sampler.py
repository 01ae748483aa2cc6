"""The sampler against plain NumPy definitions and against the distribution it must draw from."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from nemotron_h import SamplingParams
from nemotron_h.generation.sampler import Sampler, top_logprobs
from nemotron_h.ops.sample.reference import truncate

Vector = NDArray[np.float64]
EDGE = 1e-5  # a probability closer to a bound may fall on either side in float32

logit_rows = st.integers(1, 12).flatmap(
    lambda size: arrays(np.float32, size, elements=st.floats(-12, 12, width=16)).map(lambda a: a.astype(np.float64))
)


def softmax(logits: Vector) -> Vector:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def kept(logits: Vector, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[int]:
    truncated = truncate(torch.tensor(logits, dtype=torch.float32), top_k, top_p, min_p).numpy()
    ids = np.flatnonzero(np.isfinite(truncated))
    np.testing.assert_array_equal(truncated[ids], logits[ids])  # what stays is not changed
    assert np.all(np.isneginf(np.delete(truncated, ids)))
    return ids.tolist()


def values(logits: Vector, ids: list[int]) -> list[float]:
    """Sorted: of two equal logits either may be kept."""
    return sorted(logits[ids].tolist())


def nucleus(logits: Vector, top_p: float) -> int:
    """Size of the smallest set of tokens whose probability reaches top_p."""
    reached = np.cumsum(np.sort(softmax(logits))[::-1])
    assume(np.abs(reached - top_p).min() > EDGE)
    return int(np.searchsorted(reached, top_p) + 1)


@given(logits=logit_rows, top_k=st.integers(0, 14))
def test_top_k(logits: Vector, top_k: int) -> None:
    size = min(top_k or len(logits), len(logits))
    assert values(logits, kept(logits, top_k=top_k)) == sorted(logits.tolist())[len(logits) - size :]


@given(logits=logit_rows, top_p=st.floats(0.001, 0.999))
def test_top_p(logits: Vector, top_p: float) -> None:
    size = nucleus(logits, top_p)
    assert values(logits, kept(logits, top_p=top_p)) == sorted(logits.tolist())[len(logits) - size :]


@given(logits=logit_rows, min_p=st.floats(0.001, 1.0))
def test_min_p(logits: Vector, min_p: float) -> None:
    ratio = np.exp(logits - logits.max())
    assume(np.abs(np.log(ratio[ratio < 1]) - math.log(min_p)).min(initial=1) > EDGE)
    assert kept(logits, min_p=min_p) == np.flatnonzero(ratio >= min_p).tolist()


@given(logits=logit_rows, top_k=st.integers(1, 12), top_p=st.floats(0.001, 0.999), min_p=st.floats(0.001, 1.0))
def test_all_three_one_after_the_other(logits: Vector, top_k: int, top_p: float, min_p: float) -> None:
    assume(len(set(logits.tolist())) == len(logits))
    best = np.sort(logits)[::-1][:top_k]
    best = best[: nucleus(best, top_p)]
    ratio = np.exp(best - best[0])
    assume(np.abs(np.log(ratio[1:]) - math.log(min_p)).min(initial=1) > EDGE)
    assert values(logits, kept(logits, top_k, top_p, min_p)) == sorted(best[ratio >= min_p].tolist())


def test_ties_at_the_bounds() -> None:
    four = np.zeros(4)
    assert len(kept(four, top_k=2)) == 2
    assert len(kept(four, top_p=0.4)) == 2
    assert len(kept(four, top_p=1e-300)) == 1
    assert len(kept(four, min_p=1.0)) == 4


@settings(max_examples=150)
@given(
    logits=arrays(np.float32, 6, elements=st.floats(-8, 8, width=16)),
    prompt=st.lists(st.integers(0, 5), max_size=4),
    said=st.lists(st.integers(0, 5), max_size=6),
    repetition=st.sampled_from([1.0, 0.5, 1.3, 4.0]),
    presence=st.sampled_from([0.0, -2.0, 3.0]),
    frequency=st.sampled_from([0.0, -1.0, 1.5]),
    bias=st.dictionaries(st.integers(0, 5), st.floats(-9, 9), max_size=3),
)
def test_penalties_and_bias(
    logits: NDArray[np.float32], prompt: list[int], said: list[int], repetition: float, presence: float,
    frequency: float, bias: dict[int, float],
) -> None:  # fmt: skip
    params = SamplingParams(
        temperature=0, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency,
        logit_bias=bias,
    )  # fmt: skip
    sampler, counts = Sampler(params, prompt), Counter(said)
    sampler.said += said
    expected = logits.astype(np.float64)
    for token in {*prompt, *said}:
        expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
    for token, count in counts.items():
        expected[token] -= presence + frequency * count
    for token, value in bias.items():
        expected[token] += value
    given_logits = torch.tensor(logits)
    np.testing.assert_allclose(sampler._adjust(given_logits).numpy(), expected, atol=1e-5)
    assert given_logits.tolist() == logits.tolist()  # logprobs are taken from them afterwards
    chosen = sampler.choose(given_logits)
    assert expected[chosen] >= expected.max() - 1e-5
    assert sampler.said == [*prompt, *said, chosen]


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, -2.0])
CHI2_7 = 24.3  # 0.1 % of samples from the right distribution exceed it, with 7 degrees of freedom


def chi2(counts: Counter[int], expected: Vector) -> float:
    total = sum(counts.values())
    return sum((counts[i] - total * p) ** 2 / (total * p) for i, p in enumerate(expected))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_draws_follow_the_softmax(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0), [])
    counts = Counter(sampler.choose(LOGITS) for _ in range(12000))
    assert chi2(counts, softmax(LOGITS.double().numpy() / temperature)) < CHI2_7
    assert chi2(counts, softmax(LOGITS.double().numpy() / (1.2 * temperature))) > CHI2_7  # the test can tell


def test_first_draws_of_successive_seeds_follow_it_too() -> None:
    """The n samples of a request use seed, seed + 1, ...: they must be as different as chance makes them."""
    counts = Counter(Sampler(SamplingParams(seed=7), [], sample).choose(LOGITS) for sample in range(4000))
    assert chi2(counts, softmax(LOGITS.double().numpy())) < CHI2_7


def test_truncated_draws_keep_their_proportions() -> None:
    sampler = Sampler(SamplingParams(seed=0, top_k=3), [])
    counts = Counter(sampler.choose(LOGITS) for _ in range(4000))
    assert set(counts) == {0, 1, 6}
    expected = np.zeros(8)
    expected[[0, 1, 6]] = softmax(np.array([2.0, 1.0, 1.5]))
    assert sum((counts[i] - 4000 * expected[i]) ** 2 / (4000 * expected[i]) for i in (0, 1, 6)) < 13.8


def test_seeds_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    Sampler(SamplingParams(seed=0), []).choose(LOGITS)
    assert torch.equal(torch.rand(3), expected)


EXTREME = torch.tensor([3e38, -3e38, 2.9e38, 0.0])


@pytest.mark.parametrize("logits", [LOGITS, EXTREME, -EXTREME, torch.zeros(4), 1e-38 * LOGITS], ids=range(5))
@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-40, 1e-6, 1.0, 100])
@pytest.mark.parametrize("penalty", [0.01, 1.0, 100])
def test_extremes_choose_a_token(logits: torch.Tensor, temperature: float, penalty: float) -> None:
    params = SamplingParams(
        temperature=temperature, repetition_penalty=penalty, frequency_penalty=100, logit_bias={0: 100}, seed=0,
        top_p=1e-300, min_p=1.0, top_k=2**31 - 1,
    )  # fmt: skip
    sampler = Sampler(params, [0, 1, 2, 3])
    assert all(0 <= sampler.choose(logits) < len(logits) for _ in range(3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_logits_that_are_not_finite_choose_nothing(value: float, penalty: float) -> None:
    for temperature in (0, 1):
        sampler = Sampler(SamplingParams(temperature=temperature, repetition_penalty=penalty), [1, 2])
        assert sampler.choose(torch.tensor([0.0, 1.0, value, 2.0])) == -1
        assert sampler.said == [1, 2]


def test_temperature_towards_zero_is_greedy() -> None:
    for temperature in (1e-2, 1e-20, 1e-300, 5e-324):
        sampler = Sampler(SamplingParams(temperature=temperature, seed=0), [])
        assert {sampler.choose(LOGITS) for _ in range(20)} == {0}


@given(logits=logit_rows, count=st.integers(0, 14), token=st.integers(0, 11))
def test_top_logprobs(logits: Vector, count: int, token: int) -> None:
    token %= len(logits)
    logprobs = torch.tensor(logits, dtype=torch.float32).log_softmax(-1)
    found = top_logprobs(logprobs, token, count)
    best = sorted(logprobs.tolist(), reverse=True)[:count]
    assert list(found.values())[: len(best)] == best
    assert all(value == float(logprobs[i]) for i, value in found.items())
    assert len(found) == len(best) + (token not in list(found)[: len(best)])
    assert token in found
