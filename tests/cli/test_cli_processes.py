"""What only a process of its own can show: signals, pipes, a full disk under stdout."""

import json
import os
import signal
import subprocess
import sys

import pytest

FOREVER = ("--max-tokens", "100000000", "--ignore-eos")


@pytest.fixture(autouse=True)
def buffered(monkeypatch):
    """As a user's shell has it: or no buffer would hold what the interpreter's exit trips over."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


def _start(*arguments):
    command = [sys.executable, "-m", "nemotron_h", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def endless(tmp_path, talker):
    """The random model with room for a text that does not end while a test looks at it."""
    config = (talker / "config.json").read_text()
    assert '"max_position_embeddings": 512' in config
    for file in talker.iterdir():
        os.link(file, tmp_path / file.name)
    (tmp_path / "config.json").unlink()
    longer = config.replace('"max_position_embeddings": 512', '"max_position_embeddings": 100000000')
    (tmp_path / "config.json").write_text(longer)
    return tmp_path


def test_ctrl_c_while_generating(endless):
    process = _start("generate", endless, "Once", *FOREVER)
    assert process.stdout.read(1)  # it streams: the first text is here while the last never will be
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "error: interrupted"
    assert b"Traceback" not in err


def test_ctrl_c_while_importing(endless):
    process = _start("generate", endless, "Once", *FOREVER)
    assert process.stderr.readline().startswith(b"loading")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == (b"", b"error: interrupted\n")


def test_a_reader_that_goes_away(endless):
    process = _start("generate", endless, "Once", *FOREVER)
    assert process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 0
    assert b"Traceback" not in err
    assert b"error" not in err


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_nobody_ever_reads(option):
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as pipe:
        command = [sys.executable, "-m", "nemotron_h", "info", "nemotron-h-8b", *option]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_doctor_in_a_fresh_process_knows_every_op():
    done = subprocess.run(
        [sys.executable, "-m", "nemotron_h", "doctor", "--no-measure", "--json"], capture_output=True, check=True
    )
    assert {"rms_norm", "ssd_step", "router"} <= {row["op"] for row in json.loads(done.stdout)["ops"]}


def test_a_full_disk_under_stdout():
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "nemotron_h", "info", "nemotron-h-8b"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr == b"error: No space left on device\n"


@pytest.mark.parametrize(("closed", "status"), [(1, 0), (2, 2)])
def test_closed_streams(closed, status):
    model = "nemotron-h-8b" if status == 0 else "nemotron-h-8x"
    command = f'exec "$0" -m nemotron_h info {model} {closed}>&-'
    done = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, check=False)
    assert done.returncode == status
    assert done.stdout == done.stderr == b""
