"""Loading takes the weights' memory and one tensor more, saving one tensor, whatever the number of files."""

import json
import os
import subprocess
import sys
from pathlib import Path

SLACK = 8 * 2**20
"""What the interpreter and malloc move about meanwhile; a second copy of the weights would be 180 MB."""


def test_peak_memory(tmp_path: Path) -> None:
    run = [sys.executable, str(Path(__file__).parent / "measured_load.py"), str(tmp_path), "bfloat16", "float32"]
    # A fixed threshold, or malloc would keep freed blocks of up to 32 MB for later.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(run, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["files"] == 4
    assert set(measured["loaded"]) == {"bfloat16", "float32"}
    for loaded in measured["loaded"].values():
        assert loaded["weights"] > 180e6
        assert 0.9 * loaded["weights"] < loaded["rise"] <= loaded["weights"] + measured["largest"] + SLACK
    assert measured["saving"] <= measured["largest"] + SLACK
