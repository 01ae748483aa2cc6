"""Routed experts by the kernel: against the reference in float64, and bit by bit against themselves.

Letters: M tokens · k experts per token · E experts · L, F widths.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_cases import PACKINGS, draw
from torch import Tensor

from nemotron_h.errors import InputError, KernelError
from nemotron_h.ops import _native, dispatch, threads
from nemotron_h.ops.moe import experts, native, packed_experts, reference
from nemotron_h.quantization import BF16, INT4, INT8, Packing, pack


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    yield
    threads._set = None


def routing(tokens: int, k: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    ids = torch.stack([torch.randperm(count, generator=generator)[:k].sort().values for _ in range(tokens)])
    return ids, torch.rand(tokens, k, generator=generator)


@given(
    seed=st.integers(0, 2**31), packing=st.sampled_from(PACKINGS), tokens=st.integers(1, 40), k=st.integers(1, 5),
    latent=st.sampled_from((16, 33, 80, 128)), width=st.sampled_from((24, 64, 113)), bias=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)), arithmetic=st.sampled_from(("int8", "float32")),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_packed_bits_and_budget(
    seed: int, packing: Packing, tokens: int, k: int, latent: int, width: int, bias: bool, dtype: torch.dtype,
    arithmetic: str,
) -> None:  # fmt: skip
    generator, count = torch.Generator().manual_seed(seed), 6
    up = torch.stack([draw(packing, width, latent, generator)[0].panels for _ in range(count)])
    down = torch.stack([draw(packing, latent, width, generator)[0].panels for _ in range(count)])
    biases = [torch.randn(count, n, generator=generator) if bias else None for n in (width, latent)]
    x, (ids, weights) = torch.randn(tokens, latent, generator=generator).to(dtype), routing(tokens, k, count, generator)

    def run(x: Tensor, rows: slice, level: str | None) -> Tensor:
        return native.packed_experts(
            x[rows], ids[rows], weights[rows], up, down, packing, width, "relu2", *biases, arithmetic, level=level
        )

    result = run(x, slice(None), "generic")
    args = (ids, weights, up, down, packing, width, "relu2", *biases, arithmetic)
    low, high = reference.packed_experts(x, *args), reference.packed_experts(x.double(), *args)
    error, allowed = dispatch.budget(result, low, high, 16.0)
    assert error <= allowed
    for level in _native.levels():
        for number in (1, 2, 3):
            _native.extension().set_threads(number)
            threads._set = torch.get_num_threads()
            assert torch.equal(run(x, slice(None), level), result)
    for token in range(tokens):
        assert torch.equal(run(x, slice(token, token + 1), None)[0], result[token])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_bits_and_budget(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for tokens, k, latent, width, bias in ((1, 2, 40, 24, False), (8, 3, 33, 50, True), (5, 1, 64, 16, False)):
        up, down = (torch.randn(7, *s, generator=generator).to(dtype) / 6 for s in ((width, latent), (latent, width)))
        biases = [torch.randn(7, n, generator=generator).to(dtype) if bias else None for n in (width, latent)]
        x, (ids, weights) = torch.randn(tokens, latent, generator=generator).to(dtype), routing(tokens, k, 7, generator)
        args = (ids, weights, up, down, "relu2", *biases)
        result = native.experts(x, *args, level="generic")
        wide = [None if b is None else b.double() for b in biases]
        high = reference.experts(x.double(), ids, weights, up.double(), down.double(), "relu2", *wide)
        error, allowed = dispatch.budget(result, reference.experts(x, *args), high, 16.0)
        assert error <= allowed
        for level in _native.levels():
            assert torch.equal(native.experts(x, *args, level=level), result)
        one = [native.experts(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], *args[2:]) for t in range(tokens)]
        assert torch.equal(torch.cat(one), result)
        assert torch.equal(experts(x, *args, impl="native"), result)
        with torch.no_grad():
            assert torch.equal(experts(x, *args), result)  # the default for few tokens


@given(
    seed=st.integers(0, 2**31), tokens=st.integers(1, 8), k=st.integers(1, 4), latent=st.sampled_from((16, 33, 80)),
    width=st.sampled_from((24, 64, 113)), bias=st.booleans(), dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_packed_bfloat16_has_the_bits_of_plain_rows(
    seed: int, tokens: int, k: int, latent: int, width: int, bias: bool, dtype: torch.dtype
) -> None:
    generator, count = torch.Generator().manual_seed(seed), 5
    up, down = (torch.randn(count, *s, generator=generator).bfloat16() / 6 for s in ((width, latent), (latent, width)))
    biases = [torch.randn(count, n, generator=generator) if bias else None for n in (width, latent)]
    x, (ids, weights) = torch.randn(tokens, latent, generator=generator).to(dtype), routing(tokens, k, count, generator)
    expected = native.experts(x, ids, weights, up.to(dtype), down.to(dtype), "relu2", *biases)
    panels = [torch.stack([pack(matrix, BF16) for matrix in stack]) for stack in (up, down)]
    for level in _native.levels():
        args = (x, ids, weights, *panels, BF16, width, "relu2", *biases)
        assert torch.equal(native.packed_experts(*args, "int8", level=level), expected)
    assert torch.equal(reference.packed_experts(*args, "int8"), reference.packed_experts(*args, "float32"))


@pytest.mark.parametrize("packing", [BF16, INT8, INT4], ids=lambda p: p.name)
def test_many_tokens_have_the_bits_of_one(packing: Packing) -> None:
    """Skewed routing: an expert that all visit, some that few do, some that nobody does; more tokens than one piece."""
    generator = torch.Generator().manual_seed(1)
    latent, width, count = 80, 113, 12
    up = torch.stack([draw(packing, width, latent, generator)[0].panels for _ in range(count)])
    down = torch.stack([draw(packing, latent, width, generator)[0].panels for _ in range(count)])
    biases = [torch.randn(count, n, generator=generator) for n in (width, latent)]
    for tokens, dtype in ((300, torch.bfloat16), (1030, torch.float32)):
        chosen = (torch.rand(tokens, generator=generator) ** 6 * 9).long() + 1
        ids = torch.stack([torch.zeros(tokens, dtype=torch.int64), chosen], 1)
        weights = torch.rand(tokens, 2, generator=generator)
        wide = torch.full((tokens, latent + 3), torch.nan, dtype=dtype)
        x = wide[:, 1 : latent + 1]
        x.copy_(torch.randn(tokens, latent, generator=generator))

        def run(at: slice, level: str | None = None) -> Tensor:
            args = (up, down, packing, width, "relu2", *biases, "int8")
            return native.packed_experts(x[at], ids[at], weights[at], *args, level=level)  # noqa: B023

        one = torch.cat([run(slice(t, t + 1)) for t in range(tokens)])
        for number in (1, 3):
            _native.extension().set_threads(number)
            threads._set = torch.get_num_threads()
            assert torch.equal(run(slice(None)), one)
        for level in _native.levels():
            assert torch.equal(run(slice(0, 300), level), one[:300])


def test_scratch_has_a_bound() -> None:
    size = _native.extension().experts_scratch
    assert size(512, 6, 128, 2688, 1856, 3, 0) == size(100_000, 6, 128, 2688, 1856, 3, 0) < 80 << 20


def test_experts_in_any_order_and_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(4, 12, 8, generator=generator), torch.randn(4, 8, 12, generator=generator)
    x, ids = torch.randn(2, 8, generator=generator), torch.tensor([[3, 0, 3], [2, 1, 0]])
    weights = torch.rand(2, 3, generator=generator)
    result = native.experts(x, ids, weights, up, down, "relu2", None, None)
    expected = torch.stack(
        [sum(weights[t, j] * (down[e] @ (up[e] @ x[t]).relu().square()) for j, e in enumerate(ids[t])) for t in (0, 1)]
    )
    assert torch.allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ids", [[[0, 4]], [[-1, 2]], [[2**40, 0]]])
def test_ids_outside_are_an_error(ids: list[list[int]]) -> None:
    up, down = torch.ones(4, 12, 8), torch.ones(4, 8, 12)
    with pytest.raises(InputError, match=r"expert ids must lie in \[0, 4\)"):
        experts(torch.ones(1, 8), torch.tensor(ids), torch.ones(1, 2), up, down, "relu2", impl="native")


def test_refusals() -> None:
    up, down = torch.ones(4, 12, 8), torch.ones(4, 8, 12)
    x, ids, weights = torch.ones(1, 8), torch.tensor([[0, 1]]), torch.ones(1, 2)
    for message, args in (
        ("activation is relu2, not silu", (x, ids, weights, up, down, "silu")),
        ("more than 8 tokens", (x.expand(9, -1), ids.expand(9, -1), weights.expand(9, -1), up, down, "relu2")),
        ("do not fit x", (x, ids[:0], weights[:0], up, down, "relu2")),
        (r"do not fit x \[1, 8\]", (x, ids, weights, up, up, "relu2")),
        ("one dtype", (x, ids, weights, up.bfloat16(), down.bfloat16(), "relu2")),
        ("not contiguous", (x, ids, weights, up.transpose(1, 2).contiguous().transpose(1, 2), down, "relu2")),
        (r"ids \[M, k\]", (x, ids[:, 0], weights[:, 0], up, down, "relu2")),
        (r"ids \[M, k\]", (x, ids[:, :0], weights[:, :0], up, down, "relu2")),
        ("floating weights", (x, ids, weights.long(), up, down, "relu2")),
        (r"bias \[4, 11\] must be \[4, 12\]", (x, ids, weights, up, down, "relu2", torch.ones(4, 11))),
        (r"bias \[3, 8\] must be \[4, 8\]", (x, ids, weights, up, down, "relu2", None, torch.ones(3, 8))),
    ):  # fmt: skip
        with pytest.raises(KernelError, match=message):
            experts(*args, impl="native")
    panels = torch.zeros(4, 1, 7, dtype=torch.uint8)
    with pytest.raises(KernelError, match=r"packed experts .* do not fit int4 12 x 8"):
        packed_experts(x, ids, weights, panels, panels, INT4, 12, "relu2", impl="native")
    good, back = pack_stack(up), pack_stack(down)
    for message, args in (
        ("4 experts' up and 3 experts' down", (good, back[:3])),
        ("uint8, not torch.int8", (good.view(torch.int8), back)),
        (r"bias \[12\] must be \[4, 12\]", (good, back, torch.ones(12))),
    ):
        bias = args[2] if len(args) > 2 else None
        with pytest.raises(KernelError, match=message):
            packed_experts(x, ids, weights, args[0], args[1], INT4, 12, "relu2", bias, impl="native")


def pack_stack(weights: Tensor) -> Tensor:
    return torch.stack([pack(weight, INT4) for weight in weights])
