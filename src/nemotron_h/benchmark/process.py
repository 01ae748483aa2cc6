"""A worker from the outside: a process that holds one model and answers requests, one line of JSON each way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from nemotron_h import errors
from nemotron_h.errors import NemotronHError

WORKERS = Path(__file__).parent / "workers"
_SHOWN = 300  # characters of what a worker that died had to say


class Worker:
    """Starts the process; `close`, or leaving the `with` block, ends it at once, whatever it does.

    Args:
        name: For messages.
        python: The interpreter that runs it.
        program: A module of `workers/` with a class `Worker`, or the path of such a file.
        threads: CPU threads that it may use.
    """

    def __init__(self, name: str, python: str, program: str, threads: int) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        command = [python, str(WORKERS / "serve.py"), program]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        # A session of its own: Ctrl-C reaches us alone, and we end the workers.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment,
            start_new_session=True, text=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, action: str, **arguments: Any) -> dict[str, Any]:
        """The worker's answer.

        Raises:
            NemotronHError: the process ended, or failed; where it failed by an error of this package, that error.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps({"action": action, **arguments}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            raise NemotronHError(f"{self.name}: {self._end()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _error(self.name, answer["kind"], answer["error"])
        return answer

    def _end(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        said = " ".join(self._errors.read().decode(errors="replace").split())[-_SHOWN:]
        if status == -signal.SIGKILL:
            return "its process was killed, most likely because memory ran out: close programs, or take fewer peers"
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return f"its process ended with {how}" + (f": {said}" if said else "")

    def close(self) -> None:
        """End the process and wait for it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # a request that it never read
                    stream.close()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _error(name: str, kind: str, text: str) -> NemotronHError:
    own = getattr(errors, kind, None)
    if isinstance(own, type) and issubclass(own, NemotronHError):
        return own(f"{name}: {text}")
    return NemotronHError(f"{name}: {kind}: {text}")


def run_python(python: str, program: str) -> tuple[int, str]:
    """Exit status and output of a line of Python; status -1 where there is no such interpreter."""
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    except OSError as error:
        return -1, f"{error.strerror}"
    return done.returncode, done.stdout.strip() if done.returncode == 0 else done.stderr.strip()
