"""The files for llama.cpp, read back by the gguf package, and the worker on a stand-in for llama_cpp."""

import json
import math
import os
import stat
import sys

import gguf
import numpy as np
import pytest

from helpers import tiny_config
from nemotron_h import family
from nemotron_h.benchmark import engines
from nemotron_h.benchmark.engines import Subject
from nemotron_h.benchmark.peers import llama_cpp
from nemotron_h.benchmark.peers.gguf_file import BF16, Q4_0, Entry, write
from nemotron_h.benchmark.process import Worker
from nemotron_h.benchmark.shapes import shape_config
from nemotron_h.errors import MissingDependencyError, NemotronHError, UnsupportedError

DENSE = {"hidden_size": 64, "hybrid_override_pattern": "M-*M-", "intermediate_size": [96, 160], "head_dim": 32}
DENSE |= {"mamba_num_heads": 8, "mamba_head_dim": 16}
SPARSE = DENSE | {"hybrid_override_pattern": "ME*EM", "intermediate_size": 96, "moe_intermediate_size": 96}
SPARSE |= {"moe_shared_expert_intermediate_size": 128, "moe_latent_size": None}
LATENT = SPARSE | {"moe_latent_size": 32, "num_nextn_predict_layers": 1}
SHAPES = {"dense": DENSE, "sparse": SPARSE, "latent": LATENT}


@pytest.fixture(params=SHAPES)
def config(request):
    return tiny_config(**SHAPES[request.param])


@pytest.fixture(params=["int4", "int8", None])
def quantization(request):
    return request.param


def read(path):
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def test_what_the_reader_finds(tmp_path, config, quantization):
    path = tmp_path / "random.gguf"
    size = llama_cpp.write_random(path, config, quantization, 4096)
    assert size == path.stat().st_size
    llama_cpp.check_shape(config, quantization)
    fields, tensors = read(path)
    arch = gguf.MODEL_ARCH.NEMOTRON_H_MOE if "moe" in config.layers_block_type else gguf.MODEL_ARCH.NEMOTRON_H
    name = gguf.MODEL_ARCH_NAMES[arch]
    assert fields["general.architecture"] == name
    assert fields["tokenizer.ggml.model"] == "no_vocab"
    assert fields[f"{name}.context_length"] == 4096
    assert fields[f"{name}.block_count"] == len(config.layers_block_type)
    assert_names(tensors, arch, len(config.layers_block_type))
    assert sum(int(t.n_bytes) for t in tensors.values()) == llama_cpp.file_bytes(config, quantization)
    assert_parameters(tensors, config)
    assert_values(tensors, quantization)


def assert_names(tensors, arch, blocks):
    """Every name is one of the architecture's, with the suffix that its loader asks for."""
    stems = {gguf.TENSOR_NAMES[kind].format(bid=i) for kind in gguf.MODEL_TENSORS[arch] for i in range(blocks)}
    bare = {f"blk.{i}.{leaf}" for i in range(blocks) for leaf in ("ssm_a", "ssm_d")}
    for name in tensors:
        stem, _, suffix = name.rpartition(".")
        assert (name in stems) if name in bare else (stem in stems and suffix in ("weight", "bias")), name


def assert_parameters(tensors, config):
    """The trunk of the checkpoint, weight for weight: stacked or split, their number is the same."""
    expected = sum(math.prod(shape) for name, shape in family.tensors(config) if not name.startswith("mtp."))
    assert sum(int(t.n_elements) for t in tensors.values()) == expected


def assert_values(tensors, quantization):
    encoding = llama_cpp.ENCODINGS[quantization]
    for name, tensor in tensors.items():
        matrix = len(tensor.shape) >= 2 and not any(
            part in name for part in ("ssm_conv1d", "ssm_norm", "ssm_a", "ssm_d.", "ssm_d", "ffn_gate_inp")
        )
        assert tensor.tensor_type.name == (encoding.name if matrix else "F32"), name
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all(), name
        if matrix:
            assert 0.015 < values.std() < 0.025, name
            assert abs(values.mean()) < 0.005, name
        elif name.endswith("ssm_a"):
            assert (values < 0).all()
        elif "norm" in name:
            assert (values == 1).all()
        elif "ffn_gate_inp" in name:
            assert values.std() > 0.01, "equal scores would send every token to the same experts"


