"""Processes in which nothing of this package has been imported, at the price of a fork.

Importing torch and transformers takes seconds. A server does it once, offline, with one thread, and forks for each run;
what a test needs to know of these imports themselves, or of the hub client's variables, takes an interpreter of its
own.
"""

import json
import os
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

_SERVER = """
import json, os, sys, traceback, types
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel
torch.set_num_threads(1)

def run(order):
    for number, path in enumerate((os.devnull, order["out"], order["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
    sys.argv, sys.path[0] = order["arguments"], order["path"]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    status = 0
    try:
        exec(compile(order["code"], order["arguments"][0], "exec"), main.__dict__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(json.loads(line))
    os.write(1, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@cache
def _server() -> "subprocess.Popen[str]":
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def python(code: str | Path, *arguments: str) -> "CompletedProcess[str]":
    """Runs code, or the file that holds it, as a main module; the answer has its status, stdout and stderr."""
    if isinstance(code, Path):
        order = {"code": code.read_text(), "arguments": [str(code), *arguments], "path": str(code.parent)}
    else:
        order = {"code": textwrap.dedent(code), "arguments": ["-c", *arguments], "path": ""}
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        print(json.dumps(order | {"out": str(out), "err": str(err)}), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return CompletedProcess(order["arguments"], status, out.read_text(), err.read_text())
