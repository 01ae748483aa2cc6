"""`nemotron-h`: the command line. Each module here that `COMMANDS` names is one command, its function `command`.

Nothing at the top of these modules imports torch or transformers, so that `--help` answers at once.
Exit status: 0 done, 1 failed while working, 2 wrong use or unusable input, 130 on Ctrl-C. An error is one line on
stderr and, with `--json`, one line of JSON on stdout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from typing import TYPE_CHECKING

from nemotron_h import __version__
from nemotron_h.cli import _interrupts
from nemotron_h.cli._output import print_json
from nemotron_h.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    MissingDependencyError,
    NemotronHError,
    UnsupportedError,
)

if TYPE_CHECKING:
    import typer

COMMANDS: dict[str, str] = {
    "generate": "Continue a prompt.",
    "chat": "Talk with a model in the terminal.",
    "info": "Shape, parameters and memory of a model or a preset.",
    "init": "Write a random-weight checkpoint of any shape.",
    "verify": "Check a model's weights, and what this machine computes with them.",
    "eval": "Perplexity of texts, scores of lm-eval's tasks.",
    "bench": "Speed and memory, beside other engines and the machine's limit.",
    "doctor": "What this machine offers, and which implementations run on it.",
}

DONE, FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130

_UNUSABLE = (ConfigError, CheckpointError, InputError, UnsupportedError, MissingDependencyError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. `argv`: the arguments without the program's name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _interrupts.watched():
        try:
            return _run(arguments)
        except (KeyboardInterrupt, Exception) as error:
            status, message = _explain(error)
            if status is None:
                raise
            _report(arguments, status, type(error).__name__, message)
    if status == INTERRUPTED and argv is None:
        os._exit(status)  # Python itself would end as killed by SIGINT where the interrupt met an exec(), in an import
    return status


def _run(arguments: list[str]) -> int:
    from typer.main import get_command

    streams = sys.stdout, sys.stderr
    for stream in streams:
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a text that the terminal cannot show is no failure
    try:
        status = get_command(app()).main(arguments or ["--help"], prog_name="nemotron-h", standalone_mode=False)
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        sys.stdout, sys.stderr = streams  # typer wraps them when it turns this error into an exit
        raise end.__context__ from None
    if status == INTERRUPTED:  # typer's word for KeyboardInterrupt
        raise KeyboardInterrupt
    if sys.stdout is not None:
        sys.stdout.flush()
    return status if isinstance(status, int) else DONE


def app() -> typer.Typer:
    """The typer application with all commands."""
    import typer

    application = typer.Typer(
        name="nemotron-h",
        help="Nemotron-H language models. Without a MODEL, a command uses the small model that ships with the package.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # rich would take longer to import than everything else together
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def print_version(wanted: bool) -> None:
        if wanted:
            print(f"nemotron-h {__version__}")
            raise typer.Exit

    @application.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", is_eager=True, callback=print_version, help="Show the version and exit."
        ),
    ) -> None:
        pass

    for name, summary in COMMANDS.items():
        application.command(name, short_help=summary)(import_module(f"nemotron_h.cli.{name}").command)
    return application


def _explain(error: BaseException) -> tuple[int | None, str]:
    """Exit status and message of an error; the status is None for what only a mistake of ours can raise."""
    if isinstance(error, KeyboardInterrupt) or _interrupts.came():
        return INTERRUPTED, "interrupted"
    if isinstance(error, BrokenPipeError):
        return DONE, ""  # nobody reads our output any more, as in `| head`
    if isinstance(error, NemotronHError):
        return (UNUSABLE if isinstance(error, _UNUSABLE) else FAILED), str(error)
    if (format_message := getattr(error, "format_message", None)) is not None:  # typer's usage errors
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "nemotron-h"
        return UNUSABLE, f"{format_message()} See {command} --help."
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return FAILED, f"{error.strerror or error}{where}"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return FAILED, f"out of memory {error}"
    return None, ""


def _report(arguments: list[str], status: int, kind: str, message: str) -> None:
    """One line on stderr and, with --json, one on stdout; nothing for an empty message."""
    line = " ".join(message.split())
    if line and sys.stderr is not None:
        print(f"error: {line}", file=sys.stderr)
    stdout = sys.stdout
    if stdout is None:
        return
    try:
        if line and "--json" in arguments:
            print_json({"error": {"type": kind, "message": line, "status": status}})
        stdout.flush()
    except OSError:  # the null device in its place, or the interpreter would complain of it at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
