"""`bench`, with real workers on tiny models."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import tiny_config
from nemotron_h import demo, family
from nemotron_h.benchmark import limits
from nemotron_h.cli import bench
from nemotron_h.ops import _native

QUICK = ("--tokens", "3", "--repeats", "2", "--threads", "1", "--prefill", "none", "--batches", "none")
SHAPE = {
    "hybrid_override_pattern": "ME*M",
    "hidden_size": 128,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "max_position_embeddings": 4096,
}


@pytest.fixture(autouse=True)
def small_set(monkeypatch):
    monkeypatch.setattr(limits, "SET_BYTES", 1 << 22)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "shape.json"
    tiny_config(**SHAPE).to_json_file(path)
    return path


def test_a_shape_beside_transformers(run, config_file, tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    table, picture = tmp_path / "speeds.csv", tmp_path / "speeds.png"
    outcome = run(
        "bench", config_file, "--peers", "transformers", "--context", "0,20", "--load", *QUICK,
        "--csv", table, "--png", picture, "--json",
    )  # fmt: skip
    assert outcome.status == 0
    facts = outcome.json
    engines = (("nemotron-h", "int4"), ("transformers", "bfloat16"))
    assert [(row["context"], row["engine"], row["format"]) for row in facts["decode"]] == [
        (context, *engine) for context in (0, 20) for engine in engines
    ]
    assert all(row["finite"] and len(row["rates"]) == 2 and min(row["rates"]) > 0 for row in facts["decode"])
    ours, theirs = facts["engines"]
    parameters = family.count(tiny_config(**SHAPE)).total
    biases = tiny_config().n_routed_experts  # float32 in both
    assert theirs["packed_bytes"] == 2 * parameters + 2 * biases
    assert 0 < ours["packed_bytes"] < theirs["packed_bytes"]
    assert all(engine["first_token_seconds"] > 0 and engine["peak_bytes"] > 1e8 for engine in facts["engines"])
    assert [engine["weights"] for engine in facts["engines"]] == ["loaded", "random"]
    assert list(temporary.iterdir()) == []
    assert facts["machine"]["threads"] == 1
    assert len(facts["machine"]["bandwidth"]) == 6
    with table.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 6
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "transformers: reading 20 tokens" in outcome.err


def test_prompts_and_batches(run, config_file):
    outcome = run(
        "bench", config_file, "--peers", "transformers", "--context", "0", "--tokens", "3", "--repeats", "2",
        "--threads", "1", "--prefill", "70,20", "--batches", "1,3", "--json",
    )  # fmt: skip
    assert outcome.status == 0
    facts = outcome.json
    names = ("nemotron-h", "transformers")
    for measure, size, wanted in (
        ("prefill", "prompt", (20, 70)),
        ("batch", "sequences", (1, 3)),
        ("verify", "step", (4,)),
    ):
        assert [(row["engine"], row[size]) for row in facts[measure]] == [(name, n) for n in wanted for name in names]
        assert all(row["finite"] and len(row["rates"]) == 2 and min(row["rates"]) > 0 for row in facts[measure])
    assert facts["left_out"] == []
    assert facts["bits"]["promised"] == bool(_native.levels())
    assert facts["bits"]["equal"] or not facts["bits"]["promised"], "only kernels promise them"
    assert set(facts["machine"]["peaks"]) == (set(limits.PEAKS) if _native.levels() else set())


def test_stored_weights_and_paths(run, mute, monkeypatch):
    """The shipped model's place is taken by a smaller one."""
    monkeypatch.setattr(demo, "demo_model", lambda: mute)
    outcome = run("bench", "--check-paths", "--context", "0", *QUICK)
    assert outcome.status in (0, 1)  # tiny steps, so any one of them may be late
    for words in (str(mute), "float32", "loaded", "of bandwidth", "LLM.generate", "GB/s read with 2 MiB pages"):
        assert words in outcome.out
    assert ("NOT within" in outcome.out) == (outcome.status == 1)


