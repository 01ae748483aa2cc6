"""What a run found: as a dict for JSON, rows for CSV, lines for people."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemotron_h.errors import InputError

TOLERANCE = 0.15
"""`model.generate`, `LLM.generate` and the plain step may differ by this share of the fastest."""
_BUSY = 0.5


@dataclass(frozen=True)
class Machine:
    """Where it ran.

    load: Programs that were running or waiting during the last minute before (the load average).
    bandwidth: One measurement in bytes/s for each round, taken before the engines have their turns.
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

    @property
    def read_bytes_per_second(self) -> float:
        """The median."""
        return statistics.median(self.bandwidth)


@dataclass(frozen=True)
class EngineFacts:
    """One engine, once it had its model.

    weights: "loaded" from files, or "random" ones made in memory. first_token_seconds: from nothing to the first token,
    imports left out. packed_bytes: of the weights in memory. peak_bytes: of the whole process at the end.
    skipped: why it did not run; the other fields are then None.
    """

    name: str
    format: str
    version: str | None = None
    weights: str | None = None
    first_token_seconds: float | None = None
    packed_bytes: int | None = None
    peak_bytes: int | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Decode:
    """Decode steps of one engine behind `context` tokens.

    rates: tokens per second of every round. bytes_per_token: what a step has to read, by arithmetic.
    finite: no round ended with NaN or infinity among its logits.
    """

    engine: str
    format: str
    context: int
    rates: list[float]
    bytes_per_token: int
    finite: bool

    @property
    def tokens_per_second(self) -> float:
        """The median."""
        return statistics.median(self.rates)

    @property
    def bytes_per_second(self) -> float:
        return self.bytes_per_token * self.tokens_per_second


@dataclass(frozen=True)
class Paths:
    """Tokens per second of the same work by the plain step, `model.generate` and `LLM.generate`; medians."""

    tokens_per_second: Mapping[str, float]

    @property
    def agree(self) -> bool:
        rates = self.tokens_per_second.values()
        return min(rates) >= (1 - TOLERANCE) * max(rates)


@dataclass(frozen=True)
class Report:
    """Everything that a run found."""

    model: str
    pattern: str
    parameters: int
    machine: Machine
    engines: list[EngineFacts]
    decode: list[Decode]
    paths: Paths | None = None

    @property
    def ratios(self) -> list[dict[str, Any]]:
        """Our speed as a multiple of each peer's, by context."""
        ours = {row.context: row.tokens_per_second for row in self.decode if row.engine == self.engines[0].name}
        return [
            {"peer": row.engine, "context": row.context, "ratio": ours[row.context] / row.tokens_per_second}
            for row in self.decode
            if row.engine != self.engines[0].name and row.context in ours
        ]

    def share(self, row: Decode) -> float:
        """Of the measured read bandwidth."""
        return row.bytes_per_second / self.machine.read_bytes_per_second

    def facts(self) -> dict[str, Any]:
        """For JSON; sizes in bytes, times in seconds."""
        machine = asdict(self.machine) | {"read_bytes_per_second": self.machine.read_bytes_per_second}
        rows = [
            asdict(row)
            | {
                "tokens_per_second": row.tokens_per_second,
                "bytes_per_second": row.bytes_per_second,
                "share_of_bandwidth": self.share(row),
            }
            for row in self.decode
        ]
        paths = None if self.paths is None else asdict(self.paths) | {"agree": self.paths.agree}
        return {
            "model": self.model,
            "pattern": self.pattern,
            "parameters": self.parameters,
            "machine": machine,
            "engines": [asdict(engine) for engine in self.engines],
            "decode": rows,
            "ratios": self.ratios,
            "paths": paths,
        }


COLUMNS = (
    "date", "commit", "version", "cpu", "threads", "read_gb_per_s", "model", "engine", "engine_version", "format",
    "context", "tokens_per_second", "slowest", "fastest", "bytes_per_token", "gb_per_s", "share_of_bandwidth",
    "weights", "first_token_seconds", "packed_bytes", "peak_bytes",
)  # fmt: skip


