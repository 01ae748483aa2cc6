"""The C++ router: logits within their budget, choices that are exactly the reference's, one set of bits everywhere."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn

from nemotron_h.errors import InputError, KernelError
from nemotron_h.ops import _native, dispatch, router, threads
from nemotron_h.ops.router import check, native, reference, route

LEVELS = _native.levels()
DTYPES = (torch.float32, torch.bfloat16)
NAN, INF = float("nan"), float("inf")
Parts = tuple[Tensor, Tensor, Tensor]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def bits(result: Parts) -> list[Tensor]:
    return [part.contiguous().view(torch.int32) for part in result]


def same(a: Parts, b: Parts) -> bool:
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


def arguments(
    tokens: int, experts: int, cols: int, seed: int = 0, x: torch.dtype = torch.float32, w: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    weight = draw(experts, cols, seed=seed + 1, scale=2 * cols**-0.5).to(w)
    return draw(tokens, cols, seed=seed, dtype=x), weight, draw(experts, seed=seed + 2, scale=0.3)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets the pool's threads for kernels called afterwards, whatever cores there are."""
    module = _native.load()
    assert module is not None

    def set_to(count: int) -> None:
        threads.sync()
        module.set_threads(count)

    yield set_to
    threads._set = None
    threads.sync()


def from_logits(logits: Tensor, bias: Tensor, *rule: object, level: str) -> Parts:
    """The kernel's choice for exactly these logits: the identity as weights, which no addition rounds."""
    experts = logits.shape[1]
    result = native.route(logits, torch.eye(experts), bias, *rule, level)  # type: ignore[arg-type]
    assert torch.equal(result[2], logits)
    return result


GROUPS = [(1, 1), (2, 1), (4, 2), (8, 3), (16, 16), (48, 20)]


@examples(max_examples=60)
@given(
    tokens=st.one_of(st.integers(1, 40), st.sampled_from([64, 67])),
    per_group=st.integers(1, 10),
    groups=st.sampled_from(GROUPS),
    cols=st.one_of(st.integers(1, 200), st.sampled_from([960, 2688, 4096])),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    norm=st.booleans(),
    scaling=st.sampled_from([1.0, 2.5, -0.5]),
    data=st.data(),
)
def test_within_the_budget_and_the_same_bits(
    tokens: int, per_group: int, groups: tuple[int, int], cols: int, dtypes: tuple[torch.dtype, torch.dtype],
    norm: bool, scaling: float, data: st.DataObject,
) -> None:  # fmt: skip
    experts = groups[0] * per_group
    top_k = data.draw(st.integers(1, min(22, per_group * groups[1])))
    args = (*arguments(tokens, experts, cols, 7, *dtypes), top_k, *groups, norm, scaling)
    results = [native.route(*args, level) for level in LEVELS]
    for result in results:
        assert [(t.shape, t.dtype) for t in result] == [
            ((tokens, top_k), torch.int64), ((tokens, top_k), torch.float32), ((tokens, experts), torch.float32),
        ]  # fmt: skip
        assert same(result, results[0])
    assert check.wrong(args, results[0]) is None
    for m in range(tokens):  # row by row, which is stricter
        assert check.wrong((args[0][m : m + 1], *args[1:]), tuple(t[m : m + 1] for t in results[0])) is None
        alone = native.route(args[0][m : m + 1], *args[1:], LEVELS[-1])
        assert same(alone, tuple(t[m : m + 1] for t in results[0])), "a token depends on its neighbours"


@pytest.mark.parametrize(("experts", "cols", "top_k"), [(128, 2688, 6), (512, 1024, 22), (512, 64, 512), (1, 1, 1)])
def test_sizes_of_the_family(experts: int, cols: int, top_k: int) -> None:
    args = (*arguments(3, experts, cols, 3, torch.bfloat16, torch.bfloat16), top_k, 1, 1, True, 2.5)
    results = [native.route(*args, level) for level in LEVELS]
    assert all(same(result, results[0]) for result in results)
    assert check.wrong(args, results[0]) is None


