"""Rounds: who decodes when, what is reported, and what happens where memory or an engine is missing."""

import contextlib
import ctypes
import dataclasses
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import tiny_config
from nemotron_h import __version__, family
from nemotron_h.benchmark import LeftOut, Options, Subject, engines, limits, rounds, run
from nemotron_h.benchmark.report import csv_rows, notes, tables
from nemotron_h.errors import ConfigError, InputError, NemotronHError
from nemotron_h.ops import _native

run_module = sys.modules[run.__module__]
PLAIN = {"prompts": (), "sequences": ()}

GB = 10**9
PEERS = ("llama.cpp", "transformers")
SHAPE = {"hidden_size": 64, "hybrid_override_pattern": "ME*EM", "moe_intermediate_size": 96}
SHAPE |= {"moe_latent_size": None, "moe_shared_expert_intermediate_size": 128, "head_dim": 16}
SHAPE |= {"mamba_num_heads": 4, "mamba_head_dim": 16, "max_position_embeddings": 100_000}


class FakeWorker:
    """Answers at once; every engine is as fast as `speed` says, one tok/s faster in each round."""

    log: list = []  # noqa: RUF012 (emptied by the fixture)
    alive: set = set()  # noqa: RUF012
    speed = {"nemotron-h": 100.0, "llama.cpp": 50.0, "transformers": 10.0}  # noqa: RUF012
    finite = True
    broken = None
    equal = True
    most = 0

    def __init__(self, name, python, program, threads):
        self.name, self.rounds = name, 0
        self.log.append((name, "start", program, threads))
        self.alive.add(name)
        type(self).most = max(self.most, len(self.alive))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.alive.discard(self.name)
        self.log.append((self.name, "end"))

    def ask(self, action, **arguments):
        self.log.append((self.name, action, arguments))
        if self.broken == (self.name, action):
            raise NemotronHError("broken")
        answer = {"peak_bytes": 7}
        if action == "load":
            answer |= {"seconds": 1.5, "weight_bytes": 5, "version": "9"}
        tokens = arguments.get("steps", 1) * arguments.get("tokens", 1)
        if action == "together":
            tokens *= self.sequences
        if action == "gather":
            self.sequences = arguments["sequences"]
        if action in ("decode", "verify", "prefill", "together"):
            seconds = tokens / (self.speed[self.name] + self.rounds)
            answer |= {"tokens": tokens, "seconds": seconds, "finite": self.finite}
            self.rounds += 1
        if action == "check_bits":
            answer |= {"compared": {"a": 9}, "differing": {"a": 0 if self.equal else 1}, "rounding": [7, 2]}
            answer |= {"promised": True}
        if action == "compare_paths":
            answer |= {"tokens_per_second": {"step": 100.0, "model.generate": 86.0, "LLM.generate": 99.0}}
        return answer


@pytest.fixture
def worker(monkeypatch):
    """Engines without processes, a machine with 100 GB and a meter that says 1, 2, 3 ... GB/s."""
    fake = type("Fake", (FakeWorker,), {"log": [], "alive": set(), "most": 0})
    monkeypatch.setattr(rounds, "Worker", fake)
    monkeypatch.setattr(engines, "Worker", fake)
    monkeypatch.setattr(engines.llama_cpp, "check_installed", lambda python: None)
    monkeypatch.setattr(limits, "available_memory", lambda: 100 * GB)
    monkeypatch.setattr(limits, "ReadBandwidth", Meter)
    monkeypatch.setattr(limits, "peaks", lambda threads: {"int8": 2e12 * threads, "bf16": 1e12 * Meter.measured})
    monkeypatch.setattr(rounds, "_REST", 0)
    Meter.measured = 0
    return fake


class Meter:
    measured = 0

    def __init__(self, threads, size):
        assert size >= 1 << 30

    def measure(self):
        Meter.measured += 1
        return Meter.measured * 1e9

    def close(self):
        Meter.measured = -1


@pytest.fixture
def subject():
    return Subject("tiny", tiny_config(**SHAPE).to_dict(), None, "int4")


