"""Serve one worker: a line of JSON in, a line of JSON out. Standard library only, whatever interpreter runs it.

    python serve.py PROGRAM     a module beside this file, or the path of one; it has a class `Worker` whose methods
                                are the actions

The answer is what the method returns, with the process's peak memory; or {"error": its text, "kind": its class}. The
process ends with its standard input, even in the middle of an action: nobody would hear the answer.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import re
import resource
import sys
import threading
from pathlib import Path
from typing import Any, TextIO


def main(program: str) -> None:
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker: Any = None
    while True:
        request = json.loads(requests.get())
        action = request.pop("action")
        try:
            if worker is None:
                worker = _load(program)
            answer = getattr(worker, action)(**request) or {}
        except Exception as error:  # noqa: BLE001 (whatever it is, the other side reports it)
            _send(answers, {"error": " ".join(str(error).split()), "kind": type(error).__name__})
        else:
            _send(answers, {**answer, "peak_bytes": peak_bytes()})


def _listen(requests: queue.Queue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def _send(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _load(program: str) -> Any:
    path = Path(program) if program.endswith(".py") else Path(__file__).parent / f"{program}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module.Worker()


def peak_bytes() -> int:
    """Most memory that this process ever held, mapped files included. (getrusage also knows the parent's past.)"""
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(sys.argv[1])
