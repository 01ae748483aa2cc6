"""Run by test_code_free_loading.py: `python audited_model_load.py HOSTILE BENIGN` loads models under an audit hook.

HOSTILE is a checkpoint directory that holds, and whose config.json names, Python files. Prints as JSON what was opened,
imported, run or connected to while it was loaded and used, and, as a control that the hook sees such things, what a
real import from there does.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import nemotron_h
from nemotron_h import NemotronHForCausalLM, NemotronHModel
from nemotron_h.errors import ModelNotFoundError

PROCESSES = (
    "socket.",
    "subprocess.",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.system",
    "ctypes.",
    "urllib.",
    "pickle.",
)
CODE = {"import": 0, "compile": 1, "exec": 0}
FILES = ("open", "os.listdir", "os.scandir")

hostile, benign = (Path(argument).resolve() for argument in sys.argv[1:3])
package = Path(nemotron_h.__file__).parent
allowed = [os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, package, os.environ["HF_HOME"], "/proc", "/sys")]
found: dict[str, list[str]] = {"outside": [], "code": [], "processes": [], "inside": []}
watching = False


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not watching:
        return
    if event.startswith(PROCESSES):
        found["processes"].append(f"{event} {str(arguments)[:100]}")
    elif event in CODE:
        path = str(getattr(arguments[CODE[event]], "co_filename", arguments[CODE[event]]))
        if "evil" in path or path.startswith(str(hostile)):
            found["code"].append(f"{event} {path}")
    elif event in FILES and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if path == str(hostile) or path.startswith(str(hostile) + os.sep):
            found["inside"].append(os.path.relpath(path, hostile))
        elif not any(path.startswith(place) for place in allowed):
            found["outside"].append(path)


def use(directory: Path) -> None:
    for kwargs in ({}, {"trust_remote_code": True}, {"trust_remote_code": True, "dtype": "bfloat16"}):
        NemotronHModel.from_pretrained(directory, **kwargs)
        model = NemotronHForCausalLM.from_pretrained(directory, **kwargs)
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2)
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, trust_remote_code=True)


def unknown() -> str:
    try:
        NemotronHForCausalLM.from_pretrained("nobody/unknown", trust_remote_code=True)
    except ModelNotFoundError as error:
        return str(error)
    return ""


use(benign)  # what is imported late, is now
unknown()
sys.addaudithook(hook)
watching = True
use(hostile)
message = unknown()
watching = False
seen = json.loads(json.dumps(found))

sys.path.insert(0, str(hostile))
watching = True
__import__("modeling_evil")

watching = False
control = {key: value[len(seen[key]) :] for key, value in found.items()}
print(json.dumps({"seen": seen, "control": control, "unknown": message}))