def asked(worker, *actions):
    return [(entry[0], *entry[1:]) for entry in worker.log if entry[1] in actions]


def test_turns(worker, subject):
    report = run(subject, Options((64, 0, 64), tokens=10, repeats=3, threads=2, peers=PEERS, **PLAIN))
    assert [entry[0] for entry in asked(worker, "load")] == ["nemotron-h", "llama.cpp", "transformers"]
    assert [(entry[0], entry[2]["context"]) for entry in asked(worker, "fill")] == [
        (name, context) for context in (0, 64, 0) for name in ("nemotron-h", "llama.cpp", "transformers")
    ]
    turns = [entry[0][0] for entry in asked(worker, "decode") if entry[2]["tokens"] == 10]
    assert "".join(turns) == 2 * ("nlt" + "tln" + "nlt")
    assert worker.most == 3
    assert not worker.alive
    assert Meter.measured == -1
    assert report.machine.bandwidth == [GB * n for n in range(2, 11)]  # the first one was to warm up
    assert report.machine.read_bytes_per_second == 6 * GB
    assert report.machine.peaks == {"int8": [4e12] * 9, "bf16": [1e12 * n for n in range(2, 11)]}
    assert (report.machine.peak("int8"), report.machine.peak("bf16")) == (4e12, 6e12)
    assert report.machine.peak("float32") is None


def test_what_is_reported(worker, subject):
    report = run(subject, Options((0, 64), tokens=10, repeats=3, threads=2, peers=PEERS, **PLAIN))
    decode, machine = report.of("decode"), report.machine
    spec = family.describe(subject.config)
    assert (report.model, report.pattern, report.parameters) == ("tiny", "ME*EM", family.count(spec).total)
    assert report.machine.version == __version__
    assert report.machine.threads == 2
    assert [(row.size, row.engine, row.format) for row in decode] == [
        (context, *engine)
        for context in (0, 64)
        for engine in (("nemotron-h", "int4"), ("llama.cpp", "Q4_0"), ("transformers", "bfloat16"))
    ]
    first = decode[0]
    assert first.rates == pytest.approx([100, 101, 102])
    assert first.tokens_per_second == pytest.approx(101)
    bits = {"nemotron-h": (8 * family.DTYPE_BYTES["int4"], 2), "llama.cpp": (4.5, 4), "transformers": (16, 2)}
    for row in decode:
        reads = family.decode_reads(spec, *bits[row.engine], row.size)
        assert row.bytes_per_token == reads.total
        assert row.bytes_per_second == pytest.approx(reads.total * statistics.median(row.rates))
        assert row.share_of_bandwidth(machine) == pytest.approx(row.bytes_per_second / machine.read_bytes_per_second)
        assert row.operations_per_token == family.operations(spec, 1, context=row.size).total
        assert row.arithmetic == ("bf16" if row.engine == "transformers" else "int8")
        share = row.operations_per_token * row.tokens_per_second / machine.peak(row.arithmetic)
        assert row.share_of_peak(machine) == pytest.approx(share)
    assert {(e.version, e.first_token_seconds, e.packed_bytes, e.peak_bytes) for e in report.engines} == {
        ("9", 1.5, 5, 7)
    }
    assert [engine.weights for engine in report.engines] == ["random", "loaded", "random"]
    assert [(r["peer"], r["context"], round(r["ratio"], 2)) for r in report.ratios if r["measure"] == "decode"] == [
        ("llama.cpp", 0, 1.98), ("transformers", 0, 9.18), ("llama.cpp", 64, 1.93), ("transformers", 64, 7.43)
    ]  # fmt: skip
    assert report.paths is None


