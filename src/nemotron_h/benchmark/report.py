"""What a run found: as a dict for JSON, rows for CSV, lines for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemotron_h.benchmark.measures import SIZES, TOLERANCE, Bits, EngineFacts, LeftOut, Machine, Paths, Row
from nemotron_h.errors import InputError

_BUSY = 0.5
_SAID = {
    "decode": ("decode", "behind {} tokens"),
    "verify": ("steps of several tokens", "of {}"),
    "prefill": ("prefill", "of {} tokens"),
    "batch": ("batches", "of {} sequences"),
}


@dataclass(frozen=True)
class Report:
    """Everything that a run found."""

    model: str
    pattern: str
    parameters: int
    machine: Machine
    engines: list[EngineFacts]
    rows: list[Row]
    left_out: list[LeftOut] = field(default_factory=list)
    paths: Paths | None = None
    bits: Bits | None = None

    def of(self, measure: str) -> list[Row]:
        """The rows of one kind of work."""
        return [row for row in self.rows if row.measure == measure]

    @property
    def good(self) -> bool:
        """Whether the ways that were compared agree, and every engine came to its end."""
        bits = self.bits is None or self.bits.equal or not self.bits.promised
        ended = all(engine.failed is None for engine in self.engines)
        return ended and bits and (self.paths is None or self.paths.agree)

    @property
    def ratios(self) -> list[dict[str, Any]]:
        """Our speed as a multiple of each peer's."""
        own = self.engines[0].name
        ours = {(row.measure, row.size): row.tokens_per_second for row in self.rows if row.engine == own}
        return [
            {
                "measure": row.measure,
                "peer": row.engine,
                SIZES[row.measure]: row.size,
                "ratio": ours[row.measure, row.size] / row.tokens_per_second,
            }
            for row in self.rows
            if row.engine != own and (row.measure, row.size) in ours
        ]

    def facts(self) -> dict[str, Any]:
        """For JSON; sizes in bytes, times in seconds."""
        machine = asdict(self.machine) | {
            "read_bytes_per_second": self.machine.read_bytes_per_second,
            "operations_per_second": {name: self.machine.peak(name) for name in self.machine.peaks},
        }
        return {
            "model": self.model,
            "pattern": self.pattern,
            "parameters": self.parameters,
            "machine": machine,
            "engines": [asdict(engine) for engine in self.engines],
            **{measure: [self._facts(row) for row in self.of(measure)] for measure in SIZES},
            "left_out": [asdict(left) for left in self.left_out],
            "ratios": self.ratios,
            "paths": None if self.paths is None else asdict(self.paths) | {"agree": self.paths.agree},
            "bits": None if self.bits is None else asdict(self.bits) | {"equal": self.bits.equal},
        }

    def _facts(self, row: Row) -> dict[str, Any]:
        found = asdict(row) | {
            "tokens_per_second": row.tokens_per_second,
            "bytes_per_second": row.bytes_per_second,
            "share_of_bandwidth": row.share_of_bandwidth(self.machine),
            "operations_per_second": row.operations_per_second,
            "share_of_peak": row.share_of_peak(self.machine),
            "limit": row.limit(self.machine),
            SIZES[row.measure]: row.size,
        }
        return {name: value for name, value in found.items() if name not in ("measure", "size")}


COLUMNS = (
    "date", "commit", "version", "cpu", "threads", "read_gb_per_s", "model", "engine", "engine_version", "format",
    "measure", "size", "tokens_per_second", "slowest", "fastest", "bytes_per_token", "gb_per_s", "share_of_bandwidth",
    "operations_per_token", "tflop_per_s", "arithmetic", "peak_tflop_per_s", "share_of_peak", "bits",
    "weights", "first_token_seconds", "packed_bytes", "peak_bytes",
)  # fmt: skip


