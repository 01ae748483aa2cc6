"""Run by test_code_free.py: `python audited_load.py HOSTILE BENIGN KEYS` loads configs under an audit hook.

HOSTILE holds Python files named *evil*, KEYS is a JSON object of keys that would lead to them. Prints what happened
while configs were loaded, and, as a control that the hook sees such things, what a real import of such a file does.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from nemotron_h import NemotronHConfig

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

hostile, benign, keys = Path(sys.argv[1]).resolve(), Path(sys.argv[2]), json.loads(sys.argv[3])
events: list[str] = []
watching = False


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not watching:
        return
    if event.startswith(PROCESSES) or event == "import":
        events.append(f"{event} {str(arguments)[:100]}")
    elif event in ("open", "compile", "exec"):
        subject = {"open": 0, "compile": 1, "exec": 0}[event]
        path = str(getattr(arguments[subject], "co_filename", arguments[subject]))
        beside = os.path.realpath(path).startswith(str(hostile)) and not path.endswith("/config.json")
        if beside or "evil" in path:
            events.append(f"{event} {path}")


def load(content: dict[str, Any]) -> None:
    global watching
    (hostile / "config.json").write_text(json.dumps(content))
    watching = True
    NemotronHConfig.from_pretrained(hostile)
    NemotronHConfig.from_pretrained(hostile, trust_remote_code=True).validate()
    NemotronHConfig.from_dict({}, **content).to_json_string()
    watching = False


NemotronHConfig.from_pretrained(benign, trust_remote_code=True).to_json_string()  # what is imported late, is now
sys.path.insert(0, str(hostile))
sys.addaudithook(hook)
for key, value in keys.items():
    load({key: value})
load(keys)
found = list(events)
watching = True
__import__("configuration_evil")

watching = False
print(json.dumps({"found": found, "control": events[len(found) :]}))