def test_shapes_and_sizes(tmp_path):
    config = tiny_config(**LATENT)
    llama_cpp.write_random(tmp_path / "a.gguf", config, "int8", 512)
    fields, tensors = read(tmp_path / "a.gguf")
    wanted = {
        "feed_forward_length": [0, 96, 0, 96, 0],
        "attention.head_count_kv": [0, 0, 2, 0, 0],
        "attention.head_count": 4,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "embedding_length": 64,
        "vocab_size": 50,
        "ssm.inner_size": 128,
        "ssm.state_size": 16,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 8,
        "ssm.conv_kernel": 4,
        "expert_count": 8,
        "expert_used_count": 2,
        "expert_feed_forward_length": 96,
        "expert_shared_feed_forward_length": 128,
        "expert_shared_count": 1,
        "expert_weights_norm": True,
        "expert_weights_scale": 2.5,
        "moe_latent_size": 32,
    }
    assert {key: fields[f"nemotron_h_moe.{key}"] for key in wanted} == wanted
    fastest_first = {
        "token_embd.weight": [64, 50],
        "output.weight": [64, 50],
        "blk.0.ssm_in.weight": [64, 128 + 128 + 2 * 2 * 16 + 8],
        "blk.0.ssm_conv1d.weight": [4, 128 + 2 * 2 * 16],
        "blk.0.ssm_a": [1, 8],
        "blk.0.ssm_norm.weight": [64, 2],
        "blk.0.ssm_out.weight": [128, 64],
        "blk.1.ffn_up_exps.weight": [32, 96, 8],
        "blk.1.ffn_down_exps.weight": [96, 32, 8],
        "blk.1.ffn_latent_down.weight": [64, 32],
        "blk.1.ffn_latent_up.weight": [32, 64],
        "blk.1.ffn_up_shexp.weight": [64, 128],
        "blk.2.attn_q.weight": [64, 128],
        "blk.2.attn_v.weight": [64, 64],
        "blk.2.attn_output.weight": [128, 64],
    }
    assert {name: list(tensors[name].shape) for name in fastest_first} == fastest_first


def test_dense_layers_have_their_own_widths(tmp_path):
    llama_cpp.write_random(tmp_path / "a.gguf", tiny_config(**DENSE), None, 512)
    fields, tensors = read(tmp_path / "a.gguf")
    assert fields["nemotron_h.feed_forward_length"] == [0, 96, 0, 0, 160]
    assert list(tensors["blk.4.ffn_down.weight"].shape) == [160, 64]


def test_neighbours_differ(tmp_path):
    """The chunk of random blocks is used again, but not from its start on for every tensor."""
    llama_cpp.write_random(tmp_path / "a.gguf", tiny_config(**SPARSE), "int4", 512)
    data = [t.data.tobytes() for t in read(tmp_path / "a.gguf")[1].values() if t.tensor_type.name == "Q4_0"]
    assert len({piece[:200] for piece in data}) == len(data)


def test_a_tensor_longer_than_the_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "_CHUNK", 7)
    config = tiny_config(**SPARSE)
    size = llama_cpp.write_random(tmp_path / "a.gguf", config, "int4", 512)
    _, tensors = read(tmp_path / "a.gguf")
    assert size > llama_cpp.file_bytes(config, "int4")
    for tensor in tensors.values():
        assert np.isfinite(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).all()


def test_writing_checks_the_producer(tmp_path):
    with pytest.raises(AssertionError, match="x: 3 of 4 bytes"):
        write(tmp_path / "a.gguf", {}, [Entry("x", (2,), BF16)], lambda _: [b"123"])
    with pytest.raises(UnsupportedError, match=r"x: rows of 33 weights; Q4_0 needs multiples of 32"):
        Entry("x", (2, 33), Q4_0).nbytes  # noqa: B018


@pytest.mark.parametrize(("changes", "words"), [
    ({"hybrid_override_pattern": "ME-*"}, "both mlp and moe"),
    ({"n_shared_experts": 0}, "a shared one"),
    ({"hidden_size": 48}, "rows of 48 weights; Q4_0 needs multiples of 32"),
])  # fmt: skip
def test_shapes_that_it_cannot_run(changes, words):
    with pytest.raises(UnsupportedError, match=words):
        llama_cpp.check_shape(tiny_config(**(SPARSE | {"intermediate_size": 96} | changes)), "int4")


