"""`doctor`: says what is there and what is missing."""

import shutil
from importlib import metadata

import pytest
import torch

from nemotron_h import demo
from nemotron_h.cli import doctor
from nemotron_h.errors import KernelError
from nemotron_h.ops import _native, dispatch, threads


def test_what_it_says(run, environment):
    facts = run("doctor", "--json").json
    assert facts["ops"] == [{**row._asdict(), "implementations": list(row.implementations)} for row in dispatch.table()]
    assert {"rms_norm", "ssd_chunk_scan", "ssd_step", "attention", "causal_conv1d", "moe", "router"} <= {
        row["op"] for row in facts["ops"]
    }
    assert facts["threads"]["torch"] == torch.get_num_threads()
    assert facts["versions"]["packages"]["torch"] == metadata.version("torch")
    assert facts["cuda"]["note"] == "CUDA paths: not run on hardware"
    assert facts["kernels"]["levels"] == list(_native.levels())
    assert facts["memory"]["read_bytes_per_second"] > 1e8
    assert facts["settings"] == {}


def test_the_text(run, environment):
    outcome = run("doctor", "--no-measure")
    assert outcome.status == 0
    for words in ("not run on hardware", "rms_norm", "transformers", "torch", "threads", "AMX"):
        assert words in outcome.out
    assert "read at" not in outcome.out


def test_missing_kernels(run, monkeypatch, environment):
    monkeypatch.setattr(_native, "_load", lambda: (None, f"no kernels: {_native.INSTALL_HINT}"))
    out = run("doctor", "--no-measure").out
    assert sum("g++" in line for line in out.splitlines() if line.startswith("kernels")) == 1
    assert "unknown without the kernels" in out
    facts = run("doctor", "--no-measure", "--json").json
    assert facts["kernels"] == {"levels": [], "level": None, "missing": f"no kernels: {_native.INSTALL_HINT}"}
    assert {row["chosen"] for row in facts["ops"] if row["op"] == "rms_norm"} == {"reference"}


def test_settings_in_force(run, environment):
    environment(NEMOTRON_H_IMPL="reference")
    outcome = run("doctor", "--no-measure")
    assert "NEMOTRON_H_IMPL=reference" in outcome.out
    facts = run("doctor", "--no-measure", "--json").json
    assert facts["settings"] == {"NEMOTRON_H_IMPL": "reference"}
    assert next(row for row in facts["ops"] if row["op"] == "rms_norm")["chosen"] == "reference"


def test_illegal_settings(run, environment):
    with pytest.raises(KernelError):
        environment(NEMOTRON_H_IMPL="fastest")
    outcome = run("doctor", "--no-measure")
    assert outcome.status == 1
    assert "NEMOTRON_H_IMPL='fastest'" in outcome.error


@pytest.mark.parametrize(("declared", "inside"), [("<6,>=5", True), ("<5", False)])
def test_the_tested_range(run, monkeypatch, declared, inside):
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=2", f"transformers{declared}"])
    assert doctor._versions()["tested_transformers"] == {"range": declared, "inside": inside}
    assert ("is outside" in run("doctor", "--no-measure").out) is not inside


def test_run_from_the_sources(monkeypatch):
    def unknown(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", unknown)
    assert doctor._versions()["tested_transformers"] is None


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_quota(monkeypatch, tmp_path, files, quota):
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    assert threads.cgroup_quota() == quota


def test_amx():
    assert doctor._amx({}) == "unknown without the kernels"
    assert doctor._amx({"avx2": True, "amx_tile": False, "amx_permission": False}) == "the CPU has none"
    assert doctor._amx({"amx_tile": True, "amx_permission": True}) == "permitted"
    assert "does not permit" in doctor._amx({"amx_tile": True, "amx_permission": False})


def test_the_shipped_model(run, monkeypatch, tmp_path, talker):
    monkeypatch.setattr(demo, "demo_model", lambda: tmp_path)
    assert run("doctor", "--no-measure", "--json").json["shipped_model"] == {"path": str(tmp_path), "present": False}
    shutil.copy(talker / "model.safetensors", tmp_path)
    assert run("doctor", "--no-measure", "--json").json["shipped_model"]["present"] is True
