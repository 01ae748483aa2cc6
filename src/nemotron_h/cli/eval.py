"""`nemotron-h eval`: perplexity of texts, and lm-eval's tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron_h.cli import _options
from nemotron_h.cli._models import weights
from nemotron_h.cli._options import check_dtype, load
from nemotron_h.cli._output import columns, finite, note, print_json
from nemotron_h.errors import InputError

if TYPE_CHECKING:
    from nemotron_h.evaluation import Interval, TextScore
    from nemotron_h.evaluation.tasks import TaskScore
    from nemotron_h.generation import LLM


def command(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False)] = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="A UTF-8 text, `-` for stdin; repeatable.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="A task file, or a name that lm-eval knows; repeatable.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a window; default 4096 or the model's longest.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; default half of --context.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in front of each question.")] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Put questions into the template.")] = False,
    trust_task_code: Annotated[
        bool, typer.Option("--trust-task-code", help="Let a task file run its own code.")
    ] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the results there, as JSON.")] = None,
    dtype: _options.Dtype = "auto",
    device: _options.Device = "cpu",
    threads: _options.Threads = None,
    json: _options.Json = False,
) -> int:
    """Perplexity and bits per byte of texts (--text), and scores of tasks (--tasks, needs the extra `eval`).

    Texts: 95 % confidence from blocks of 128 tokens. Tasks: value and standard error, as lm-eval has them.
    """
    check_dtype(dtype)
    if not text and not tasks:
        raise InputError("nothing to do: give --text FILE or --tasks TASK")
    texts = [(name, _read(name)) for name in text or []]  # all errors before any work
    path = weights(model)
    note(f"loading {path}")
    llm = load(path, dtype, device, threads)
    _use_threads(llm)
    scores = [_score(llm, name, content, context, stride) for name, content in texts]
    found = _run_tasks(llm, tasks, limit, num_fewshot, chat_template, trust_task_code) if tasks else []
    facts = {"model": path, "texts": [_facts(score) for score in scores], "tasks": [score._asdict() for score in found]}
    if output is not None:
        _write(output, facts)
    if json:
        print_json(facts)
    else:
        print("\n".join([*_text_table(scores), *_task_table(found)]))
    return 0


def _read(name: str) -> str:
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return raw.decode()
    except OSError as error:
        raise InputError(f"--text {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--text {name}: not UTF-8 (byte {error.start})") from error


def _use_threads(llm: LLM) -> None:
    import torch

    if llm.threads is not None:
        torch.set_num_threads(llm.threads)


def _score(llm: LLM, name: str, text: str, context: int | None, stride: int | None) -> TextScore:
    from nemotron_h.evaluation import score_text

    def show(done: int, tokens: int) -> None:
        note(f"{name}: {done:,} of {tokens:,} tokens")

    return score_text(llm, text, name, context, stride, show)


def _run_tasks(
    llm: LLM, tasks: list[str], limit: int | None, num_fewshot: int | None, chat_template: bool, trust_code: bool
) -> list[TaskScore]:
    from contextlib import redirect_stdout

    from nemotron_h.evaluation.tasks import run_tasks

    with redirect_stdout(sys.stderr):  # what lm-eval prints is about the work
        return run_tasks(llm, tasks, limit, num_fewshot, chat_template, trust_code)


def _facts(score: TextScore) -> dict[str, Any]:
    return {
        "name": score.name,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "nats": score.nll,
        "perplexity": score.perplexity._asdict(),
        "bits_per_byte": score.bits_per_byte._asdict(),
        "windows": score.windows,
        "seconds": score.seconds,
    }


def _write(output: Path, facts: dict[str, Any]) -> None:
    from json import dumps

    from nemotron_h.files import publish, write_temporary

    text = dumps(finite(facts), indent=2, allow_nan=False) + "\n"
    try:
        publish(write_temporary(output, [memoryview(text.encode())]), output)
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror}") from error


def _text_table(scores: list[TextScore]) -> list[str]:
    if not scores:
        return []
    from nemotron_h.evaluation import combine

    rows = [["text", "tokens", "bytes", "perplexity", "95 %", "bits per byte", "95 %", "tokens/s"]]
    for score in scores if len(scores) == 1 else [*scores, combine(scores)]:
        perplexity, bits = score.perplexity, score.bits_per_byte
        speed = f"{score.tokens / score.seconds:,.0f}"
        rows.append(
            [score.name, f"{score.tokens:,}", f"{score.bytes:,}", f"{perplexity.value:.4g}", _range(perplexity),
             f"{bits.value:.4f}", _range(bits), speed]
        )  # fmt: skip
    return columns(rows)


def _range(interval: Interval) -> str:
    return "-" if interval.low is None or interval.high is None else f"{interval.low:.4g} to {interval.high:.4g}"


def _task_table(scores: list[TaskScore]) -> list[str]:
    rows = [["task", "metric", "value", "± stderr", "documents"]]
    for score in scores:
        error = "-" if score.stderr is None else f"{score.stderr:.4f}"
        rows.append([score.task, score.metric, f"{score.value:.4f}", error, f"{score.samples:,}"])
    return columns(rows) if scores else []
