"""`nemotron-h bench`: how fast a model decodes and reads, beside other engines and the machine's own limits."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron_h.cli import _options
from nemotron_h.cli._models import shape, weights
from nemotron_h.cli._output import columns, note, print_json
from nemotron_h.errors import InputError

if TYPE_CHECKING:
    from nemotron_h.benchmark import Report, Subject


def command(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL|SHAPE]", show_default=False)] = None,
    peers: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Also measure llama.cpp, transformers; separated by commas.")
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="int4, int8, bf16 or none. Default: int4 for a SHAPE, none for a MODEL.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Tokens before the measured ones. Default: 0,4096,16384.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens that each engine decodes in a round.")] = 32,
    repeats: Annotated[int, typer.Option(help="Rounds; medians are shown.")] = 5,
    prefill: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Lengths of prompts to read, or none. Default: 512,2048.")
    ] = None,
    batches: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Sequences decoding together, or none. Default: 1,4,16.")
    ] = None,
    limit: Annotated[
        float, typer.Option(metavar="SECONDS", help="What an engine may spend on prompts of one length.")
    ] = 120,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default the physical cores.")] = None,
    check_paths: Annotated[
        bool, typer.Option("--check-paths", help="Compare with model.generate and LLM.generate too.")
    ] = False,
    load: Annotated[
        bool, typer.Option("--load", help="Write random weights to a checkpoint first, to time its loading.")
    ] = False,
    llama_python: Annotated[
        str | None, typer.Option(metavar="PATH", help="The Python that has llama_cpp; default this one.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Append a row for each figure.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the figures (needs the extra `plot`).")] = None,
    json: _options.Json = False,
) -> int:
    """Measure decoding, reading of prompts, sequences that decode together, the time to the first token, and memory.

    SHAPE is nano-slice, dense-slice, nano-30b, a preset or a config.json: random weights. MODEL is a checkpoint
    directory or hub id: its own. Peers always get random weights of the same shape. Every engine runs in a process of
    its own, and they take turns. GB/s and TFLOP/s are the bytes that a step has to read and the operations that it has
    to do, by arithmetic, times the speed; the limits beside them are measured in between.

    Exit status 1 when a peer failed, when fast ways of our model do not give the bits of slow ones, and when
    --check-paths finds ways that differ by more than 15 %.
    """
    from nemotron_h.benchmark import SEQUENCES, Options, run
    from nemotron_h.benchmark.report import append_csv, check_csv

    subject = _subject(model, quantization)
    sequences = _numbers("--batches", batches)
    options = Options(
        _numbers("--context", context), tokens, repeats, threads, _names(peers), llama_python, check_paths, load,
        _numbers("--prefill", prefill), SEQUENCES if sequences is None else sequences, limit,
    )  # fmt: skip
    if csv is not None:
        check_csv(csv)
    if png is not None:
        _check_png(png)
    report = run(subject, options, note)
    if csv is not None:
        append_csv(report, csv)
    if png is not None:
        from nemotron_h.benchmark.plot import write_png

        write_png(report, png)
    if json:
        print_json(report.facts())
    else:
        print("\n".join(_text(report)))
    return 0 if report.good else 1


def _subject(model: str | None, quantization: str | None) -> Subject:
    """What to measure. An existing path is never taken for a shape's name."""
    from nemotron_h.benchmark import FORMATS, SHAPES, Subject, shape_config

    if quantization not in (None, *FORMATS):
        raise InputError(f"--quantization {quantization}: must be one of {', '.join(FORMATS)}")
    if model in SHAPES and not Path(model).exists():
        name, path, config = model, None, shape_config(model)
    else:
        of = shape(model, {})
        name, config = of.name, of.config
        path = weights(model) if of.kind in ("checkpoint", "hub") else None
    chosen = quantization or ("int4" if path is None else "none")
    assert config is not None
    return Subject(name, config, path, None if chosen == "none" else chosen)


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if text in ("", "none"):
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} {text}: must be numbers separated by commas, such as 512,4096") from None


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()


def _check_png(path: Path) -> None:
    from nemotron_h.benchmark.plot import check_installed, check_path

    check_installed()
    check_path(path)


def _text(report: Report) -> list[str]:
    from nemotron_h.benchmark.report import notes, tables

    machine = report.machine
    source = f"{machine.version} ({machine.commit})" if machine.commit else machine.version
    low, high = min(machine.bandwidth) / 1e9, max(machine.bandwidth) / 1e9
    lines: list[Any] = [
        f"model      {report.model}: {report.pattern}, {report.parameters:,} parameters",
        f"machine    {machine.cpu}, cores {machine.cores}, threads {machine.threads},"
        f" {machine.memory_bytes / 2**30:.3g} GiB, {machine.system}; {machine.date}",
        f"package    nemotron-h {source}",
        f"bandwidth  {machine.read_bytes_per_second / 1e9:.3g} GB/s read with 2 MiB pages ({low:.3g} to {high:.3g})",
    ]
    if machine.peaks:
        peaks = ", ".join(
            f"{name} {statistics.median(found) / 1e12:.3g} ({min(found) / 1e12:.3g} to {max(found) / 1e12:.3g})"
            for name, found in machine.peaks.items()
        )
        lines.append(f"peaks      {peaks} TFLOP/s")
    for table in tables(report):
        lines += ["", *columns(table)]
    found = notes(report)
    return [*lines, "", *found] if found else lines