@pytest.mark.parametrize(("agree", "status"), [(True, 0), (False, 1)])
def test_status_says_whether_the_paths_agree(run, monkeypatch, agree, status):
    from nemotron_h import benchmark

    rates = {"step": 100.0, "model.generate": 99.0 if agree else 50.0}

    def fake(subject, options, progress):
        assert options.check_paths
        machine = benchmark.Machine("c", 1, 1, 1, "s", "v", None, "d", 0.0, [1.0])
        decode = [benchmark.Row("decode", "nemotron-h", "int4", 0, [1.0], 1, 1, "int8")]
        facts = [benchmark.EngineFacts("nemotron-h", "int4", "v", "random", 1.0, 1, 1)]
        return benchmark.Report("m", "M", 1, machine, facts, decode, [], benchmark.Paths(rates))

    monkeypatch.setattr(benchmark, "run", fake)
    assert run("bench", "nano-slice", "--check-paths").status == status


def test_what_is_measured(mute, config_file, tmp_path, monkeypatch):
    """Formats by default: int4 for shapes, the stored one for weights."""
    slice_ = bench._subject("nano-slice", None)
    assert (slice_.name, slice_.path, slice_.quantization) == ("nano-slice", None, "int4")
    assert family.count(family.describe(slice_.config)).total > 1e9
    assert bench._subject("nemotron-h-4b", "none").quantization is None
    assert bench._subject(str(config_file), "int8").quantization == "int8"
    assert bench._subject("nano-slice", "bf16").quantization == "bf16"
    stored = bench._subject(str(mute), None)
    assert (stored.path, stored.quantization) == (str(mute), None)
    assert bench._subject(None, None).path == str(demo.demo_model())
    monkeypatch.chdir(tmp_path)
    os.symlink(mute, "nano-slice")
    assert bench._subject("nano-slice", None).path == "nano-slice", "a path is never taken for a shape"


@pytest.mark.parametrize(("arguments", "words"), [
    (["nano-slize"], "nano-slize"),
    (["nano-slice", "--quantization", "int3"], "--quantization int3: must be one of int4, int8, bf16, none"),
    (["nano-slice", "--context", "0,many"], "--context 0,many"),
    (["nano-slice", "--context", "-1"], "--context -1"),
    (["nano-slice", "--context", "none"], "--context"),
    (["nano-slice", "--prefill", "1,x"], "--prefill 1,x"),
    (["nano-slice", "--batches", "0"], "--batches 0"),
    (["nano-slice", "--limit", "0"], "--limit 0"),
    (["nano-slice", "--peers", "vllm"], "--peers vllm"),
    (["nano-slice", "--tokens", "0"], "--tokens 0"),
    (["nano-slice", "--csv", "/nowhere/x.csv"], "--csv /nowhere/x.csv"),
    (["nano-slice", "--png", "/nowhere/x.png"], "--png /nowhere/x.png"),
    (["nano-slice", "--peers", "llama.cpp", "--llama-python", "/nowhere/python"], "pip install"),
    (["nemotron-3-puzzle-75b-a9b"], "block_configs"),
])  # fmt: skip
def test_wrong_use(run, arguments, words):
    outcome = run("bench", *arguments)
    assert outcome.status == 2
    assert words in outcome.error
    assert outcome.out == ""


def test_without_matplotlib(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = run("bench", "nano-slice", "--png", tmp_path / "a.png")
    assert outcome.status == 2
    assert "pip install 'nemotron-h[plot]'" in outcome.error


def test_a_damaged_checkpoint(run, mute, tmp_path):
    for file in mute.iterdir():
        os.link(file, tmp_path / file.name)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 64)
    outcome = run("bench", tmp_path, "--context", "0", *QUICK)
    assert outcome.status == 2
    assert outcome.error.startswith("error: nemotron-h: ")


def children(pid):
    """Processes that `pid` started and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c(config_file, tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = ["bench", config_file, "--quantization", "none", "--context", "0", "--tokens", "100000000", "--load"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nemotron_h", *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"TMPDIR": str(temporary)},
    )  # fmt: skip
    assert process.stderr is not None
    while b"writing random weights" not in process.stderr.readline():
        assert process.poll() is None
    workers = children(process.pid)
    assert workers
    assert list(temporary.iterdir())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == (b"", b"error: interrupted\n")
    assert list(temporary.iterdir()) == []
    deadline = time.monotonic() + 30
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, workers))