def test_prompts_and_batches(worker, subject):
    options = Options((8,), tokens=10, repeats=2, threads=2, peers=PEERS, prompts=(600, 200), sequences=(4, 1))
    report = run(subject, options)
    names = ("nemotron-h", "llama.cpp", "transformers")
    assert [(row.measure, row.size, row.engine) for row in report.rows] == [
        (*work, name)
        for work in (("decode", 8), ("verify", 4), ("prefill", 200), ("prefill", 600), ("batch", 1), ("batch", 4))
        for name in names
    ]
    prompts = [(entry[0], entry[2]["tokens"]) for entry in asked(worker, "prefill")]
    turns = [*names, *reversed(names)]
    measured = [(name, 128) for name in names] + [(name, 200) for name in turns] + [(n, 600) for n in turns]
    assert prompts == measured + [(name, 1) for name in names], "the last from the start: a context may be full"
    assert {tuple(entry[2].items()) for entry in asked(worker, "verify")} == {(("steps", 3), ("tokens", 4))}
    gathered = [(entry[0], *entry[2].values()) for entry in asked(worker, "gather")]
    assert gathered == [(name, count, 2 * (1 + 10)) for count in (1, 4) for name in names]
    assert [entry[0] for entry in asked(worker, "together")] == turns + turns
    assert asked(worker, "load")[1][2]["context"] == 768, "llama.cpp is asked for room for the longest prompt"


def test_the_arithmetic_of_each_kind_of_work(worker, subject):
    options = Options((8,), tokens=10, repeats=2, threads=2, prompts=(200,), sequences=(3,))
    report = run(subject, options)
    spec, bits = family.describe(subject.config), 8 * family.DTYPE_BYTES["int4"]
    for row, tokens, sequences, context, logits in zip(
        report.rows, (1, 4, 200, 1), (1, 1, 1, 3), (8, 8, 0, 0), (1, 4, 1, 1), strict=True
    ):
        reads = family.decode_reads(spec, bits, 2, context, tokens=tokens, sequences=sequences)
        done = family.operations(spec, tokens, sequences, context, logits)
        assert row.bytes_per_token == pytest.approx(reads.total / (tokens * sequences)), row.measure
        assert row.operations_per_token == pytest.approx(done.total / (tokens * sequences)), row.measure
        by_memory = report.machine.read_bytes_per_second / row.bytes_per_token
        assert row.limit(report.machine) == pytest.approx(min(by_memory, 4e12 / row.operations_per_token))
    batch = report.of("batch")[0]
    assert batch.tokens_per_second == pytest.approx(statistics.mean(batch.rates))
    assert 100 < min(batch.rates) < max(batch.rates) < 120, "the tokens of all sequences count"


def test_prompts_that_would_take_too_long(worker, subject):
    """1000, 50 and 10 tok/s at first, one more in every round: 600 tokens take llama.cpp ten seconds."""
    worker.speed = {"nemotron-h": 1000.0, "llama.cpp": 50.0, "transformers": 10.0}
    options = Options((0,), tokens=1, repeats=4, peers=PEERS, prompts=(200, 600), sequences=(), limit=21)
    said = []
    report = run(subject, options, said.append)
    counts = {(row.engine, row.size): len(row.rates) for row in report.of("prefill")}
    assert counts == {
        ("nemotron-h", 200): 4, ("nemotron-h", 600): 4, ("llama.cpp", 200): 4, ("llama.cpp", 600): 2,
        ("transformers", 200): 1,
    }  # fmt: skip
    assert [(left.measure, left.engine, left.size) for left in report.left_out] == [("prefill", "transformers", 600)]
    assert isinstance(report.left_out[0], LeftOut)
    rate = report.of("prefill")[2].tokens_per_second
    assert report.left_out[0].seconds == pytest.approx(600 / rate)
    assert any("600 tokens left out: would take" in line for line in said)


def test_a_prompt_that_every_engine_is_spared(worker, subject):
    report = run(subject, Options((0,), tokens=1, repeats=2, prompts=(2000,), sequences=(), limit=1e-3))
    assert not report.of("prefill")
    assert [left.size for left in report.left_out] == [2000]


def test_prompts_by_default(worker, subject):
    def prompts(length, options):
        config = subject.config | {"max_position_embeddings": length}
        return [row.size for row in run(dataclasses.replace(subject, config=config), options).of("prefill")]

    few = {"tokens": 1, "repeats": 1, "sequences": ()}
    assert prompts(100_000, Options((0,), **few)) == [512, 2048]
    assert prompts(2047, Options((0,), **few)) == [512]
    assert prompts(600, Options((0,), prompts=(600, 10, 10), **few)) == [10, 600]
    with pytest.raises(InputError, match="--prefill 601: the model's longest is 600"):
        prompts(600, Options((0,), prompts=(601, 10), **few))