def test_threads_do_not_show(set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "sync", lambda: None)
    args = (*arguments(5, 37, 300), 4, 1, 1, True, 2.5)
    for level in LEVELS:
        results = []
        for count in (1, 2, 3, 8):
            set_threads(count)
            results += [native.route(*args, level) for _ in range(5)]
        assert all(same(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_addresses_and_strides_do_not_show(dtype: torch.dtype) -> None:
    for level in LEVELS:
        for cols in (5, 16, 77, 130):
            x, weight, bias = arguments(4, 9, cols, 0, dtype, dtype)
            wide = torch.full((4, cols + 5), NAN, dtype=dtype)
            wide[:, 3 : 3 + cols] = x
            shifted = torch.full((9 * cols + 1,), NAN, dtype=dtype)[1:].view(9, cols)
            shifted.copy_(weight)
            expected = native.route(x, weight, bias, 3, 1, 1, True, 1.0, level)
            assert same(native.route(wide[:, 3 : 3 + cols], shifted, bias, 3, 1, 1, True, 1.0, level), expected)


def test_the_pool_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(threads, "sync", lambda: calls.append(1))
    native.route(*arguments(1, 4, 8), 2, 1, 1, True, 1.0)
    assert calls == [1]


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    args = (*arguments(6, 40, 33), 7, 4, 2, True, 2.5)
    expected = native.route(*args, LEVELS[-1])

    def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, -77 if dtype == torch.int64 else NAN, dtype=dtype)

    monkeypatch.setattr(native.torch, "empty", poisoned)
    for level in LEVELS:
        assert same(native.route(*args, level), expected)


@given(data=st.data(), per_group=st.integers(1, 6), groups=st.sampled_from(GROUPS), values=st.integers(1, 4))
def test_ties_are_broken_as_in_the_reference(
    data: st.DataObject, per_group: int, groups: tuple[int, int], values: int
) -> None:
    """Few different scores, among them -0 and NaN: logits of zero, so that the bias alone decides."""
    experts = groups[0] * per_group
    palette = torch.tensor([0.0, -0.0, 0.5, -1.0, NAN, INF][: values + 2])
    index = data.draw(st.lists(st.integers(0, len(palette) - 1), min_size=experts, max_size=experts))
    top_k = data.draw(st.integers(1, per_group * groups[1]))
    bias, logits = palette[index], torch.zeros(2, experts)
    expected = reference.choose(logits.sigmoid() + bias, top_k, *groups)
    for level in LEVELS:
        assert torch.equal(from_logits(logits, bias, top_k, *groups, True, 1.0, level=level)[0], expected)


def test_the_lower_id_wins_in_the_reference() -> None:
    for experts in (5, 8, 16, 50, 128, 512):
        assert reference.choose(torch.zeros(2, experts), 4, 1, 1).tolist() == [[0, 1, 2, 3]] * 2
        result = route(torch.zeros(1, 3), torch.ones(experts, 3), torch.zeros(experts), 4, impl="reference")
        assert result.experts.tolist() == [[0, 1, 2, 3]]
    assert reference.choose(torch.ones(1, 6), 2, 3, 1).tolist() == [[0, 1]]
    assert reference.choose(torch.tensor([[0.0, 0, 3, 1, 2, 2]]), 2, 3, 1).tolist() == [[2, 3]]


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_nan_and_infinity_choose_legal_experts(groups: tuple[int, int]) -> None:
    x, weight, bias = arguments(8, 16, 40)
    x[0], x[1, 3], x[2, 5], x[3] = NAN, NAN, INF, 3e38
    x[4, :20], x[4, 20:] = INF, -INF
    for poison in (None, 2, 7):
        if poison is not None:
            weight[poison] = NAN
        args = (x, weight, bias, 5, *groups, True, 2.5)
        results = [native.route(*args, level) for level in LEVELS]
        for result in results:
            assert torch.equal(result[0], results[0][0])
            assert ((result[0] >= 0) & (result[0] < 16)).all()
            assert (result[0].diff(dim=-1) > 0).all()
            assert torch.equal(result[1].isnan(), results[0][1].isnan())
        calm = torch.tensor([0, 1, 2, 4, 5, 6, 7])  # whether 3 overflows depends on the order of additions
        assert check.wrong((x[calm], *args[1:]), tuple(t[calm] for t in results[0])) is None
        if poison is not None and groups == (1, 1):
            assert (results[0][0][5:] == poison).any(dim=-1).all(), "NaN counts as the greatest"


def test_scores_at_the_ends_of_sigmoid() -> None:
    logits = torch.tensor([[-1e30, -200.0, -90.0, -30.0, 0.0, 30.0, 90.0, 1e30, INF, -INF, 17.0, -17.0]])[:, :8]
    bias = torch.zeros(8)
    for level in LEVELS:
        experts, weights, _ = from_logits(logits, bias, 8, 1, 1, False, 1.0, level=level)
        assert experts.tolist() == [list(range(8))]
        torch.testing.assert_close(weights, logits.double().sigmoid().float(), rtol=1e-6, atol=1e-37)
    args = (logits, torch.eye(8), bias, 5, 1, 1, True, 1.0)
    assert check.wrong(args, native.route(*args)) is None
    forced = (logits, torch.eye(8), torch.tensor([9.0, 9, 9, 0, 0, 0, 0, 0]), 3, 1, 1, True, 1.0)
    assert check.wrong(forced, native.route(*forced)) is None  # all chosen scores vanish


def test_the_bias_chooses_and_does_not_weigh() -> None:
    logits, bias = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([0.0, 0.0, 0.0, 5.0])
    for level in LEVELS:
        experts, weights, _ = from_logits(logits, bias, 2, 1, 1, False, 2.0, level=level)
        assert experts.tolist() == [[0, 3]]
        torch.testing.assert_close(weights, 2 * torch.tensor([[2.0, -1.0]]).sigmoid())


def refused() -> dict[str, tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]]:
    x, weight, bias = arguments(2, 8, 10)
    plain = (2, 1, 1)
    return {
        "requires grad": ((x, nn.Parameter(weight), bias), plain),
        "meta": ((x.to("meta"), weight.to("meta"), bias.to("meta")), plain),
        "not torch.float64 with": ((x.double(), weight, bias), plain),
        "with torch.float16": ((x, weight.half(), bias), plain),
        "bias is torch.bfloat16": ((x, weight, bias.bfloat16()), plain),
        "does not fit x": ((x[:, :9], weight, bias), plain),
        r"bias \[7\] does not fit 8": ((x, weight, bias[:7]), plain),
        r"x \[0, 10\] is empty": ((x[:0], weight, bias), plain),
        "513 experts are more than 512": ((x, draw(513, 10), draw(513)), plain),
        "top_k=9 is not in 1 to 8": ((x, weight, bias), (9, 1, 1)),
        "top_k=0": ((x, weight, bias), (0, 1, 1)),
        "n_group=3 does not fit": ((x, weight, bias), (2, 3, 1)),
        "topk_group=3 of n_group=2": ((x, weight, bias), (2, 2, 3)),
        "weight or correction bias is not contiguous": ((x, draw(10, 8).t(), bias), plain),
        "correction bias is not contiguous": ((x, weight, draw(8, 2)[:, 0]), plain),
        "rows of x": ((draw(10, 2).t(), weight, bias), plain),
    }


