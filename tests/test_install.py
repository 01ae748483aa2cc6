"""`pip install` with build isolation, editable and not, with and without a working compiler."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

USE = """
import torch
from nemotron_h.ops import _native
from nemotron_h.ops.norm import rms_norm
assert rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).tolist() == [[1.0] * 4]
import nemotron_h
print(nemotron_h.__file__)
print(_native.why_missing() or "level " + _native.level())
"""


def checkout(folder: Path) -> Path:
    """A copy of what git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def environment_beside_ours(folder: Path) -> Path:
    """A new virtual environment that also sees this one's packages: no second torch. Returns its python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin" / "python"


@pytest.mark.campaign
@pytest.mark.parametrize("editable", [False, True], ids=["plain", "editable"])
@pytest.mark.parametrize("cxx", ["/bin/false", "c++"])
def test_install(tmp_path: Path, editable: bool, cxx: str) -> None:
    source, python = checkout(tmp_path / "source"), environment_beside_ours(tmp_path / "venv")
    target = ["-e", "."] if editable else ["."]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX")} | {"CXX": cxx}
    install = [python, "-m", "pip", "install", "-v", "--no-deps", *target]
    built = subprocess.run(install, cwd=source, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert ("WITHOUT its native kernels" in built.stdout + built.stderr) == (cxx == "/bin/false")
    used = subprocess.run([python, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert used.returncode == 0, used.stderr
    where, status = used.stdout.splitlines()
    assert Path(where).is_relative_to(source if editable else tmp_path / "venv")
    assert status.startswith("nemotron-h was installed without its C++ kernels" if cxx == "/bin/false" else "level ")
