#!/usr/bin/env python3
"""Measure every op beside the limit that holds for it, memory or arithmetic, and draw it for docs/kernels.md.

    pip install 'nemotron-h[plot]'
    python tools/roofs.py [--out docs/kernels] [--rounds 7]

Shapes are those of 3-Nano-30B-A3B. Weights, states and keys are rotated through sets of at least 600 MB, so that they
come from memory; limits and ops take turns, and the medians are drawn. Run it alone on the machine.

Letters: M rows · N outputs · K inputs · H heads · P head size · S state size · G groups · T tokens · E experts.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemotron_h.benchmark.limits import ReadBandwidth, allowed_cores, cpu_model, peaks
from nemotron_h.ops import _native
from nemotron_h.ops.attention import attention
from nemotron_h.ops.causal_conv1d import causal_conv1d
from nemotron_h.ops.linear import packed_linear
from nemotron_h.ops.moe import packed_experts
from nemotron_h.ops.pack import empty_panels, pack_into
from nemotron_h.ops.ssd import ssd
from nemotron_h.quantization import OWN

SET = 600 << 20  # bytes through which operands rotate
HIDDEN, PROJECTED, WIDTH, EXPERTS, PER_TOKEN = 2688, 10304, 1856, 32, 6
HEADS, SIZE, STATE, GROUPS = 64, 64, 128, 8
QUERY_HEADS, KEY_HEADS, HEAD_SIZE = 32, 2, 128
ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 14, 16, 20, 24, 32, 48, 64)


class Op(NamedTuple):
    """Something to time. work: bytes read and written, or operations; limit: "read", or the arithmetic's name."""

    name: str
    work: float
    limit: str
    run: Callable[[], Any]


class Figure(NamedTuple):
    op: str
    limit: str
    rate: float  # of work per second
    share: float  # of the limit