def csv_rows(report: Report) -> list[tuple[Any, ...]]:
    """One row for each figure, in the order of `COLUMNS`."""
    engines, machine = {engine.name: engine for engine in report.engines}, report.machine
    bits = None if report.bits is None else "equal" if report.bits.equal else "differ"
    rows = []
    for row in report.rows:
        engine, peak = engines[row.engine], machine.peak(row.arithmetic)
        share = row.share_of_peak(machine)
        rows.append((
            machine.date, machine.commit, machine.version, machine.cpu, machine.threads,
            round(machine.read_bytes_per_second / 1e9, 2), report.model, row.engine, engine.version, row.format,
            row.measure, row.size, round(row.tokens_per_second, 3), round(min(row.rates), 3),
            round(max(row.rates), 3), round(row.bytes_per_token), round(row.bytes_per_second / 1e9, 3),
            round(row.share_of_bandwidth(machine), 4), round(row.operations_per_token),
            round(row.operations_per_second / 1e12, 4), row.arithmetic,
            None if peak is None else round(peak / 1e12, 3), None if share is None else round(share, 4),
            bits if row.engine == report.engines[0].name else None,
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
_HEADS = {
    "decode": "decode behind", "verify": "tokens in one step", "prefill": "prompt of", "batch": "sequences at once"
}  # fmt: skip


def tables(report: Report) -> list[Table]:
    """For people: one for each kind of work that was measured, then the engines."""
    found: list[Table] = [_work(report, measure) for measure in SIZES if report.of(measure)]
    engines = [["engine", "version", "weights", "first token", "packed", "peak memory"]]
    engines += [
        [engine.name, engine.version or "", engine.weights or "", f"{engine.first_token_seconds:.3g} s",
         _gib(engine.packed_bytes), _gib(engine.peak_bytes)]
        for engine in report.engines if engine.skipped is None and engine.failed is None
    ]  # fmt: skip
    return [*found, engines]


def _work(report: Report, measure: str) -> Table:
    machine = report.machine
    lines = [["engine", "format", _HEADS[measure], "tok/s", "rounds", "ms/token", "MB/token", "GB/s", "of bandwidth",
              "TFLOP/s", "of peak", "limit tok/s"]]  # fmt: skip
    for row in report.of(measure):
        rate, share = row.tokens_per_second, row.share_of_peak(machine)
        lines.append(
            [row.engine, row.format, f"{row.size:,}", f"{rate:.4g}",
             f"{min(row.rates):.4g} to {max(row.rates):.4g}", f"{1000 / rate:.4g}", _megabytes(row.bytes_per_token),
             f"{row.bytes_per_second / 1e9:.3g}", f"{row.share_of_bandwidth(machine):.0%}",
             f"{row.operations_per_second / 1e12:.3g}",
             "" if share is None else f"{share:.0%} of {row.arithmetic}", f"{row.limit(machine):.4g}"]
        )  # fmt: skip
    return lines


def notes(report: Report) -> list[str]:
    """What the tables do not say, one line each."""
    lines = [f"load average {report.machine.load:.1f} at the start: figures are only good on an idle machine"]
    lines = lines if report.machine.load > _BUSY else []
    lines += [f"{engine.name} did not run: {engine.skipped}" for engine in report.engines if engine.skipped]
    lines += [f"{engine.name} failed: {engine.failed}; the figures before that stay" for engine in report.engines
              if engine.failed]  # fmt: skip
    for left in report.left_out:
        work, where = _SAID[left.measure]
        what = f"{work} {where.format(f'{left.size:,}')}"
        lines.append(f"{left.engine}: {what} left out: would take {left.seconds:,.0f} s")
    broken = sorted({row.engine for row in report.rows if not row.finite})
    lines += [f"{name}: its logits were NaN or infinite, so its speed means little" for name in broken]
    lines += _against(report)
    lines += _steps(report)
    if report.paths is not None:
        rates = ", ".join(f"{name} {rate:.4g}" for name, rate in report.paths.tokens_per_second.items())
        verdict = "within" if report.paths.agree else "NOT within"
        lines.append(f"tok/s of the same work: {rates}: {verdict} {TOLERANCE:.0%} of each other")
    if report.bits is not None:
        lines += _bits(report.bits)
    return lines


def _against(report: Report) -> list[str]:
    lines = []
    for measure, (work, where) in _SAID.items():
        ratios = [ratio for ratio in report.ratios if ratio["measure"] == measure]
        for peer in dict.fromkeys(ratio["peer"] for ratio in ratios):
            found = [
                f"{r['ratio']:.2f}x " + where.format(f"{r[SIZES[measure]]:,}") for r in ratios if r["peer"] == peer
            ]
            lines.append(f"{work} against {peer}: " + ", ".join(found))
    return lines


def _steps(report: Report) -> list[str]:
    """How much longer a step of several tokens is than one of a single token behind the same context."""
    lines = []
    for row in report.of("verify"):
        one = next((other for other in report.of("decode") if other.engine == row.engine), None)
        if one is not None:
            times = row.size * one.tokens_per_second / row.tokens_per_second
            where = f"behind {one.size:,} tokens"
            lines.append(f"{row.engine}: a step of {row.size} tokens takes {times:.2f}x the time of one, {where}")
    return lines


def _bits(bits: Bits) -> list[str]:
    if bits.equal:
        found = f"bits: equal ({', '.join(f'{count:,} of {way}' for way, count in bits.compared.items())})"
    else:
        found = ", ".join(f"{bits.differing[way]:,} of {count:,} of {way}" for way, count in bits.compared.items())
        found = f"bits: DIFFER ({found})" + ("" if bits.promised else "; only packed weights on kernels promise them")
    compared, differing = bits.rounding
    return [
        found,
        f"rounding: {differing:,} of {compared:,} logits of a prompt differ from those of its tokens one by one",
    ]


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f}" if count >= 1e8 else f"{count / 1e6:.3g}"


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.3g} GiB"
