"""Sampling: the kernel and the reference against plain definitions, the same token from every level for the same u."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn

from nemotron_h.errors import InputError, KernelError
from nemotron_h.ops import _native
from nemotron_h.ops import sample as package
from nemotron_h.ops.sample import LOWEST_TEMPERATURE, check, native, reference, sample

LEVELS = _native.levels()
NAN, INF = float("nan"), float("inf")
Rules = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p


def draw(size: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def tokens(logits: Tensor, rules: Rules, u: float) -> list[int]:
    return [native.sample(logits, *rules, u, level) for level in LEVELS]


def distribution(logits: Tensor, rules: Rules) -> np.ndarray:
    """Probability of every token, by the words of the contract, in float64."""
    temperature, top_k, top_p, min_p = rules
    values = logits.double().numpy()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    weights = np.exp((values - values.max()) / temperature)
    kept = order[: top_k or len(order)]
    kept.sort(key=lambda i: (-weights[i], i))
    before, total = 0.0, weights[kept].sum()
    for rank, i in enumerate(kept if top_p < 1 else []):
        if rank and before >= top_p * total:
            kept = kept[:rank]
            break
        before += weights[i]
    kept = [i for i in kept if weights[i] >= min_p]
    result = np.zeros(len(values))
    result[kept] = weights[kept] / weights[kept].sum()
    return result


@examples(max_examples=150)
@given(
    size=st.one_of(st.integers(1, 80), st.sampled_from([1023, 1024, 1025, 3000, 5003])),
    scale=st.sampled_from([0.0, 0.01, 1.0, 4.0, 30.0]),
    coarse=st.booleans(),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.one_of(st.just(0), st.integers(1, 100)),
    top_p=st.one_of(st.just(1.0), st.floats(0.001, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    seed=st.integers(0, 999),
)
def test_draws_are_those_of_the_distribution(
    size: int, scale: float, coarse: bool, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    """The token's interval of the running sum holds u, but for float32's rounding; coarse logits have ties."""
    logits = draw(size, seed, scale)
    if coarse:
        logits = logits.round()
    rules = (temperature, top_k, top_p, min_p)
    ends = np.cumsum(distribution(logits, rules))
    factors = (0.9999, 1.0001)
    near = [distribution(logits, (temperature, top_k, min(1.0, top_p * f), min(1.0, min_p * f))) for f in factors]
    assume(all(np.abs(np.cumsum(d) - ends).max() < 1e-9 for d in near))  # else a bound is met within the rounding
    for u in (0.0, 0.123, 0.5, 0.877, 1 - 2.0**-53):
        found = {*tokens(logits, rules, u), reference.sample(logits, *rules, u)}
        for token in found:
            assert ends[token] > u - 1e-5
            assert token == 0 or ends[token - 1] < u + 1e-5
            assert distribution(logits, rules)[token] > 0
            assert check.wrong((logits, *rules, u), token) is None
        assert len({*tokens(logits, rules, u)}) == min(1, len(LEVELS)), "levels differ"


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 1000, 1024, 1039, 131072])
def test_greedy_takes_the_lowest_of_the_greatest(size: int) -> None:
    logits = draw(size, size)
    for at in {0, size // 2, size - 1}:
        logits[at] = 9.0
    for _ in range(2):
        expected = int(np.argmax(logits.numpy()))  # NumPy promises the first
        assert tokens(logits, (0.0, 0, 1.0, 0.0), 0.3) == [expected] * len(LEVELS)
        assert reference.sample(logits, 0.0, 0, 1.0, 0.0, 0.3) == expected
        logits[0] = 1.0
    assert {*tokens(torch.full((size,), -3e38), (0.0, 0, 1.0, 0.0), 0.0)} <= {0}
    assert {*tokens(torch.tensor([-1.0, -0.0, 0.0]), (0.0, 0, 1.0, 0.0), 0.0)} <= {1}


def test_greedy_tells_subnormals_apart() -> None:
    assert tokens(torch.tensor([1e-40, 3e-40, 2e-40]), (0.0, 0, 1.0, 0.0), 0.0) == [1] * len(LEVELS)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("size", [1, 15, 16, 33, 2000])
def test_a_logit_that_is_not_finite(value: float, size: int) -> None:
    for at in {0, size // 2, size - 1}:
        logits = draw(size)
        logits[at] = value
        for temperature in (0.0, 1.0):
            rules = (temperature, 5, 0.9, 0.1)
            assert [*tokens(logits, rules, 0.5), reference.sample(logits, *rules, 0.5)] == [-1] * (len(LEVELS) + 1)


RULES: list[Rules] = [
    (1.0, 0, 1.0, 0.0), (1.0, 50, 1.0, 0.0), (1.0, 50, 0.9, 0.0), (0.7, 0, 0.9, 0.0), (1.0, 0, 1.0, 0.05),
    (1.0, 40000, 0.95, 0.001), (1.0, 0, 0.9999, 0.0), (1.0, 0, 1e-300, 0.0),
]  # fmt: skip


def vocabularies() -> dict[str, Tensor]:
    peaked = draw(131072, 1, 2.5)
    peaked[torch.arange(0, 131072, 4001)] += 12
    heavy = draw(50021, 2) ** 9
    return {"flat": draw(131072), "peaked": peaked, "equal": torch.zeros(131072), "heavy": heavy,
            "sorted": draw(30011, 3).sort().values, "negative": -1e30 - 1e29 * draw(7919, 4).abs()}  # fmt: skip


@pytest.mark.parametrize("name", vocabularies())
def test_large_vocabularies(name: str) -> None:
    logits = vocabularies()[name]
    for rules in RULES:
        for u in (0.0, 0.37, 1 - 2.0**-53):
            found = tokens(logits, rules, u)
            assert len({*found}) == min(1, len(LEVELS)), (rules, u)
            for token in {*found, reference.sample(logits, *rules, u)}:
                assert check.wrong((logits, *rules, u), token) is None, (rules, u)


def kept_by_the_kernel(size: int, rules: Rules, logits: Tensor, level: str) -> Tensor:
    """The weights that the draw is made from, as the kernel leaves them in its working memory."""
    native.sample(logits, *rules, 0.5, level)
    return native._scratch(size)[:size].clone()


@pytest.mark.parametrize("size", [17, 1000, 4099])
def test_exactly_the_tokens_that_stay(size: int) -> None:
    """Every token, not only the drawn one: few different values, so that every bound cuts through ties."""
    generator = torch.Generator().manual_seed(size)
    by_k = [(1.0, k, 1.0, 0.0) for k in (1, size // 3, size - 1)]
    by_p = [(1.0, 0, 0.7321, 0.0), (2.0, size // 2, 0.513, 0.0)]
    by_min = [
        (1.0, 0, 1.0, 0.3337),
        (1.0, 0, 0.91, 0.0217),
        (1.0, 0, 0.9995, 0.1),
    ]  # the last: below the share of top_p
    for values in (1, 2, 5, 1000):
        logits = torch.randint(0, values, (size,), generator=generator) * 8.0 / values - 2
        for rules in (*by_k, *by_p, *by_min):
            expected = distribution(logits, rules)
            for level in LEVELS:
                weights = kept_by_the_kernel(size, rules, logits, level).double().numpy()
                assert (weights > 0).tolist() == (expected > 0).tolist(), (values, rules, level)
                np.testing.assert_allclose(weights / weights.sum(), expected, rtol=1e-5)


def test_levels_leave_the_same_bits_and_no_poison_shows() -> None:
    for size in (1, 16, 1025, 20011):
        logits = draw(size, size, 3.0)
        for rules in RULES:
            left = []
            for level in LEVELS:
                native._scratch(size).fill_(NAN)
                token = native.sample(logits, *rules, 0.5, level)
                left.append((token, native._scratch(size)[:size].view(torch.int32).clone()))
            assert all(token == left[0][0] and torch.equal(bits, left[0][1]) for token, bits in left), (size, rules)


def test_the_row_is_not_changed_and_its_address_does_not_show() -> None:
    storage = draw(1300, 5, 2.0)
    for offset in (0, 1, 3, 16):
        row = storage[offset : offset + 1200]
        before = storage.clone()
        for rules in RULES:
            assert tokens(row, rules, 0.61) == tokens(row.clone(), rules, 0.61)
        assert torch.equal(storage, before)


def test_what_lies_before_and_behind_the_row_is_not_read() -> None:
    for size in (1, 5, 16, 31):
        storage = torch.full((size + 64,), NAN)
        storage[32 : 32 + size] = draw(size)
        for rules in RULES:
            token = reference.sample(draw(size), *rules, 0.4)
            assert tokens(storage[32 : 32 + size], rules, 0.4) == [token] * len(LEVELS)


@pytest.mark.parametrize("impl", ["reference", None])
def test_extremes(impl: str | None) -> None:
    extreme = torch.tensor([3e38, -3e38, 2.9e38, 0.0])
    for logits in (extreme, -extreme, torch.zeros(4), 1e-38 * draw(9)):
        for temperature in (5e-324, 1e-300, 1e-6, 1.0, 100.0):
            for u in (0.0, 0.5, 1 - 2.0**-53):
                assert 0 <= sample(logits, temperature, 2**31 - 1, 1e-300, 1.0, u, impl=impl) < len(logits)
    for temperature in (5e-324, 1e-300, LOWEST_TEMPERATURE):
        assert sample(torch.tensor([1.0, 1.0000001, 0.5]), temperature, u=0.1, impl=impl) == 1


@pytest.mark.parametrize("impl", ["reference", None])
def test_a_token_that_no_u_can_reach_is_not_drawn_at_zero(impl: str | None) -> None:
    """u = 0 takes the first token of any weight."""
    logits = torch.tensor([-70.0, -63.0, 0.0, -1.0])
    assert sample(logits, u=0.0, impl=impl) == 1
    assert sample(logits, temperature=0.9, u=0.0, impl=impl) == 2


@pytest.mark.parametrize("impl", ["reference", None])
def test_frequencies(impl: str | None) -> None:
    """Equally spaced u: each token's share of them is its probability."""
    logits, rules = draw(30, 7), (0.8, 12, 0.95, 0.02)
    found = np.bincount([sample(logits, *rules, (i + 0.5) / 2000, impl=impl) for i in range(2000)], minlength=30)
    assert np.abs(found / 2000 - distribution(logits, rules)).max() < 1.01 / 2000