def csv_rows(report: Report) -> list[tuple[Any, ...]]:
    """One row for each engine and context, in the order of `COLUMNS`."""
    engines, machine = {engine.name: engine for engine in report.engines}, report.machine
    rows = []
    for row in report.decode:
        engine = engines[row.engine]
        rows.append((
            machine.date, machine.commit, machine.version, machine.cpu, machine.threads,
            round(machine.read_bytes_per_second / 1e9, 2), report.model, row.engine, engine.version, row.format,
            row.context, round(row.tokens_per_second, 3), round(min(row.rates), 3), round(max(row.rates), 3),
            row.bytes_per_token, round(row.bytes_per_second / 1e9, 3), round(report.share(row), 4),
            engine.weights, engine.first_token_seconds, engine.packed_bytes, engine.peak_bytes,
        ))  # fmt: skip
    return rows


def check_csv(path: Path) -> None:
    """Raises InputError where `append_csv` could not add to the file."""
    try:
        first = path.open(encoding="utf-8", newline="").readline().rstrip("\r\n") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--csv {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from error
    if first and first != ",".join(COLUMNS):
        raise InputError(f"--csv {path}: its columns are not those of this version; give another file")
    if not path.parent.is_dir():
        raise InputError(f"--csv {path}: there is no directory {path.parent}")


def append_csv(report: Report, path: Path) -> None:
    """Add the rows to a file, which gets its header when it is empty."""
    check_csv(path)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not path.exists() or path.stat().st_size == 0:
        writer.writerow(COLUMNS)
    writer.writerows(csv_rows(report))
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())


Table = Sequence[Sequence[str]]


def tables(report: Report) -> tuple[Table, Table]:
    """(decode, engines) for people."""
    decode = [["engine", "format", "context", "tok/s", "rounds", "ms/token", "MB read", "GB/s", "of bandwidth"]]
    for row in report.decode:
        rate = row.tokens_per_second
        decode.append(
            [row.engine, row.format, f"{row.context:,}", f"{rate:.4g}",
             f"{min(row.rates):.4g} to {max(row.rates):.4g}", f"{1000 / rate:.4g}", f"{row.bytes_per_token / 1e6:,.0f}",
             f"{row.bytes_per_second / 1e9:.3g}", f"{report.share(row):.0%}"]
        )  # fmt: skip
    engines = [["engine", "version", "weights", "first token", "packed", "peak memory"]]
    engines += [
        [engine.name, engine.version or "", engine.weights or "", f"{engine.first_token_seconds:.3g} s",
         _gib(engine.packed_bytes), _gib(engine.peak_bytes)]
        for engine in report.engines if engine.skipped is None
    ]  # fmt: skip
    return decode, engines


def notes(report: Report) -> list[str]:
    """What the tables do not say, one line each."""
    lines = [f"load average {report.machine.load:.1f} at the start: figures are only good on an idle machine"]
    lines = lines if report.machine.load > _BUSY else []
    lines += [f"{engine.name} did not run: {engine.skipped}" for engine in report.engines if engine.skipped]
    broken = sorted({row.engine for row in report.decode if not row.finite})
    lines += [f"{name}: its logits were NaN or infinite, so its speed means little" for name in broken]
    for peer in dict.fromkeys(ratio["peer"] for ratio in report.ratios):
        found = [r for r in report.ratios if r["peer"] == peer]
        lines.append(
            f"decode against {peer}: " + ", ".join(f"{r['ratio']:.2f}x behind {r['context']:,} tokens" for r in found)
        )
    if report.paths is not None:
        rates = ", ".join(f"{name} {rate:.4g}" for name, rate in report.paths.tokens_per_second.items())
        verdict = "within" if report.paths.agree else "NOT within"
        lines.append(f"tok/s of the same work: {rates}: {verdict} {TOLERANCE:.0%} of each other")
    return lines


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.3g} GiB"