def test_bits(worker, subject):
    report = run(subject, Options((0,), tokens=1, repeats=1, peers=PEERS, **PLAIN))
    assert [(name, arguments) for name, _, arguments in asked(worker, "check_bits")] == [
        ("nemotron-h", {"tokens": 150, "sequences": 16})
    ]
    assert report.bits.equal
    assert report.good
    worker.equal = False
    report = run(subject, Options((0,), tokens=1, repeats=1, **PLAIN))
    assert not report.good
    unpromised = dataclasses.replace(report.bits, promised=False)
    assert dataclasses.replace(report, bits=unpromised).good
    short = dataclasses.replace(subject, config=subject.config | {"max_position_embeddings": 40})
    worker.log.clear()
    run(short, Options((0,), tokens=1, repeats=1, **PLAIN))
    assert asked(worker, "check_bits")[0][2]["tokens"] == 40


def test_memory_for_batches_and_prompts(subject):
    spec = family.describe(subject.config)
    cache = family.cache_bytes(spec, "bfloat16")

    def caches(**options):
        return run_module._caches(spec, run_module._plan(spec, Options((64,), **options)))

    assert caches(**PLAIN) == cache.fixed + 64 * cache.per_token
    assert caches(prompts=(), sequences=(1, 9)) == 10 * cache.fixed + 64 * cache.per_token
    assert caches(prompts=(500,), sequences=()) == cache.fixed + 500 * cache.per_token + run_module._PASS_BYTES


def test_requests(worker, subject):
    run(subject, Options((0, 1000), tokens=10, repeats=3, threads=2, peers=PEERS, **PLAIN))
    requests = {name: arguments for name, _, arguments in asked(worker, "load")}
    assert requests["nemotron-h"] == {"config": subject.config, "path": None, "quantization": "int4", "threads": 2}
    assert requests["transformers"] == {"config": subject.config, "threads": 2}
    llama = requests["llama.cpp"]
    assert llama["context"] >= 1000 + 3 * (10 + 2) + 4 + 1
    assert llama["context"] % 256 == 0
    assert (llama["vocab"], llama["threads"]) == (50, 2)
    assert {entry[3] for entry in worker.log if entry[1] == "start"} == {2}


def test_stored_weights(worker, subject):
    stored = Subject("dir", subject.config | {"dtype": "float32"}, "/some/dir", None)
    report = run(stored, Options((0,), tokens=2, repeats=1))
    assert report.engines[0].weights == "loaded"
    assert report.rows[0].format == "float32"
    reads = family.decode_reads(family.describe(subject.config), 32, 4, 0)
    assert report.rows[0].bytes_per_token == reads.total
    assert report.rows[0].arithmetic == "float32"
    assert asked(worker, "load")[0][2] | {"threads": 0} == {
        "config": None, "path": "/some/dir", "quantization": None, "threads": 0
    }  # fmt: skip


def test_bfloat16_against_bfloat16(worker, subject):
    """Packed or not, every engine reads two bytes a weight."""
    report = run(dataclasses.replace(subject, quantization="bf16"), Options((0,), tokens=2, repeats=1, peers=PEERS))
    formats = {row.engine: row.format for row in report.rows}
    assert formats == {"nemotron-h": "bf16", "llama.cpp": "BF16", "transformers": "bfloat16"}
    reads = {row.engine: row.bytes_per_token for row in report.of("decode")}
    expected = family.decode_reads(family.describe(subject.config), 16, 2, 0).total
    assert reads["nemotron-h"] == reads["transformers"] == expected


def test_packed_checkpoints_say_what_they_are(worker, subject):
    config = subject.config | {"quantization_config": {"quant_method": "nemotron_h", "format": "int8"}}
    report = run(Subject("dir", config, "/some/dir", None), Options((0,), tokens=2, repeats=1))
    bits = 8 * family.DTYPE_BYTES["int8"]
    assert report.rows[0].format == "int8"
    assert report.rows[0].bytes_per_token == family.decode_reads(family.describe(config), bits, 2, 0).total