def test_other_dtypes_take_the_reference() -> None:
    logits = draw(40, 3).double()
    for u in (0.1, 0.5, 0.9):
        assert sample(logits, u=u) == reference.sample(logits, 1.0, 0, 1.0, 0.0, u)
    assert sample(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), temperature=0) == 1


def refused() -> dict[str, Tensor]:
    row = draw(8)
    return {
        "requires grad": nn.Parameter(row),
        "on meta": row.to("meta"),
        "not torch.float64": row.double(),
        "not torch.bfloat16": row.bfloat16(),
        r"\[2, 4\] are no row": row.view(2, 4),
        r"\[0\] are no row": row[:0],
        r"\(stride 2\) are not contiguous": row[::2],
    }


@pytest.mark.parametrize("reason", refused())
def test_what_the_kernel_refuses(reason: str) -> None:
    with pytest.raises(KernelError, match=reason if LEVELS else "without its C"):
        sample(refused()[reason], impl="native")


@pytest.mark.parametrize("shape", [(0,), (2, 3), ()])
def test_shapes_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"must be \[V\] with V >= 1"):
        sample(torch.zeros(shape))


def test_check_accepts_the_kernel_and_refuses_wrong_tokens(
    environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(NEMOTRON_H_CHECK="1")
    logits = draw(200, 8, 2.0)
    for i in range(40):
        sample(logits, 0.8, 20, 0.9, 0.01, u=i / 40)
    assert sample(torch.tensor([0.0, NAN])) == -1
    # A bound met exactly: of two equal halves, top_p = 0.5 may keep one or both, and u = 0.5 may fall on either.
    halves = torch.zeros(2)
    assert check.wrong((halves, 1.0, 0, 1.0, 0.0, 0.5), 0) is None
    assert check.wrong((halves, 1.0, 0, 1.0, 0.0, 0.5), 1) is None
    assert check.wrong((halves, 1.0, 0, 0.5, 0.0, 0.9), 1) is None
    assert check.wrong((torch.tensor([0.0, math.log(0.25)]), 1.0, 0, 1.0, 0.25, 0.9), 1) is None
    assert check.wrong((halves, 1.0, 0, 0.4, 0.0, 0.9), 1) == "chose token 1 where 0 is right"
    # Weights that float32 cannot tell apart: the lower id stays. It can tell the next two apart.
    assert check.wrong((torch.tensor([0.0, 1e-9]), 1.0, 0, 1e-9, 1.0, 0.5), 0) is None
    assert check.wrong((torch.tensor([0.0, 1e-3]), 1.0, 0, 1e-9, 1.0, 0.5), 0) == "chose token 0 where 1 is right"
    for wrong, temperature in ((0, 1.0), (1, 0.0), (-1, 1.0), (2, 1.0)):
        monkeypatch.setattr(package._SAMPLE, "native", lambda *_, wrong=wrong: wrong)
        with pytest.raises(KernelError, match=rf"sample: native \w+ chose token {wrong} where . is right, for float32"):
            sample(torch.tensor([1.0, 0.0]), temperature, u=0.9)


def test_threads_have_their_own_working_memory() -> None:
    """Many draws at once, of rows of different lengths, are those of one after the other."""
    rows = [draw(3000 + 50 * i, i, 3.0) for i in range(16)]

    def choose(row: Tensor) -> list[int]:
        return [native.sample(row, 1.0, 200, 0.9, 0.0, i / 50) for i in range(50)]

    alone = [choose(row) for row in rows]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(choose, rows)) == alone
        mine, other = native._scratch(9000), pool.submit(native._scratch, 9000).result()
        assert mine.data_ptr() != other.data_ptr()
