"""`doctor`: says what is there and what is missing."""

import shutil
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from helpers import tiny_model
from nemotron_h import demo
from nemotron_h.checkpoint.mapping import ENOUGH, MappedFile
from nemotron_h.cli import _pages, doctor
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
    pages = facts["pages"]
    assert 0 <= pages["mapped_share"] <= 1
    assert 0 <= pages["anonymous_share"] <= 1
    assert (pages["why"] is None) == (pages["advice"] is None) == (pages["mapped_share"] >= ENOUGH)


def test_the_text(run, environment):
    outcome = run("doctor", "--no-measure")
    assert outcome.status == 0
    for words in ("not run on hardware", "rms_norm", "transformers", "torch", "threads", "AMX"):
        assert words in outcome.out
    assert "read at" not in outcome.out
    assert "huge pages" not in outcome.out


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


@pytest.mark.parametrize(
    ("lacking", "kernels", "said"),
    [
        ((), "instructions", "permitted"),
        (("amx_tile", "amx_int8", "amx_bf16", "amx_permission", "amx_works"), "instructions", "the CPU has none"),
        (("amx_permission", "amx_works"), "instructions", "present, but the system does not permit it"),
        (("amx_works",), "none", "install again with gcc 11"),
        (("amx_works", "amx_bf16"), "instructions", "also need amx_bf16"),
        (("amx_works",), "instructions", "products differ from other CPUs': not used"),
        (("amx_tile", "amx_permission"), "emulation", "a build for tests"),
    ],
)
def test_amx(lacking, kernels, said):
    names = ("avx2", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "amx_permission", "amx_works")
    assert said in doctor._amx({name: name not in lacking for name in names}, kernels)
    assert doctor._amx({}, "none") == "unknown without the kernels"


def test_amx_is_said_of_this_machine(run):
    cpu = run("doctor", "--no-measure", "--json").json["cpu"]
    assert cpu["amx"] == doctor._amx(cpu["features"], _native.tile_kernels())
    assert f"AMX           {cpu['amx']}\n" in run("doctor", "--no-measure").out


def test_the_shipped_model(run, monkeypatch, tmp_path, talker):
    monkeypatch.setattr(demo, "demo_model", lambda: tmp_path)
    assert run("doctor", "--no-measure", "--json").json["shipped_model"] == {"path": str(tmp_path), "present": False}
    shutil.copy(talker / "model.safetensors", tmp_path)
    assert run("doctor", "--no-measure", "--json").json["shipped_model"]["present"] is True


def told(run, *arguments):
    """What the text says of pages, on one or two lines."""
    lines = run("doctor", *arguments).out.splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("huge pages"))
    return "\n".join(lines[row : row + 1 + lines[row + 1].startswith(" ")])


def test_a_trial_leaves_no_file(run, monkeypatch, tmp_path):
    monkeypatch.setattr(_pages, "_directory", lambda: tmp_path)
    assert f", {tmp_path})" in told(run)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("usable", [True, False])
def test_the_trial_is_made_where_checkpoints_lie(monkeypatch, tmp_path, usable):
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    if usable:
        cache.mkdir()
    assert _pages._directory() == (cache if usable else tmp_path)


def test_no_room_for_a_trial(run, monkeypatch, tmp_path):
    monkeypatch.setattr(_pages, "_directory", lambda: tmp_path / "absent")
    words = told(run)
    assert "no file of 64 MiB could be written there (No such file or directory): make room" in words
    assert "%" not in words


@pytest.mark.parametrize(
    ("share", "anonymous", "enabled", "system", "shmem", "why", "advice"),
    [
        (0.96, 1.0, "always [madvise] never", "ext4", "[never]", None, None),
        (0.94, 1.0, "always [madvise] never", "btrfs", "[never]", "btrfs keeps files in small pages", "xfs, or ext4"),
        (0.0, 1.0, "always [madvise] never", None, "[never]", "the file system keeps files in small", "mmap=True"),
        (0.0, 0.0, "always madvise [never]", "ext4", "[never]", "/enabled is never", "echo madvise | sudo tee"),
        (0.0, 0.5, "[always] madvise never", "ext4", "[never]", "memory is in small pieces", "compact_memory"),
        (0.0, 1.0, "[always] madvise never", "tmpfs", "advise [never] deny", "shmem_enabled is never", "echo advise"),
        (0.0, 1.0, "[always] madvise never", "tmpfs", "[advise] never", "tmpfs keeps files in small", "mmap=True"),
        (0.0, 0.0, None, "ext4", None, "no transparent huge pages", "CONFIG_TRANSPARENT_HUGEPAGE"),
    ],
)
def test_why_pages_are_small(run, monkeypatch, tmp_path, share, anonymous, enabled, system, shmem, why, advice):
    if enabled is not None:
        (tmp_path / "thp").mkdir()
        (tmp_path / "thp" / "enabled").write_text(enabled)
        (tmp_path / "thp" / "shmem_enabled").write_text(shmem)
    monkeypatch.setattr(_pages, "_THP", tmp_path / "thp")
    monkeypatch.setattr(_pages, "_directory", lambda: tmp_path)
    monkeypatch.setattr(_pages, "file_system", lambda path: system)
    monkeypatch.setattr(_pages, "anonymous_share", lambda: anonymous)
    monkeypatch.setattr(MappedFile, "huge_share", lambda self: share)
    words = told(run)
    assert f"{100 * share:.0f} % of a mapped file" in words
    assert f"{100 * anonymous:.0f} % of other memory" in words
    if why is None:
        assert "\n" not in words
    else:
        assert why in words
        assert advice in words.split("\n")[1]


def test_huge_pages_switched_off_for_this_process():
    """PR_SET_THP_DISABLE in a child, which `doctor` itself then reports."""
    program = """
import ctypes, sys
from nemotron_h.cli import _pages
off = ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0
print(off == _pages._switched_off(), _pages.anonymous_share() == 0 or not off)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_pages_of_a_checkpoint(run, tmp_path, talker):
    model = tiny_model(vocab_size=60000, hidden_size=256, mamba_head_dim=16)
    model.quantize("int8")
    model.save_pretrained(tmp_path)
    pages = run("doctor", "--no-measure", "--model", tmp_path, "--json").json["pages"]
    assert pages["path"] == str(tmp_path)
    assert pages["mapped_share"] == pytest.approx(MappedFile(tmp_path / "model.safetensors").huge_share(), abs=0.1)
    assert (pages["why"] is None) == (pages["mapped_share"] >= ENOUGH)
    assert "its weights are not packed" in told(run, "--no-measure", "--model", talker)
    assert run("doctor", "--no-measure", "--model", tmp_path / "absent").status == 2


def test_a_checkpoint_too_small_for_huge_pages(run, tmp_path):
    model = tiny_model()
    model.quantize("int8")
    model.save_pretrained(tmp_path)
    assert "it is too small for pages of 2 MiB" in told(run, "--no-measure", "--model", tmp_path)
