"""`main`: help, versions, exit statuses, and one line for every error."""

import errno
import os
import resource
import signal
import subprocess
import sys
from importlib import import_module

import pytest

from nemotron_h import __version__, errors
from nemotron_h.cli import COMMANDS, info, main
from nemotron_h.cli._output import print_json

IMPORTS_NOTHING = """
import sys
from nemotron_h.cli import COMMANDS, main
for name in ["", *COMMANDS]:
    assert main([*name.split(), "--help"]) == 0, name
for arguments in sys.argv[1:]:
    assert main(arguments.split()) == 0, arguments
heavy = {"torch", "transformers", "numpy", "rich"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_lists_every_command(run):
    out = run("--help").out
    for name, summary in COMMANDS.items():
        assert name in out
        assert summary in out


def test_without_arguments_help_is_shown(run):
    assert run() == run("--help")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_module_and_help(run, name):
    assert callable(import_module(f"nemotron_h.cli.{name}").command)
    outcome = run(name, "--help")
    assert outcome.status == 0
    assert f"nemotron-h {name}" in outcome.out


def test_version(run):
    assert run("--version").out == f"nemotron-h {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["--nothing"], ["info", "--nothing"], ["init"], ["init", "a", "b", "--seed", "x"]]
)
def test_wrong_use(run, arguments):
    outcome = run(*arguments)
    assert outcome.status == 2
    assert outcome.out == ""
    assert "--help" in outcome.error
    assert outcome.err.count("\n") == 1


def test_wrong_use_in_json(run):
    outcome = run("info", "--nothing", "--json")
    assert outcome.status == 2
    assert outcome.json["error"]["status"] == 2
    assert "--nothing" in outcome.json["error"]["message"]


STATUSES = [
    (errors.ConfigError("bad"), 2),
    (errors.CheckpointError("bad"), 2),
    (errors.ModelNotFoundError("bad"), 2),
    (errors.InputError("bad"), 2),
    (errors.UnsupportedError("bad"), 2),
    (errors.MissingDependencyError("bad"), 2),
    (errors.KernelError("bad"), 1),
    (errors.CacheError("bad"), 1),
    (errors.NemotronHError("bad"), 1),
    (OSError(errno.ENOSPC, "bad", "/some/file"), 1),
    (MemoryError("bad"), 1),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: bad"), 1),
    (KeyboardInterrupt(), 130),
]


@pytest.mark.parametrize(("error", "status"), STATUSES, ids=lambda value: type(value).__name__)
def test_exit_status_of_every_error(run, monkeypatch, error, status):
    def fail(of):
        raise error

    monkeypatch.setattr(info, "describe", fail)
    text = run("info", "nemotron-h-8b")
    assert text.status == status
    assert text.out == ""
    assert ("interrupted" if status == 130 else "bad") in text.error
    machine = run("info", "nemotron-h-8b", "--json")
    assert machine.status == status
    assert machine.json["error"] == {
        "type": type(error).__name__,
        "message": text.error.removeprefix("error: "),
        "status": status,
    }


def test_a_message_of_many_lines_becomes_one(run, monkeypatch):
    def fail(of):
        raise errors.ConfigError("one\n  two\n\nthree")

    monkeypatch.setattr(info, "describe", fail)
    assert run("info", "nemotron-h-8b").err == "error: one two three\n"


def test_a_mistake_of_ours_is_not_hidden(run, monkeypatch):
    def fail(of):
        raise ValueError("ours")

    monkeypatch.setattr(info, "describe", fail)
    with pytest.raises(ValueError, match="ours"):
        run("info", "nemotron-h-8b")


def test_an_interrupt_that_an_import_turned_into_another_error(run, monkeypatch):
    def fail(of):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RecursionError("numpy's") from None

    monkeypatch.setattr(info, "describe", fail)
    before = signal.getsignal(signal.SIGINT)
    assert run("info", "nemotron-h-8b").status == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_json_has_neither_nan_nor_infinity(capsys):
    print_json({"a": [float("nan"), {"b": float("inf")}], "c": (1.5, None), 3: True})
    assert capsys.readouterr().out == '{"a": [null, {"b": null}], "c": [1.5, null], "3": true}\n'


def test_the_real_command_line_exits_by_itself_on_ctrl_c(monkeypatch, run):
    def fail(of):
        raise KeyboardInterrupt

    exits = []
    monkeypatch.setattr(info, "describe", fail)
    monkeypatch.setattr(os, "_exit", exits.append)
    run("info", "nemotron-h-8b")
    assert exits == []
    monkeypatch.setattr(sys, "argv", ["nemotron-h", "info", "nemotron-h-8b"])
    main()
    assert exits == [130]


def test_help_and_info_import_neither_torch_nor_transformers(talker):
    calls = ["info nemotron-3-ultra-550b-a55b --json", f"info {talker} --json", f"info {talker / 'config.json'}"]
    done = subprocess.run([sys.executable, "-c", IMPORTS_NOTHING, *calls], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _cpu_seconds(arguments):
    """Processor time of the fastest of five runs: that of an idle machine, as nothing is waited for."""
    taken = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "nemotron_h", *arguments], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


def test_help_is_quick():
    assert _cpu_seconds(["--help"]) < 0.3
    assert _cpu_seconds(["generate", "--help"]) < 0.3


def test_info_is_quick():
    assert _cpu_seconds(["info", "nemotron-3-ultra-550b-a55b"]) < 2
