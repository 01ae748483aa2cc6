"""What is measured: kinds of work, and the figures that come out of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

TOLERANCE = 0.15
"""`model.generate`, `LLM.generate` and the plain step may differ by this share of the fastest."""

SIZES = {"decode": "context", "verify": "step", "prefill": "prompt", "batch": "sequences"}
"""Kind of work to what its size counts: tokens before the measured ones, tokens that one step takes (behind the first
of the contexts), tokens of the prompt, sequences that decode together."""


@dataclass(frozen=True)
class Machine:
    """Where it ran.

    load: Programs that were running or waiting during the last minute before (the load average).
    bandwidth: One measurement in bytes/s for each round, taken before the engines have their turns.
    peaks: By arithmetic (`int8`, `bf16`, `float32`), measurements in operations/s taken at the same times.
    """

    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    system: str
    version: str
    commit: str | None
    date: str
    load: float
    bandwidth: list[float] = field(default_factory=list)
    peaks: dict[str, list[float]] = field(default_factory=dict)

    @property
    def read_bytes_per_second(self) -> float:
        """The median."""
        return statistics.median(self.bandwidth)

    def peak(self, arithmetic: str) -> float | None:
        """The median in operations/s; None where it was not measured."""
        found = self.peaks.get(arithmetic)
        return statistics.median(found) if found else None


@dataclass(frozen=True)
class EngineFacts:
    """One engine, once it had its model.

    weights: "loaded" from files, or "random" ones made in memory. first_token_seconds: from nothing to the first token,
    imports left out. packed_bytes: of the weights in memory. peak_bytes: of the whole process at the end.
    skipped: why it did not run; the other fields are then None. failed: the error that ended it before its last figure.
    """

    name: str
    format: str
    version: str | None = None
    weights: str | None = None
    first_token_seconds: float | None = None
    packed_bytes: int | None = None
    peak_bytes: int | None = None
    skipped: str | None = None
    failed: str | None = None


@dataclass(frozen=True)
class Row:
    """One engine at one kind of work.

    measure, size: As in `SIZES`.
    rates: Tokens per second of every round.
    bytes_per_token, operations_per_token: What the work needs, by arithmetic.
    arithmetic: What the operations are done in: `int8`, `bf16` or `float32`.
    finite: No round ended with NaN or infinity among its logits.
    """

    measure: str
    engine: str
    format: str
    size: int
    rates: list[float]
    bytes_per_token: float
    operations_per_token: float
    arithmetic: str
    finite: bool = True

    @property
    def tokens_per_second(self) -> float:
        """The median."""
        return statistics.median(self.rates)

    @property
    def bytes_per_second(self) -> float:
        return self.bytes_per_token * self.tokens_per_second

    @property
    def operations_per_second(self) -> float:
        return self.operations_per_token * self.tokens_per_second

    def share_of_bandwidth(self, machine: Machine) -> float:
        return self.bytes_per_second / machine.read_bytes_per_second

    def share_of_peak(self, machine: Machine) -> float | None:
        """Of the measured peak of its arithmetic."""
        peak = machine.peak(self.arithmetic)
        return None if peak is None else self.operations_per_second / peak

    def limit(self, machine: Machine) -> float:
        """Tokens per second that memory and arithmetic would allow, whichever is less."""
        by_memory, peak = machine.read_bytes_per_second / self.bytes_per_token, machine.peak(self.arithmetic)
        return by_memory if peak is None else min(by_memory, peak / self.operations_per_token)


@dataclass(frozen=True)
class LeftOut:
    """Work that an engine was spared, for it would take `seconds` by what a shorter prompt took."""

    measure: str
    engine: str
    size: int
    seconds: float


@dataclass(frozen=True)
class Paths:
    """Tokens per second of the same work by the plain step, `model.generate` and `LLM.generate`; medians."""

    tokens_per_second: Mapping[str, float]

    @property
    def agree(self) -> bool:
        rates = self.tokens_per_second.values()
        return min(rates) >= (1 - TOLERANCE) * max(rates)


@dataclass(frozen=True)
class Bits:
    """Numbers of our model's fast ways, held against those of one row, one piece, one sequence at a time.

    compared, differing: How many, and how many of other bits, by the way.
    rounding: The same of a prompt against its tokens one by one: (compared, differing). The scan adds in chunks, so it
        may round otherwise than steps do.
    promised: Whether the bits must be equal: for packed weights, on kernels.
    """

    compared: Mapping[str, int]
    differing: Mapping[str, int]
    rounding: Sequence[int]
    promised: bool

    @property
    def equal(self) -> bool:
        return not any(self.differing.values())