def test_a_tied_head_is_read_as_it_is_stored(worker, subject):
    config = subject.config | {"tie_word_embeddings": True}
    report = run(Subject("tied", config, None, "int4"), Options((0,), tokens=2, repeats=1))
    bits = 8 * family.DTYPE_BYTES["int4"]
    reads = family.decode_reads(family.describe(config), bits, 2, 0, head_bits=16)
    assert report.rows[0].bytes_per_token == reads.total


def test_loading_random_weights_from_files(worker, subject):
    report = run(subject, Options((0,), tokens=2, repeats=1, threads=1, load=True))
    (_, _, written), (_, _, loaded) = asked(worker, "write")[0], asked(worker, "load")[0]
    assert written["config"] == subject.config
    assert written["quantization"] == loaded["quantization"] == "int4"
    assert written["directory"] == loaded["path"]
    assert loaded["config"] is None
    assert report.engines[0].weights == "loaded"
    order = [entry[1] for entry in worker.log if entry[0] == "nemotron-h"]
    assert order.index("end") < order.index("load"), "the writer's memory is given back first"


def test_one_after_the_other_where_memory_is_short(worker, subject, monkeypatch):
    each = engines.needed(engines.transformers(subject, family.describe(subject.config), "", 1), 0)
    monkeypatch.setattr(limits, "available_memory", lambda: limits.SET_BYTES + int(2.5 * each))
    said = []
    report = run(subject, Options((0, 64), tokens=10, repeats=2, peers=PEERS, **PLAIN), said.append)
    assert worker.most == 1
    assert any("one after the other" in line for line in said)
    assert [(row.size, row.engine) for row in report.of("decode")] == [
        (context, name) for context in (0, 64) for name in ("nemotron-h", "llama.cpp", "transformers")
    ]
    assert [engine.name for engine in report.engines] == ["nemotron-h", "llama.cpp", "transformers"]


def test_a_peer_that_does_not_fit_is_left_out(worker, monkeypatch):
    big = Subject("big", family.preset("nemotron-3-nano-30b-a3b"), None, "int4")
    monkeypatch.setattr(limits, "available_memory", lambda: 24 * GB)
    report = run(big, Options((0,), tokens=1, repeats=1, peers=("transformers",), **PLAIN))
    assert [engine.name for engine in report.engines] == ["nemotron-h", "transformers"]
    assert "of memory, 22.9 GB are free" in report.engines[1].skipped
    assert report.engines[1].format == "bfloat16"
    assert {row.engine for row in report.rows} == {"nemotron-h"}
    assert [entry[0] for entry in worker.log if entry[1] == "start"] == ["nemotron-h"]


def test_our_model_must_fit(worker, monkeypatch):
    big = Subject("big", family.preset("nemotron-3-nano-30b-a3b"), None, "int4")
    monkeypatch.setattr(limits, "available_memory", lambda: 16 * GB)
    with pytest.raises(InputError, match=r"int4: it needs about .* GB of memory, 14.9 GB are free"):
        run(big, Options((0,), **PLAIN))
    assert worker.log == []


def test_disk_must_have_room(worker, subject, monkeypatch):
    monkeypatch.setattr(limits, "free_disk", lambda directory: 1000)
    for options in (Options((0,), peers=("llama.cpp",)), Options((0,), load=True)):
        with pytest.raises(InputError, match="TMPDIR"):
            run(subject, options)
        assert not worker.alive


def test_failures_end_every_worker(worker, subject):
    for broken in (("transformers", "load"), ("nemotron-h", "fill"), ("nemotron-h", "decode")):
        worker.broken = broken
        with pytest.raises(NemotronHError, match="broken"):
            run(subject, Options((0,), peers=PEERS))
        assert not worker.alive
        assert Meter.measured == -1


