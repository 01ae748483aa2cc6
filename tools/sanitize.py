#!/usr/bin/env python3
"""Run the kernels' tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer; exit with 1 for any finding.

    tools/sanitize.py [PYTEST OPTION ...]

First it proves that a finding would be found: a build with a planted off-by-one (csrc/kernels/sample.cpp reads one
logit too many) must fail, with a report that names it. Then the real build must pass. Both live in build/sanitize, in a
virtual environment that sees this interpreter's packages, which must include scikit-build-core and nanobind; the second
build compiles one file anew. Matrix units are emulated there, so their kernels run on any CPU with AVX-512, and a tile
that reads beyond its matrix is found.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "sanitize"
REPORTS = FOLDER / "reports"
PLANTED_TEST = "tests/kernels/test_sample.py"
TESTS = (
    "tests/kernels", "tests/test_norm.py", "tests/test_native_build.py", "tests/test_dispatch.py",
    "--ignore=tests/kernels/test_odd_sizes.py",  # it only measures time, which sanitizers change
    "--deselect=tests/kernels/test_int8_kv.py::test_divergence_on_the_shipped_model",  # only accuracy
)  # fmt: skip


def environment_beside_ours() -> Path:
    """A virtual environment that also sees this one's packages; returns its site-packages."""
    if not (FOLDER / "venv").exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", FOLDER / "venv"], check=True)
    site = next((FOLDER / "venv").glob("lib/python*/site-packages"))
    (site / "beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return site


def install(site: Path, planted: bool) -> None:
    """Build the package there. Without a working compiler it would install without kernels, which `run` refuses.

    Without build isolation: with it, every build has nanobind in another folder and compiles everything anew.
    """
    settings = {
        "install.strip": "false",
        "cmake.build-type": "RelWithDebInfo",
        "build-dir": str(FOLDER / "cmake"),
        "cmake.define.NEMOTRON_H_SANITIZE": "ON",
        "cmake.define.NEMOTRON_H_EMULATE_TILES": "ON",
        "cmake.define.NEMOTRON_H_PLANT_OVERRUN": "ON" if planted else "OFF",
    }
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    options = [word for name, value in settings.items() for word in ("-C", f"{name}={value}")]
    target = ["--no-build-isolation", "--upgrade", "--target", str(site)]
    subprocess.run([*command, *target, *options, str(ROOT)], check=True)


def run(*arguments: str) -> tuple[bool, str]:
    """Whether pytest passed, and what the sanitizers reported."""
    shutil.rmtree(REPORTS, ignore_errors=True)
    REPORTS.mkdir(parents=True)
    compiler = os.environ.get("CXX") or "c++"
    # libasan looks for C++'s exceptions when it starts, which Python alone does not load.
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    # Python and torch leak by design; the report goes to a file, since pytest has stderr when the process ends.
    options = f"detect_leaks=0:print_stacktrace=1:log_path={REPORTS / 'report'}"
    environment = {
        **os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": options, "UBSAN_OPTIONS": options,
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    python = str(FOLDER / "venv" / "bin" / "python")
    loaded = "from nemotron_h.ops import _native; raise SystemExit(_native.why_missing() or 0)"
    subprocess.run([python, "-c", loaded], cwd=ROOT, env=environment, check=True)
    tests = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    passed = subprocess.run(tests, cwd=ROOT, env=environment).returncode == 0
    return passed, "\n".join(path.read_text(errors="replace") for path in sorted(REPORTS.iterdir()))


def main() -> int:
    site = environment_beside_ours()
    install(site, planted=True)
    passed, report = run(PLANTED_TEST)
    if passed or "heap-buffer-overflow" not in report or "sample.cpp" not in report:
        print(f"sanitize: the planted overrun was not found, so a real one would not be either.\n{report}")
        return 1
    print("sanitize: the planted overrun was found, as it must be. Now the real build.", flush=True)
    install(site, planted=False)
    passed, report = run(*TESTS, *sys.argv[1:])
    print(report or f"sanitize: no finding; tests {'passed' if passed else 'FAILED'}")
    return 0 if passed and not report else 1


if __name__ == "__main__":
    raise SystemExit(main())