@pytest.mark.parametrize("reason", refused())
def test_what_the_kernel_refuses(reason: str) -> None:
    tensors, rule = refused()[reason]
    with pytest.raises(KernelError, match=reason if LEVELS else "without its C"):
        route(*tensors, *rule, impl="native")


def test_the_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kernel = router._ROUTE.native
    monkeypatch.setattr(router._ROUTE, "native", lambda *args: calls.append(1) or kernel(*args))
    x, weight, bias = arguments(200, 8, 10)
    with torch.no_grad():
        route(x[:8], nn.Parameter(weight), bias, 2)
        assert len(calls) == (1 if LEVELS else 0)
        route(x, weight, bias, 2)
        assert len(calls) == (2 if LEVELS else 0)


@pytest.mark.parametrize(("rule", "message"), [
    ((9, 1, 1), "top_k=9 must be from 1 to 8"), ((0, 1, 1), "top_k=0"), ((1, 3, 1), "n_group must divide 8 experts"),
    ((1, 2, 3), "topk_group=3 of n_group=2"), ((1, 0, 1), "n_group=0"), ((1, 2, 0), "topk_group=0"),
])  # fmt: skip
def test_sizes_that_do_not_fit(rule: tuple[int, int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        route(*arguments(2, 8, 10), *rule)


def test_check_accepts_near_ties_and_refuses_wrong_choices(
    environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(NEMOTRON_H_CHECK="1")
    x, weight, bias = arguments(8, 16, 64, 5)
    route(x, weight, bias, 4, 4, 2)
    rule, zeros = (2, 1, 1, False, 1.0), torch.zeros(4)
    for gap, wrong in ((1e-6, None), (1e-3, "chose other experts than its logits say")):
        logits = torch.tensor([[0.0, 1.0, 1.0 + gap, 2.0]])  # as good as tied, or not: 1 instead of 2
        experts = torch.tensor([[1, 3]])
        result = (experts, logits.sigmoid().gather(1, experts), logits)
        assert check.wrong((logits, torch.eye(4), zeros, *rule), result) == wrong
        logits = torch.tensor([[1.0, 0.0, 1.0 + gap, 0.0]])  # the same for groups: 0 instead of 1
        result = (torch.tensor([[0, 1]]), logits.sigmoid()[:, :2], logits)
        assert check.wrong((logits, torch.eye(4), zeros, 2, 2, 1, False, 1.0), result) == wrong
    good = native.route(x, weight, bias, 4, 1, 1, True, 1.0)
    others = torch.arange(16).expand(8, 16).gather(1, 15 - good[0]).sort(-1).values
    for wrong, message in (
        ((others, good[1], good[2]), "chose other experts than its logits say"),
        ((good[0], good[1] * (1 + 1e-5), good[2]), r"is off by .* in its weights"),
        ((good[0], good[1], good[2] + 1e-4), r"is off by .* in its logits"),
        ((good[0].flip(-1), good[1], good[2]), "no ascending choice"),
        ((good[0] + 16, good[1], good[2]), "no ascending choice"),
        ((good[0] - 16, good[1], good[2]), "no ascending choice"),
    ):
        monkeypatch.setattr(router._ROUTE, "native", lambda *_, wrong=wrong: wrong)
        with pytest.raises(KernelError, match=f"router: .*{message}"):
            route(x, weight, bias, 4)


def test_the_budget_is_the_ops() -> None:
    """`off` says nothing of what is allowed."""
    assert dispatch.off(1.0, 1.0) is None
    assert dispatch.off(1.1, 1.0) == "is off by 1.1 where 1 is allowed"