def rotating(make: Callable[[], Any], size: float) -> Iterator[Any]:
    """Copies of an operand of `size` bytes, enough of them to fill SET, one after the other without end."""
    return cycle([make() for _ in range(max(1, -(-SET // int(size))))])


def panels(quantization: str, rows: int, cols: int, count: int | None = None) -> Tensor:
    """Random weights in panels: a few drawn ones, repeated."""
    packing = OWN[quantization]
    shape = packing.shape(rows, cols)
    made = empty_panels(shape if count is None else (count, *shape))
    drawn = empty_panels((4, shape[1]))
    pack_into(drawn, torch.randn(64, cols) * 0.02, packing)
    flat = made.view(-1, shape[1])
    for first in range(0, len(flat), 4):
        flat[first : first + 4] = drawn[: len(flat) - first]
    return made


@cache
def linear_weights(quantization: str) -> Iterator[Tensor]:
    size = OWN[quantization].bits / 8 * PROJECTED * HIDDEN
    return rotating(lambda: panels(quantization, PROJECTED, HIDDEN), size)


@cache
def experts_weights() -> tuple[Iterator[Tensor], Iterator[Tensor]]:
    size = EXPERTS * WIDTH * HIDDEN / 2
    up = rotating(lambda: panels("int4", WIDTH, HIDDEN, EXPERTS), size)
    return up, rotating(lambda: panels("int4", HIDDEN, WIDTH, EXPERTS), size)


def linear_op(quantization: str, rows: int) -> Op:
    packing, weights = OWN[quantization], linear_weights(quantization)
    x_MK = torch.randn(rows, HIDDEN).bfloat16()
    name = f"linear {quantization}, {rows} row{'s' * (rows > 1)}"
    size = next(weights).numel()

    def run() -> Tensor:
        return packed_linear(x_MK, next(weights), packing, PROJECTED)

    if rows == 1:
        return Op(name, size, "read", run)
    return Op(name, 2.0 * rows * PROJECTED * HIDDEN, "int8" if quantization != "bf16" else "float32", run)


def experts_op(rows: int) -> Op:
    packing = OWN["int4"]
    up, down = experts_weights()
    x_ML, weights_Mk = torch.randn(rows, HIDDEN).bfloat16(), torch.rand(rows, PER_TOKEN)
    chosen = cycle([torch.rand(rows, EXPERTS).topk(PER_TOKEN).indices.sort().values for _ in range(64)])

    def run() -> Tensor:
        return packed_experts(x_ML, next(chosen), weights_Mk, next(up), next(down), packing, WIDTH, "relu2")

    name = f"experts int4, {rows} token{'s' * (rows > 1)}"
    if rows == 1:
        size = PER_TOKEN * (next(up)[0].numel() + next(down)[0].numel())
        return Op(name, size, "read", run)
    return Op(name, 4.0 * rows * PER_TOKEN * WIDTH * HIDDEN, "int8", run)


def scan_inputs(tokens: int) -> tuple[Tensor, ...]:
    x = torch.randn(1, tokens, HEADS, SIZE).bfloat16()
    B, C = (torch.randn(1, tokens, GROUPS, STATE).bfloat16() for _ in range(2))
    return x, torch.rand(1, tokens, HEADS) * 0.1, -torch.rand(HEADS), B, C, torch.ones(HEADS)


def step_op() -> Op:
    states = rotating(lambda: torch.zeros(1, HEADS, SIZE, STATE), HEADS * SIZE * STATE * 4)
    inputs = scan_inputs(1)

    def run() -> Any:
        state = next(states)
        return ssd(*inputs, 128, state, out_state=state)

    return Op("state space, 1 token", 2.0 * HEADS * SIZE * STATE * 4, "read", run)


def scan_op(tokens: int = 512, chunk: int = 64) -> Op:
    inputs, state = scan_inputs(tokens), torch.zeros(1, HEADS, SIZE, STATE)
    per_token = HEADS * (2 * STATE * SIZE + SIZE * (chunk + 1) / 2) + GROUPS * STATE * (chunk + 1) / 2
    return Op(f"scan, {tokens} tokens", 2.0 * tokens * per_token, "float32", lambda: ssd(*inputs, 128, state))


def decode_attention_op(keys: int = 16384) -> Op:
    def make() -> tuple[Tensor, Tensor]:
        return tuple(torch.randn(1, KEY_HEADS, keys, HEAD_SIZE).bfloat16() for _ in range(2))  # type: ignore[return-value]

    size = 2.0 * KEY_HEADS * keys * HEAD_SIZE * 2
    cached, q = rotating(make, size), torch.randn(1, 1, QUERY_HEADS, HEAD_SIZE).bfloat16()
    return Op(f"attention, 1 token, {keys:,} keys", size, "read", lambda: attention(q, *next(cached)))


def attention_op(tokens: int = 2048) -> Op:
    q = torch.randn(1, tokens, QUERY_HEADS, HEAD_SIZE).bfloat16()
    k, v = (torch.randn(1, KEY_HEADS, tokens, HEAD_SIZE).bfloat16() for _ in range(2))
    pairs = tokens * (tokens + 1) / 2
    return Op(f"attention, {tokens:,} tokens", 4.0 * pairs * QUERY_HEADS * HEAD_SIZE, "float32",
              lambda: attention(q, k, v, causal=True))  # fmt: skip


def conv_op(tokens: int = 512) -> Op:
    channels = HEADS * SIZE + 2 * GROUPS * STATE
    inputs = rotating(lambda: torch.randn(1, tokens, channels).bfloat16(), tokens * channels * 2)
    weight, bias = torch.randn(channels, 4).bfloat16(), torch.zeros(channels).bfloat16()
    work = 2.0 * tokens * channels * 2
    return Op(f"convolution, {tokens} tokens", work, "read", lambda: causal_conv1d(next(inputs), weight, bias, "silu"))


def seconds(run: Callable[[], Any], least: float = 0.05) -> float:
    """Of one call: the mean of as many as take `least` seconds."""
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < least or calls == 0:
        run()
        calls += 1
    return passed / calls


class Limits:
    """Bytes and operations per second that this machine reaches, measured between the ops."""

    def __init__(self) -> None:
        self.bandwidth = ReadBandwidth(allowed_cores())
        self.rounds: dict[str, list[float]] = {}

    def measure(self) -> dict[str, float]:
        found = {"read": self.bandwidth.measure(), **peaks(allowed_cores())}
        for name, rate in found.items():
            self.rounds.setdefault(name, []).append(rate)
        return found

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(rates) for name, rates in self.rounds.items()}


def beside(op: Op, limits: Limits) -> tuple[float, float]:
    """Work per second, and the limit before and after; again where the machine changed its mind in between."""
    for _ in range(5):
        before, rate, after = limits.measure()[op.limit], op.work / seconds(op.run), limits.measure()[op.limit]
        if abs(before - after) < 0.1 * before:
            break
    return rate, (before + after) / 2


def measure_ops(ops: list[Op], limits: Limits, rounds: int) -> list[Figure]:
    rates: dict[str, list[float]] = {op.name: [] for op in ops}
    shares: dict[str, list[float]] = {op.name: [] for op in ops}
    for _ in range(rounds):
        for op in ops:
            rate, limit = beside(op, limits)
            rates[op.name].append(rate)
            shares[op.name].append(rate / limit)
    return [
        Figure(op.name, op.limit, statistics.median(rates[op.name]), statistics.median(shares[op.name])) for op in ops
    ]


def least_seconds(weight_bytes: float, rows: int, products: float, limits: dict[str, float], hit: float = 1.0) -> float:
    """Of a call: memory brings the share of the weights that is `hit`, the multipliers do `products` for each row."""
    return max(hit * weight_bytes / limits["read"], 2.0 * rows * products / limits["int8"])


def bounds(limits: dict[str, float]) -> dict[str, list[float]]:
    """What `measure_rows` cannot undercut, for each of ROWS."""
    linear = OWN["int4"].panel_bytes(HIDDEN) * PROJECTED / 16
    expert = OWN["int4"].panel_bytes(HIDDEN) * WIDTH / 16 + OWN["int4"].panel_bytes(WIDTH) * HIDDEN / 16
    chosen = [1 - (1 - PER_TOKEN / EXPERTS) ** rows for rows in ROWS]
    return {
        "linear int4": [least_seconds(linear, M, PROJECTED * HIDDEN, limits) for M in ROWS],
        "experts int4": [
            least_seconds(EXPERTS * expert, M, 2 * PER_TOKEN * WIDTH * HIDDEN, limits, hit)
            for M, hit in zip(ROWS, chosen, strict=True)
        ],
    }


def measure_rows(make: Callable[[int], Op], rounds: int) -> list[float]:
    """Seconds for each of ROWS."""
    ops = [make(rows) for rows in ROWS]
    times: list[list[float]] = [[] for _ in ops]
    for _ in range(rounds):
        for op, found in zip(ops, times, strict=True):
            found.append(seconds(op.run))
    return [statistics.median(found) for found in times]


UNITS = {"read": (1e9, "GB/s"), "float32": (1e12, "TFLOP/s"), "bf16": (1e12, "TFLOP/s"), "int8": (1e12, "TOP/s")}


def draw_shares(figures: list[Figure], title: str, path: Path) -> None:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(8, 0.9 + 0.42 * len(figures)), layout="constrained")
    axes = canvas.add_subplot()
    names = [figure.op for figure in figures]
    bars = axes.barh(names, [100 * figure.share for figure in figures], color="tab:blue")
    labels = []
    for figure in figures:
        scale, unit = UNITS[figure.limit]
        labels.append(f"{100 * figure.share:.0f} %: {figure.rate / scale:.3g} {unit}")
    axes.bar_label(bars, labels=labels, padding=3, fontsize="small")
    axes.axvline(100, color="black", linewidth=1)
    axes.set_xlim(0, 135)
    axes.invert_yaxis()
    axes.set_xlabel("% of the measured limit")
    axes.set_title(title, fontsize="small")
    canvas.savefig(path, dpi=110)


def draw_rows(times: dict[str, list[float]], least: dict[str, list[float]], title: str, path: Path) -> None:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(8, 4), layout="constrained")
    axes = canvas.add_subplot()
    for name, found in times.items():
        (line,) = axes.plot(ROWS, [1e3 * one for one in found], marker="o", markersize=3, label=name)
        limit = [1e3 * one for one in least[name]]
        axes.plot(ROWS, limit, color=line.get_color(), linestyle="--", label=f"{name}: the machine's limit")
    axes.set_xlabel("rows in one call")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize="small")
    axes.legend(fontsize="small")
    canvas.savefig(path, dpi=110)


def write_csv(figures: list[Figure], limits: dict[str, float], times: dict[str, list[float]], path: Path) -> None:
    with path.open("w", newline="") as file:
        write = csv.writer(file)
        write.writerow(["what", "limit", "per second", "share of the limit"])
        write.writerows([["limit", name, f"{rate:.4g}", ""] for name, rate in limits.items()])
        write.writerows([[f.op, f.limit, f"{f.rate:.4g}", f"{f.share:.3f}"] for f in figures])
        for name, found in times.items():
            write.writerows(
                [[f"{name}, {M} rows: seconds", "", f"{s:.4g}", ""] for M, s in zip(ROWS, found, strict=True)]
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/kernels"))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    limits = Limits()
    decode = [
        linear_op("int4", 1),
        linear_op("int8", 1),
        linear_op("bf16", 1),
        experts_op(1),
        step_op(),
        decode_attention_op(),
    ]
    decoded = measure_ops(decode, limits, args.rounds)
    prompt = [linear_op("int4", 512), linear_op("int8", 512), linear_op("bf16", 512), experts_op(512), scan_op(),
              attention_op(), conv_op()]  # fmt: skip
    prefilled = measure_ops(prompt, limits, args.rounds)
    times = {f"{kind} int4": measure_rows(make, args.rounds) for kind, make in
             (("linear", lambda M: linear_op("int4", M)), ("experts", experts_op))}  # fmt: skip
    found = limits.medians()
    peaks = ", ".join(f"{found[name] / UNITS[name][0]:.3g} {UNITS[name][1]} {name}" for name in UNITS)
    title = f"{cpu_model()}, {allowed_cores()} threads, {_native.level()}: {peaks}"
    draw_shares(decoded, f"One token\n{title}", args.out / "decode.png")
    draw_shares(prefilled, f"Prompts\n{title}", args.out / "prefill.png")
    draw_rows(times, bounds(found), f"A few rows\n{title}", args.out / "rows.png")
    write_csv([*decoded, *prefilled], found, times, args.out / "roofs.csv")
    for figure in (*decoded, *prefilled):
        scale, unit = UNITS[figure.limit]
        print(f"{figure.op:36} {figure.rate / scale:8.3g} {unit:8} {100 * figure.share:5.0f} % of {figure.limit}")


if __name__ == "__main__":
    main()