def test_the_big_shapes_are_fit_for_it():
    for name in ("nano-slice", "dense-slice", "nano-30b"):
        spec = family.describe(shape_config(name))
        for quantization in llama_cpp.ENCODINGS:
            llama_cpp.check_shape(spec, quantization)
        assert (
            llama_cpp.file_bytes(spec, None) > llama_cpp.file_bytes(spec, "int8") > llama_cpp.file_bytes(spec, "int4")
        )
        assert 0.56 < llama_cpp.file_bytes(spec, "int4") / family.count(spec).total < 0.57


STAND_IN = """
import ctypes, json, os
__version__ = "0.0.1"
calls = []
class Params:
    pass
class Batch:
    def __init__(self, size, width):
        self.n_tokens, self.token, self.pos, self.n_seq_id = 0, [-1] * size, [-1] * size, [0] * size
        self.seq_id, self.logits = [[-1] * width for _ in range(size)], [None] * size
def note(*call):
    with open(os.environ["STAND_IN_LOG"], "a") as log:
        log.write(json.dumps(call) + "\\n")
def llama_backend_init(): pass
def llama_model_default_params(): return Params()
def llama_context_default_params(): return Params()
def llama_model_load_from_file(path, params):
    with open(path, "rb") as file:
        note("load", file.read(4).decode())
    return "" if os.environ.get("STAND_IN_REFUSES") else "model"
def llama_init_from_model(model, params):
    note("init", params.n_ctx, params.n_seq_max, params.n_threads, params.n_threads_batch)
    return "context of %d" % params.n_seq_max
def llama_model_size(model): return 1234
def llama_batch_init(size, embd, width): return Batch(size, width)
def llama_batch_free(batch): note("free", "batch")
def llama_free(context): note("free", context)
def llama_decode(context, batch):
    n = batch.n_tokens
    assert all(0 <= i < 50 for i in batch.token[:n]) and all(i == 1 for i in batch.n_seq_id[:n])
    note("decode", n)
    if os.environ.get("STAND_IN_ROWS"):
        rows = zip(batch.seq_id[:n], batch.pos[:n], batch.logits[:n])
        note("rows", *((s[0], p, bool(l)) for s, p, l in rows))
    return int(os.environ.get("STAND_IN_STATUS", "0"))
def llama_synchronize(context): note("synchronize")
def llama_get_memory(context): return "memory"
def llama_memory_clear(memory, data): note("clear", memory, data)
def llama_get_logits(context): return (ctypes.c_float * 50)(*[float(os.environ.get("STAND_IN_LOGIT", "1"))] * 50)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A Python that has a llama_cpp; its calls are logged."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "llama_cpp.py").write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "log"))
    return str(python)


def log(tmp_path):
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def test_the_worker(stand_in, tmp_path):
    path = tmp_path / "a.gguf"
    llama_cpp.write_random(path, tiny_config(**SPARSE), "int4", 2048)
    with Worker("llama.cpp", stand_in, llama_cpp.PROGRAM, 2) as worker:
        loaded = worker.ask("load", path=str(path), vocab=50, context=2048, threads=2)
        assert loaded["version"] == "0.0.1"
        assert loaded["weight_bytes"] == 1234
        assert loaded["seconds"] > 0
        worker.ask("fill", context=0)
        assert worker.ask("decode", tokens=3)["finite"] is True
        worker.ask("fill", context=1200)
        worker.ask("fill", context=600)
        calls = [call for call in log(tmp_path) if call[0] != "synchronize"]
    ones = ["decode", 1]
    assert calls[:3] == [["load", "GGUF"], ["init", 2048, 1, 2, 2], ones]
    assert calls[3:13] == [["clear", "memory", True], *[ones] * 4, *[ones] * (1 + 3), ["decode", 512]]
    assert calls[13:20] == [["decode", 512], ["decode", 1200 - 8 - 1024], *[ones] * 4, ["clear", "memory", True]]
    assert calls[20:] == [["decode", 512], ["decode", 88], *[ones] * 4]
    assert log(tmp_path).count(["synchronize"]) == sum(call[0] == "decode" for call in calls)


@pytest.fixture
def loaded(stand_in, tmp_path, monkeypatch):
    """A worker with a model, whose log is empty."""
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setenv("STAND_IN_ROWS", "1")
    with Worker("llama.cpp", stand_in, llama_cpp.PROGRAM, 1) as worker:
        worker.ask("load", path=str(path), vocab=50, context=2048, threads=1)
        (tmp_path / "log").write_text("")
        yield worker


def test_the_worker_reads_prompts(loaded, tmp_path):
    answer = loaded.ask("prefill", tokens=1100)
    assert (answer["tokens"], answer["finite"]) == (1100, True)
    assert answer["seconds"] > 0
    calls = [call for call in log(tmp_path) if call[0] != "synchronize"]
    assert calls[0] == ["clear", "memory", True]
    assert [call[1] for call in calls if call[0] == "decode"] == [512, 512, 76]
    last = calls[-1][1:]
    assert [position for _, position, _ in last] == list(range(1024, 1100))
    assert [asked for _, _, asked in last] == [False] * 75 + [True]


def test_the_worker_verifies(loaded, tmp_path):
    """A step of several tokens wants the logits of each; the first one is not counted."""
    answer = loaded.ask("verify", steps=2, tokens=4)
    assert answer["tokens"] == 8
    rows = [call[1:] for call in log(tmp_path) if call[0] == "rows"]
    assert rows == [[[0, 1 + 4 * step + i, True] for i in range(4)] for step in range(3)]


def test_the_worker_decodes_sequences_together(loaded, tmp_path):
    loaded.ask("gather", sequences=3, tokens=300)
    assert loaded.ask("together", tokens=2)["tokens"] == 6
    loaded.ask("gather", sequences=2, tokens=10)
    calls = [call for call in log(tmp_path) if call[0] not in ("synchronize", "decode")]
    assert calls[0] == ["init", 3 * 512, 3, 1, 1]
    steps = [[[sequence, position, True] for sequence in range(3)] for position in range(23)]
    assert [call[1:] for call in calls[1:24]] == steps
    assert calls[24:27] == [["free", "batch"], ["free", "context of 3"], ["init", 2 * 256, 2, 1, 1]]


def test_the_worker_sees_bad_logits_and_failures(stand_in, tmp_path, monkeypatch):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF")
    request = {"path": str(path), "vocab": 50, "context": 256, "threads": 1}
    monkeypatch.setenv("STAND_IN_LOGIT", "nan")
    with Worker("llama.cpp", stand_in, llama_cpp.PROGRAM, 1) as worker:
        worker.ask("load", **request)
        assert worker.ask("decode", tokens=1)["finite"] is False
    monkeypatch.setenv("STAND_IN_STATUS", "1")
    with (
        Worker("llama.cpp", stand_in, llama_cpp.PROGRAM, 1) as worker,
        pytest.raises(NemotronHError, match="llama_decode returned 1"),
    ):
        worker.ask("load", **request)
    monkeypatch.setenv("STAND_IN_REFUSES", "1")
    with (
        Worker("llama.cpp", stand_in, llama_cpp.PROGRAM, 1) as worker,
        pytest.raises(NemotronHError, match="cannot load"),
    ):
        worker.ask("load", **request)


def test_is_it_installed(stand_in, tmp_path):
    llama_cpp.check_installed(stand_in)
    os.remove(tmp_path / "site" / "llama_cpp.py")
    (tmp_path / "site" / "llama_cpp.py").write_text("raise ImportError('libllama.so: not found')")
    with pytest.raises(MissingDependencyError, match=r"libllama.so: not found.*pip install.*--llama-python"):
        llama_cpp.check_installed(stand_in)
    with pytest.raises(MissingDependencyError, match="No such file"):
        llama_cpp.check_installed(str(tmp_path / "nothing"))


def test_its_engine(stand_in, tmp_path, monkeypatch):
    config = tiny_config(**SPARSE)
    spec = family.describe(config.to_dict())
    subject = Subject("x", config.to_dict(), None, "int8")
    engine = engines.llama(subject, spec, stand_in, 2, 512)
    assert (engine.name, engine.format, engine.matrix_bits, engine.other_bytes) == ("llama.cpp", "Q8_0", 8.5, 4)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    with engines.loading(engine, subject, spec, lambda _: None) as ready:
        assert read(ready.request["path"])[0]["nemotron_h_moe.context_length"] == 512
        assert ready.request["path"].startswith(str(tmp_path / "tmp"))
    assert list((tmp_path / "tmp").iterdir()) == []
