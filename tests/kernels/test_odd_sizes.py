"""Sizes that fit no block cost at most three times what the tuned ones do, per element; rows no more than fewer rows.

A kernel that falls back to single elements at its edges passes every other test, and is ten times slower on a model of
its own dimensions. One thread, its own clock, sizes in turns, the least of many rounds: other load cancels.

Letters: M rows · N output width · K input width · B batch · T tokens · H heads · P head size · G groups · S keys.
"""

import random
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from mamba_cases import LEVELS, kernel_threads
from torch import Tensor

from nemotron_h.ops import attention
from nemotron_h.ops.attention import native as attention_kernel
from nemotron_h.ops.linear import native as linear_kernel
from nemotron_h.ops.ssd import native as ssd_kernel
from nemotron_h.quantization import BF16, INT4, INT8, Packing, pack

MOST = 3.0
Run = Callable[[], Any]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with kernel_threads(1):
        yield


def primes_near(size: int, count: int) -> list[int]:
    """Drawn from those within a tenth."""
    near = [n for n in range(size * 9 // 10, size * 11 // 10) if all(n % d for d in range(2, int(n**0.5) + 1))]
    return random.Random(size).sample(near, count)


def least_seconds(runs: list[Run]) -> list[float]:
    """Of three calls of each run, by this thread's clock; all runs in turns, 3 to 9 times, as half a second allows."""
    least = [float("inf")] * len(runs)
    begin, rounds = time.perf_counter(), 0
    while rounds < 3 or (rounds < 9 and time.perf_counter() - begin < 0.5):
        rounds += 1
        for index, run in enumerate(runs):
            start = time.thread_time()  # without the time that other processes have the core
            for _ in range(3):
                run()
            least[index] = min(least[index], time.thread_time() - start)
    return least


def assert_near_the_first(runs: dict[tuple[int, ...], Run], elements: Callable[..., int]) -> None:
    """Seconds per element of all sizes against those of the first, in the best of three measurements."""
    found: dict[tuple[int, ...], float] = {}
    for _ in range(3):
        seconds = least_seconds(list(runs.values()))
        per_element = [s / elements(*sizes) for s, sizes in zip(seconds, runs, strict=True)]
        for sizes, cost in zip(runs, per_element, strict=True):
            found[sizes] = min(found.get(sizes, float("inf")), cost / per_element[0])
        if max(found.values()) <= MOST:
            return
    raise AssertionError(f"times as long as {next(iter(runs))} per element: {found}")


# 1.3 to 5 million weights each, the tuned shape first. No side below a panel's 16 rows or a chunk's 64 columns: those
# are padded.
SHAPES = [
    (1856, 2688), (2688, 1856), (1120, 4480), (3136, 1568), (16384, 80), (96, 16384),
    *zip(primes_near(1856, 2), primes_near(2688, 2), strict=True), (16381, 83), (97, 16381),
]  # fmt: skip


@cache
def weights(kind: Packing | torch.dtype) -> dict[tuple[int, ...], Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {shape: torch.randn(shape, generator=generator) for shape in SHAPES}
    return {shape: pack(w, kind) if isinstance(kind, Packing) else w.to(kind) for shape, w in drawn.items()}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", [INT4, INT8, torch.bfloat16], ids=["int4", "int8", "bfloat16"])
def test_linear(kind: Packing | torch.dtype, rows: int, level: str) -> None:
    def run(shape: tuple[int, ...], weight: Tensor) -> Run:
        x = torch.ones(rows, shape[1], dtype=torch.bfloat16)
        if isinstance(kind, Packing):
            return lambda: linear_kernel.packed_linear(x, weight, kind, shape[0], None, "int8", level=level)
        return lambda: linear_kernel.linear(x, weight, None, level=level)

    runs = {shape: run(shape, weight) for shape, weight in weights(kind).items()}
    assert_near_the_first(runs, lambda n, k: n * k)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("packing", [INT4, INT8, BF16], ids=lambda p: p.name)
def test_rows_cost_no_more_together(packing: Packing, level: str) -> None:
    """On both sides of every change of kernel: a row among more may cost 1.6 times what it does among fewer at most."""
    weight = pack(torch.randn(480, 1344, generator=torch.Generator().manual_seed(0)), packing)
    arithmetic = "float32" if packing is BF16 else "int8"
    counts = (1, 2, 4, 8, 9, 16, 17, 24)

    def run(rows: int) -> Run:
        x = torch.ones(rows, 1344)
        return lambda: linear_kernel.packed_linear(x, weight, packing, 480, None, arithmetic, level=level)

    runs = [run(count) for count in counts]
    seconds = [float("inf")] * len(runs)
    for _ in range(3):
        seconds = [min(pair) for pair in zip(seconds, least_seconds(runs), strict=True)]
        per_row = [s / m for s, m in zip(seconds, counts, strict=True)]
        if all(cost <= 1.6 * min(per_row[: i + 1]) for i, cost in enumerate(per_row)):
            return
    raise AssertionError(f"seconds for {counts} rows: {seconds}")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("tokens", [1, 4])
def test_ssd_step(tokens: int, level: str) -> None:
    def run(B: int, H: int, P: int, G: int, N: int) -> Run:
        x, b, c = (torch.ones(B, tokens, *last, dtype=torch.bfloat16) for last in [(H, P), (G, N), (G, N)])
        dt, a, d, state = torch.ones(B, tokens, H), -torch.ones(H), torch.ones(H), torch.ones(B, H, P, N)
        assert ssd_kernel.refusal(x, dt, a, b, c, d, state, state) is None
        return lambda: ssd_kernel.step(x, dt, a, b, c, d, state, state, level)

    sizes = [(8, 64, 64, 8, 128), (8, 80, 80, 1, 96), (8, 61, 67, 61, 127), (8, 59, 61, 1, 113), (8, 67, 53, 67, 131)]
    assert_near_the_first({each: run(*each) for each in sizes}, lambda B, H, P, G, N: B * H * P * N)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8], ids=str)
def test_attention(kind: torch.dtype, level: str) -> None:
    """A query's share is 16 to 17 heads for each head of keys and values in all of them."""

    def run(heads: int, repeats: int, keys: int, size: int) -> Run:
        q = torch.ones(1, 1, heads * repeats, size, dtype=torch.bfloat16)
        k, v = (torch.ones(1, heads, keys, size) for _ in range(2))
        if kind == torch.int8:
            rows = (*attention.quantize(k), *attention.quantize(v))
            assert attention_kernel.refusal_int8(q, *rows, None, False, 0.0) is None
            return lambda: attention_kernel.attention_int8(q, *rows, None, False, 0.0, level=level)
        k, v = k.to(kind), v.to(kind)
        assert attention_kernel.refusal(q, k, v, None, False, 0.0) is None
        return lambda: attention_kernel.attention(q, k, v, None, False, 0.0, level=level)

    sizes = [(2, 16, 4096, 128), (2, 16, 4095, 127), (2, 17, 4093, 113), (3, 13, 4099, 80), (5, 16, 1901, 96)]
    assert_near_the_first({each: run(*each) for each in sizes}, lambda h, r, s, d: h * r * s * d)
