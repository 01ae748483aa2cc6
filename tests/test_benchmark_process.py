"""Workers from the outside: answers, failures, deaths, and that none is left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from nemotron_h.benchmark.process import WORKERS, Worker, run_python
from nemotron_h.errors import NemotronHError, UnsupportedError

STAND_IN = """
import os, sys, time
print("a greeting that a library might print")

class UnsupportedError(Exception):
    pass

class Worker:
    def echo(self, **arguments):
        print("noise", flush=True)
        os.write(1, b"noise below Python\\n")
        return arguments
    def threads(self):
        return {"threads": os.environ["OMP_NUM_THREADS"], "session": os.getsid(0)}
    def nothing(self):
        pass
    def fail(self):
        raise ValueError("not\\n  today")
    def refuse(self):
        raise UnsupportedError("no such format")
    def grow(self, size):
        self.kept = b"x" * size
    def leave(self, status):
        print("last words", file=sys.stderr, flush=True)
        os._exit(status)
    def kill(self, number):
        os.kill(os.getpid(), number)
    def sleep(self, seconds):
        time.sleep(seconds)
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "stand_in.py"
    path.write_text(textwrap.dedent(STAND_IN))
    return str(path)


@pytest.fixture
def worker(program):
    with Worker("someone", sys.executable, program, 3) as worker:
        yield worker


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_answers(worker):
    answer = worker.ask("echo", number=1.5, text="ü\n", none=None)
    assert answer.pop("peak_bytes") > 1 << 20
    assert answer == {"number": 1.5, "text": "ü\n", "none": None}
    assert set(worker.ask("nothing")) == {"peak_bytes"}
    assert worker.ask("threads") | {"peak_bytes": 0} == {"threads": "3", "session": worker.pid, "peak_bytes": 0}


def test_peak_memory_is_the_processes_own(program):
    ballast = bytearray(256 << 20)  # which getrusage would hand on to a child
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])
    with Worker("someone", sys.executable, program, 1) as worker:
        small = worker.ask("nothing")["peak_bytes"]
        assert small < 100 << 20
        grown = worker.ask("grow", size=64 << 20)["peak_bytes"]
    assert 60 << 20 < grown - small < 80 << 20


def test_failures_leave_it_working(worker):
    with pytest.raises(NemotronHError, match="someone: ValueError: not today"):
        worker.ask("fail")
    with pytest.raises(UnsupportedError, match="someone: no such format"):
        worker.ask("refuse")
    with pytest.raises(NemotronHError, match="AttributeError"):
        worker.ask("missing")
    assert worker.ask("echo", a=1)["a"] == 1


def test_death(program):
    with Worker("someone", sys.executable, program, 1) as worker:
        with pytest.raises(NemotronHError, match=r"someone: its process ended with status 3: .*last words"):
            worker.ask("leave", status=3)
        with pytest.raises(NemotronHError, match="status 3"):
            worker.ask("echo")
    with (
        Worker("someone", sys.executable, program, 1) as worker,
        pytest.raises(NemotronHError, match="memory ran out"),
    ):
        worker.ask("kill", number=signal.SIGKILL)
    with Worker("someone", sys.executable, program, 1) as worker, pytest.raises(NemotronHError, match="SIGSEGV"):
        worker.ask("kill", number=signal.SIGSEGV)


def test_a_program_that_cannot_be_imported(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_this_name\n")
    with (
        Worker("someone", sys.executable, str(path), 1) as worker,
        pytest.raises(NemotronHError, match=r"ModuleNotFoundError: .*nothing_of_this_name"),
    ):
        worker.ask("echo")


def test_close_does_not_wait_for_an_answer(program):
    with Worker("someone", sys.executable, program, 1) as worker:
        worker.ask("nothing")
        pid, start = worker.pid, time.perf_counter()
        assert worker._process.stdin is not None
        worker._process.stdin.write('{"action": "sleep", "seconds": 600}\n')
        worker._process.stdin.flush()
    assert time.perf_counter() - start < 30
    assert gone(pid)


def test_it_ends_with_whoever_started_it(program):
    """Even in the middle of an action: nobody may be left to kill it."""
    command = [sys.executable, str(WORKERS / "serve.py"), program]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b'{"action": "nothing"}\n{"action": "sleep", "seconds": 600}\n')
    process.stdin.flush()
    assert process.stdout.readline()
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    process.stdout.close()


def test_run_python(tmp_path):
    assert run_python(sys.executable, "print(1 + 1)") == (0, "2")
    status, text = run_python(sys.executable, "import nothing_of_this_name")
    assert status == 1
    assert text.endswith("No module named 'nothing_of_this_name'")
    assert run_python(str(tmp_path / "python"), "1")[0] == -1