@pytest.mark.parametrize(
    ("action", "measured"),
    [
        ("fill", []),
        ("verify", ["decode"]),
        ("prefill", ["decode", "verify"]),
        ("gather", ["decode", "verify", "prefill"]),
        ("together", ["decode", "verify", "prefill"]),
    ],
)
def test_a_peer_that_fails_keeps_its_figures(worker, subject, action, measured):
    worker.broken = ("llama.cpp", action)
    report = run(subject, Options((0,), tokens=5, repeats=2, peers=PEERS, prompts=(200,), sequences=(4,)))
    for name in ("nemotron-h", "transformers"):
        assert [row.measure for row in report.rows if row.engine == name] == ["decode", "verify", "prefill", "batch"]
    assert [row.measure for row in report.rows if row.engine == "llama.cpp"] == measured
    assert [engine.failed for engine in report.engines] == [None, "broken", None]
    assert not report.good, "a script must see it"
    assert "llama.cpp failed: broken; the figures before that stay" in notes(report)
    assert [line[0] for line in tables(report)[-1]] == ["engine", "nemotron-h", "transformers"]
    assert len(csv_rows(report)) == len(report.rows)
    assert [entry for entry in worker.log if entry[0] == "llama.cpp"][-2][1] == action, "it is asked nothing more"


