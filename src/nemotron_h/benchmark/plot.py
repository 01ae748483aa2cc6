"""The results as a picture: tokens per second of each kind of work, by engine, beside the machine's limit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nemotron_h.benchmark.measures import Row
from nemotron_h.benchmark.report import Report
from nemotron_h.errors import InputError, MissingDependencyError

PANELS = {
    "decode": ("decode, one sequence", "tokens in the context"),
    "prefill": ("prefill", "tokens of the prompt"),
    "batch": ("decoding together", "sequences"),
}


def check_installed() -> None:
    """Raises MissingDependencyError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("--png needs matplotlib: pip install 'nemotron-h[plot]'") from error


def check_path(path: Path) -> None:
    """Raises InputError where no file can be written."""
    if not path.parent.is_dir():
        raise InputError(f"--png {path}: there is no directory {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"--png {path}: cannot be written")


def write_png(report: Report, path: Path) -> None:
    """Draw the report, a panel for each of `PANELS` that was measured.

    The slowest and the fastest round are whiskers; a dash is what the machine's bandwidth or the peak of its arithmetic
    would allow, whichever is less.
    """
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    shown = {measure: report.of(measure) for measure in PANELS if report.of(measure)}
    figure = Figure(figsize=(1 + 6 * len(shown), 4.8), layout="constrained")
    machine = report.machine
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (measure, rows) in zip(panels, shown.items(), strict=True):
        _draw(axes, report, rows)
        title, size = PANELS[measure]
        axes.set_title(title)
        axes.set_xlabel(size)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    bandwidth = machine.read_bytes_per_second / 1e9
    peaks = "".join(f", {name} {(machine.peak(name) or 0) / 1e12:.3g}" for name in machine.peaks)
    figure.suptitle(
        f"{report.model}\n{machine.cpu}, {machine.threads} threads, {bandwidth:.3g} GB/s{peaks}"
        f"{' TFLOP/s' if peaks else ''}, {machine.date}",
        fontsize="medium",
    )
    figure.savefig(path, format="png", dpi=150)


def _draw(axes: Any, report: Report, rows: list[Row]) -> None:
    sizes = sorted({row.size for row in rows})
    names = [engine.name for engine in report.engines if engine.name in {row.engine for row in rows}]
    width = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        own = [row for row in rows if row.engine == name]
        at = [sizes.index(row.size) - 0.4 + (place + 0.5) * width for row in own]
        rates = [row.tokens_per_second for row in own]
        whiskers = [
            [row.tokens_per_second - min(row.rates) for row in own],
            [max(row.rates) - row.tokens_per_second for row in own],
        ]
        bars = axes.bar(at, rates, 0.94 * width, yerr=whiskers, capsize=2, label=f"{name} ({own[0].format})")
        labels = [f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}" for rate in rates]
        axes.bar_label(bars, labels=labels, fontsize="small", padding=2)
        limits = [row.limit(report.machine) for row in own]
        axes.scatter(at, limits, marker="_", s=200, color="black", label="machine's limit" if place == 0 else None)
    axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
