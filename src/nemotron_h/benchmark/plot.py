"""The results as a picture: tokens per second by context, a bar for each engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nemotron_h.benchmark.report import Report
from nemotron_h.errors import InputError, MissingDependencyError


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
    """Draw the report. The slowest and the fastest round are whiskers; a dash is what the bandwidth would allow."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, report)
    machine = report.machine
    figure.suptitle(f"{report.model}: decode, one sequence")
    axes.set_title(
        f"{machine.cpu}, {machine.threads} threads, {machine.read_bytes_per_second / 1e9:.3g} GB/s, {machine.date}",
        fontsize="small",
    )
    figure.savefig(path, format="png", dpi=150)


def _draw(axes: Any, report: Report) -> None:
    contexts = sorted({row.context for row in report.decode})
    names = list(dict.fromkeys(row.engine for row in report.decode))
    width = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        rows = [row for row in report.decode if row.engine == name]
        at = [contexts.index(row.context) - 0.4 + (place + 0.5) * width for row in rows]
        rates = [row.tokens_per_second for row in rows]
        whiskers = [
            [row.tokens_per_second - min(row.rates) for row in rows],
            [max(row.rates) - row.tokens_per_second for row in rows],
        ]
        bars = axes.bar(at, rates, 0.94 * width, yerr=whiskers, capsize=2, label=f"{name} ({rows[0].format})")
        axes.bar_label(bars, labels=[f"{rate:.3g}" for rate in rates], fontsize="small", padding=2)
        bounds = [report.machine.read_bytes_per_second / row.bytes_per_token for row in rows]
        axes.scatter(at, bounds, marker="_", s=200, color="black", label="read bandwidth" if place == 0 else None)
    axes.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
    axes.set_xlabel("tokens in the context")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