def test_an_interrupt_ends_every_worker(worker, subject, monkeypatch, tmp_path):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(engines.llama_cpp, "write_random", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(subject, Options((0,), peers=PEERS))
    assert not worker.alive
    assert list(tmp_path.iterdir()) == []


def test_files_are_gone_while_it_runs(worker, subject, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = {}

    class Watching(worker):
        def ask(self, action, **arguments):
            seen.setdefault((self.name, action), [path for path in tmp_path.rglob("*") if path.is_file()])
            return super().ask(action, **arguments)

    monkeypatch.setattr(rounds, "Worker", Watching)
    run(subject, Options((0,), tokens=1, repeats=1, peers=PEERS))
    assert len(seen["llama.cpp", "load"]) == 1
    assert seen["llama.cpp", "decode"] == seen["transformers", "load"] == []
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_finite(worker, subject):
    worker.finite = False
    assert not any(row.finite for row in run(subject, Options((0,), peers=PEERS)).rows)


def test_paths(worker, subject):
    report = run(subject, Options((0,), tokens=10, repeats=3, peers=PEERS, check_paths=True))
    assert [(name, arguments) for name, _, arguments in asked(worker, "compare_paths")] == [
        ("nemotron-h", {"tokens": 10, "repeats": 3})
    ]
    assert report.paths is not None
    assert report.paths.agree
    worse = dataclasses.replace(report.paths, tokens_per_second={"a": 100.0, "b": 84.9, "c": 90.0})
    assert not worse.agree


def test_contexts(worker, subject):
    def contexts(length, options):
        worker.log.clear()
        run(dataclasses.replace(subject, config=subject.config | {"max_position_embeddings": length}), options)
        return [arguments["context"] for _, _, arguments in asked(worker, "fill")][:-1]  # the last one is verify's

    few = {"tokens": 1, "repeats": 1, **PLAIN}
    assert contexts(100_000, Options(**few)) == [0, 4096, 16384]
    assert contexts(16_384, Options(**few)) == [0, 4096]
    assert contexts(40, Options(tokens=100, **PLAIN)) == [0]
    assert contexts(8192, Options((8000,), **few)) == [8000]
    with pytest.raises(InputError, match="--context 8190: the model's longest is 8192"):
        contexts(8192, Options((0, 8190), **few))


def test_threads(worker, subject, monkeypatch):
    monkeypatch.setattr(limits, "allowed_cores", lambda: 5)
    assert run(subject, Options((0,))).machine.threads == 5
    assert run(subject, Options((0,), threads=3)).machine.threads == 3


@pytest.mark.parametrize(("wrong", "words"), [
    ({"tokens": 0}, "--tokens 0: must be at least 1"),
    ({"repeats": -1}, "--repeats -1"),
    ({"threads": 0}, "--threads 0"),
    ({"contexts": (0, -1)}, "--context 0,-1"),
    ({"contexts": ()}, "--context"),
    ({"prompts": (512, 0)}, "--prefill 512,0"),
    ({"sequences": (0,)}, "--batches 0"),
    ({"limit": 0}, "--limit 0"),
    ({"limit": float("nan")}, "--limit nan"),
    ({"peers": ("vllm",)}, "--peers vllm: must be among llama.cpp, transformers"),
])  # fmt: skip
def test_wrong_options(wrong, words):
    with pytest.raises(InputError, match=words):
        Options(**wrong)


def test_an_illegal_shape(worker, subject):
    with pytest.raises(ConfigError):
        run(dataclasses.replace(subject, config={"hidden_size": -1}), Options((0,)))


def test_bandwidth():
    meter = limits.ReadBandwidth(3, (8 << 20) + 5)
    assert 1e8 < meter.measure() < 1e13
    meter.close()
    with pytest.raises((ValueError, AttributeError)):
        meter.measure()


def test_peaks():
    """Of every arithmetic, with the threads asked for; the kernels' own number is left as it was."""
    before = _native.extension().threads() if _native.levels() else None
    for threads in (1, 2):
        found = limits.peaks(threads)
        assert set(found) == (set(limits.PEAKS) if _native.levels() else set())
        assert all(1e8 < peak < 1e15 for peak in found.values())
        if found:
            assert found["bf16"] >= found["float32"]
    assert before is None or _native.extension().threads() == before


def test_a_peak_is_the_best_of_some_runs(monkeypatch):
    asked = []

    def timed(kernels, sinks, kind, rounds):
        asked.append(rounds)
        return 1000.0 * rounds, rounds * (0.5e-5 if len(asked) == 4 else 1e-5)

    monkeypatch.setattr(limits, "_timed_peak", timed)
    assert limits._peak(None, None, 0) == pytest.approx(2e8)
    assert asked == [128, 256] + 4 * [256], "doubled until a run is long enough"


def test_every_thread_reads_its_part(monkeypatch):
    parts, size = [], 4 << 20

    # One reading takes a second, whoever reads: then all have read after as many seconds as there are parts.
    monkeypatch.setattr(limits, "read_memory", lambda start, count: parts.append((start, count)))
    monkeypatch.setattr(limits, "time", SimpleNamespace(perf_counter=lambda: len(parts)))
    with contextlib.closing(limits.ReadBandwidth(4, size)) as meter:
        measured = meter.measure()
    once = sorted(set(parts))
    assert [count for _, count in once] == [size // 4] * 4
    assert [start - once[0][0] for start, _ in once] == [0, size // 4, size // 2, 3 * size // 4]
    assert len(parts) == 4 * limits._PASSES
    assert measured == limits._PASSES * size / len(parts)


def test_the_memory_that_is_read():
    """Written, or every page would be the page of zeros; private, with huge pages asked for; memchr finds no one."""
    size = 8 << 20
    with contextlib.closing(limits.ReadBandwidth(1, size)) as meter:
        assert set(bytes(meter._bytes)) == {0}
        address = ctypes.addressof(meter._bytes)
        smaps = Path("/proc/self/smaps").read_text()
    for region in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps):
        first, last = (int(end, 16) for end in region.split(" ")[0].split("-"))
        if first <= address < last:
            assert region.split(" ")[1] == "rw-p"
            assert int(re.search(r"^Anonymous: *(\d+)", region, re.MULTILINE)[1]) >= size >> 10
            assert " hg" in re.search(r"^VmFlags:.*", region, re.MULTILINE)[0]
            return
    raise AssertionError("no such region")


def test_memory():
    assert 1 << 27 < limits.available_memory() <= limits.total_memory()
    assert limits.cpu_model()
    assert 1 <= limits.allowed_cores() <= 4096


def test_commit(monkeypatch):
    said = {"ls-files": "run.py", "describe": "abc1234+"}
    monkeypatch.setattr(run_module, "_git", lambda folder, command, *rest: said[command])
    assert run_module._commit() == "abc1234+"
    said["ls-files"] = None  # an environment inside somebody else's repository
    assert run_module._commit() is None
