"""`nemotron-h eval`."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.cli import main

DATA = Path(__file__).parent.parent / "data"
HELD_OUT = DATA / "held_out_austen.txt"
TASK = DATA / "tasks" / "choices.yaml"


def run(capfd: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = main(["eval", *map(str, arguments)])
    return status, *capfd.readouterr()


def test_texts(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A horse is a large animal with four legs. " * 20)
    report = tmp_path / "report.json"
    status, out, err = run(capfd, "--text", HELD_OUT, "--text", short, "--context", 256, "--json", "--output", report)
    assert status == 0
    facts = json.loads(out.splitlines()[-1])
    assert json.loads(report.read_text()) == facts
    assert [text["name"] for text in facts["texts"]] == [str(HELD_OUT), str(short)]
    for text, file in zip(facts["texts"], (HELD_OUT, short), strict=True):
        assert text["bytes"] == len(file.read_bytes())
        assert text["perplexity"]["low"] < text["perplexity"]["value"] < text["perplexity"]["high"]
        assert 0.5 < text["bits_per_byte"]["value"] < 3
    assert facts["texts"][0]["windows"] > 3
    assert f"{facts['texts'][0]['tokens']:,} of {facts['texts'][0]['tokens']:,} tokens" in err
    assert not list(tmp_path.glob(".*tmp*"))


def test_table_with_a_total(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A horse is an animal.")
    status, out, _ = run(capfd, "--text", tmp_path / "a.txt", "--text", tmp_path / "a.txt")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["text", "tokens", "bytes", "perplexity"]
    assert lines[1].split()[1:] != []
    assert lines[3].split()[0] == "total"
    assert int(lines[3].split()[2]) == 42


def test_stdin() -> None:
    command = [sys.executable, "-m", "nemotron_h", "eval", "--text", "-", "--json"]
    done = subprocess.run(command, input=b"A horse is an animal.", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["texts"][0]["bytes"] == 21


def test_tasks(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "--tasks", TASK, "--limit", 3, "--json")
    assert status == 0
    (line,) = out.splitlines()
    scores = {score["metric"]: score for score in json.loads(line)["tasks"]}
    assert set(scores) == {"acc", "acc_norm"}
    assert scores["acc"]["samples"] == 3
    assert 0 <= scores["acc"]["value"] <= 1
    assert scores["acc"]["stderr"] is not None
    assert "Scoring continuations" in err
    status, out, _ = run(capfd, "--tasks", TASK, "--text", HELD_OUT, "--num-fewshot", 1, "--chat-template")
    assert status == 0
    assert "bits per byte" in out
    assert "± stderr" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --text FILE or --tasks TASK"),
        (["--text", "missing.txt"], "missing.txt: No such file"),
        (["--text", "."], "directory"),
        (["--text", "binary"], "not UTF-8 (byte 2)"),
        (["--text", "empty"], "nothing to predict"),
        (["--text", "full", "--context", "1"], "context=1"),
        (["--text", "full", "--stride", "0"], "stride=0"),
        (["--text", "full", "--output", "no/such/directory.json"], "--output"),
        (["--text", "full", "--dtype", "int8"], "--dtype int8"),
        (["no/such/model/dir", "--text", "full"], "no/such/model"),
        (["--tasks", "no_such_task.yaml"], "no_such_task.yaml"),
        (["--tasks", "evil.yaml"], "--trust-task-code"),
        (["--task", TASK.name], "--task"),
    ],
)
def test_wrong_use_is_one_line_and_status_two(
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(b"ab\xff")
    Path("empty").touch()
    Path("full").write_text("A horse is an animal.")
    Path("evil.yaml").write_text("task: evil\ndoc_to_text: !function os.getcwd")
    status, out, err = run(capfd, *arguments)
    assert status == 2
    assert out == ""
    assert [line for line in err.splitlines() if message in line and line.startswith("error: ")]


def test_ctrl_c() -> None:
    text = "A horse is an animal. " * 40_000
    command = [sys.executable, "-m", "nemotron_h", "eval", "--text", "-", "--context", "64"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(text.encode())
    process.stdin.close()
    while b" tokens" not in process.stderr.readline():
        time.sleep(0.01)
    process.send_signal(2)
    assert process.wait(timeout=30) == 130


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from nemotron_h.cli import main; main(['eval', '--help'])\n"
        "print([m for m in ('torch', 'transformers', 'lm_eval', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "--trust-task-code" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_page_is_true() -> None:
    root = DATA.parent.parent
    page = (root / "docs" / "evaluation.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "Interval(value=" in done.stdout
    assert "acc_norm" in done.stdout
    options = set(re.findall(r"--[a-z-]+", page))
    listed = subprocess.run([sys.executable, "-m", "nemotron_h", "eval", "--help"], capture_output=True, text=True)
    assert options
    assert not [option for option in options if option not in listed.stdout]
