"""Loading a config runs nothing from its directory: an audit hook sees no import, code, socket or process."""

import json
import subprocess
import sys
from pathlib import Path

from config_cases import write_config
from test_foreign_keys import REACHING


def test_loading_a_hostile_config_runs_nothing(tmp_path: Path) -> None:
    hostile, benign, marker = tmp_path / "hostile", tmp_path / "benign", tmp_path / "marker"
    hostile.mkdir()
    benign.mkdir()
    for name in ("configuration_evil", "modeling_evil", "evil"):
        (hostile / f"{name}.py").write_text(f"open({str(marker)!r}, 'a').write(__name__)\n")
    for name in ("config.4.0.0.json", "evil.json"):
        (hostile / name).write_text('{"hidden_size": 1}')
    (tmp_path / "evil.safetensors").write_bytes(b"")
    script = Path(__file__).parent / "audited_load.py"
    arguments = [str(hostile), str(write_config(benign, {})), json.dumps(REACHING)]
    result = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    events = json.loads(result.stdout)
    assert events["found"] == []
    seen = {event.split()[0] for event in events["control"]}
    assert {"import", "open", "exec"} <= seen, "the hook would have seen nothing"
    assert marker.read_text() == "configuration_evil"
