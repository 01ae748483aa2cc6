"""`nemotron-h verify`: a model's weights, and every path that computes with them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron_h.cli import _options
from nemotron_h.cli._models import weights
from nemotron_h.cli._options import check_dtype
from nemotron_h.cli._output import columns, note, print_json
from nemotron_h.errors import InputError

if TYPE_CHECKING:
    from nemotron_h.verification import Report

_SHOWN = 10


def command(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False)] = None,
    against: Annotated[str | None, typer.Option(help="transformers: run its model on the same files too.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A prompt per line; token ids also work.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longer prompts are cut.")] = 160,
    dtype: Annotated[str, typer.Option(help="Only float32 and float64 are judged.")] = "float32",
    json: _options.Json = False,
) -> int:
    """Check a model's weights for NaN, infinity and zeros, and compare the ways to compute its logits.

    The yardstick is the reference of every op over whole prompts. Compared with it are the fast path, whole and token
    by token with the cache, and transformers, as it is and with its floor under the time step lifted. Exit status 0
    when all agree within 2e-4 × max(1, max |logit|), 1 when not; transformers as it is does not count.
    """
    check_dtype(dtype)
    path = weights(model)
    listed = None if prompts is None else _read(prompts)
    note("importing torch")
    from nemotron_h.verification import verify

    report = verify(path, against=against, prompts=listed, max_tokens=max_tokens, dtype=dtype, progress=note)
    if json:
        print_json(_facts(report))
    else:
        print("\n".join(_text(report)))
    return 0 if report.ok else 1


def _read(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"--prompts {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts {file}: not UTF-8 (byte {error.start})") from error
    return [line for line in lines if line.strip()]


def _facts(report: Report) -> dict[str, Any]:
    comparisons = [asdict(comparison) | {"ok": comparison.ok} for comparison in report.comparisons]
    floor = None if report.floor is None else asdict(report.floor) | {"explanation": str(report.floor)}
    return asdict(report) | {"comparisons": comparisons, "floor": floor, "ok": report.ok}


def _text(report: Report) -> list[str]:
    lines = [
        f"model     {report.model}",
        f"prompts   {report.prompts}, {report.tokens} tokens, {report.dtype}",
        f"weights   {report.tensors:,} tensors: {_verdict(report)}",
    ]
    rows = [["against the reference", "max |Δ logit|", "bound", "mean KL", "same best token", ""]]
    for c in report.comparisons:
        verdict = ("ok" if c.ok else "DIFFERS") if c.judged else "not judged"
        rows.append([c.path, f"{c.max_delta:.2e}", f"{c.bound:.2e}", f"{c.mean_kl:.2e}", f"{c.agreement:.2%}", verdict])
    if report.comparisons:
        lines += ["", *columns(rows)]
    if report.floor is not None and any(c.path.startswith("transformers") for c in report.comparisons):
        lines += ["", str(report.floor)]
    lines += ["", *report.notes] if report.notes else []
    return [*lines, "", "everything agrees" if report.ok else "NOT VERIFIED"]


def _verdict(report: Report) -> str:
    found = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}" + (" ..." if len(names) > _SHOWN else "")
        for names, what in ((report.non_finite, "not finite"), (report.all_zero, "all zero"))
        if names
    ]
    return "; ".join(found) or "all finite, none all zero"
