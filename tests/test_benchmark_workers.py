"""The workers of PyTorch models, in this process."""

import pytest
import torch
from transformers.models.nemotron_h import NemotronHForCausalLM as Peer

from helpers import tiny_config
from nemotron_h import NemotronHForCausalLM, __version__
from nemotron_h.benchmark.workers import ours_worker, transformers_worker
from nemotron_h.benchmark.workers.torch_model import Decoder, random_weights, stored_bytes
from nemotron_h.ops import _native

SHAPE = {"hidden_size": 128, "hybrid_override_pattern": "ME*M", "mamba_num_heads": 4, "mamba_head_dim": 16}


class Recorder:
    """A model that counts: its cache is the number of tokens so far."""

    def __init__(self, value=1.0):
        self.calls, self.value = [], value

    def __call__(self, ids_BT, cache):
        assert not torch.is_grad_enabled()
        assert ids_BT.shape[0] == 1
        assert ids_BT.min() >= 0
        assert ids_BT.max() < 7
        self.calls.append((cache or 0, ids_BT.shape[1]))
        return torch.full((1, 7), self.value), (cache or 0) + ids_BT.shape[1]


def test_contexts_are_filled_and_kept():
    step = Recorder()
    decoder = Decoder(step, 7)
    decoder.decode(3)
    assert step.calls == [(0, 1), (1, 1), (2, 1)]
    step.calls.clear()
    decoder.fill(1100)  # what is there already is kept
    assert step.calls == [(3, 512), (515, 512), (1027, 73), (1100, 1), (1101, 1), (1102, 1), (1103, 1)]
    step.calls.clear()
    decoder.fill(1100)  # too far: anew
    assert step.calls[:4] == [(0, 512), (512, 512), (1024, 76), (1100, 1)]
    step.calls.clear()
    decoder.fill(0)
    assert step.calls == [(0, 1), (1, 1), (2, 1), (3, 1)]


def test_tokens_vary():
    seen = []
    step = Recorder()

    def watched(ids_BT, cache):
        seen.extend(ids_BT[0].tolist())
        return step(ids_BT, cache)

    Decoder(watched, 7).decode(200)
    assert set(seen) == set(range(7))


@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (float("nan"), False), (float("inf"), False)])
def test_time_and_finite_logits(value, finite):
    seconds, found = Decoder(Recorder(value), 7).decode(2)
    assert seconds > 0
    assert found is finite


@pytest.mark.parametrize("tied", [False, True])
def test_random_weights(tied):
    config = tiny_config(tie_word_embeddings=tied)
    one, two, other = (
        random_weights(lambda: NemotronHForCausalLM(config), config, torch.bfloat16, seed) for seed in (1, 1, 2)
    )
    assert not one.training
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert a.dtype == torch.bfloat16
        assert not a.requires_grad
        assert a.isfinite().all()
        assert torch.equal(a, b), name
        if a.dim() > 1:
            assert not torch.equal(a, c), name
    biases = [b for name, b in one.named_buffers() if name.endswith("correction_bias")]
    assert biases
    assert all(b.dtype == torch.float32 and not b.any() for b in biases)
    assert (one.lm_head.weight is one.model.embeddings.weight) == tied
    counted = sum(p.numel() for p in one.parameters())
    assert stored_bytes(one) == 2 * counted + sum(b.nbytes for b in one.buffers())


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_worker(worker, **request):
    loaded = worker.load(config=tiny_config(**SHAPE).to_dict(), threads=2, **request)
    assert torch.get_num_threads() == 2
    worker.fill(5)
    decoded = worker.decode(2)
    assert decoded["seconds"] > 0
    assert decoded["finite"] is True
    assert loaded["seconds"] > 0
    return loaded


@pytest.mark.parametrize("quantization", [None, "bf16", "int8", "int4"])
def test_our_worker(quantization, restored_threads):
    worker = ours_worker.Worker()
    loaded = run_worker(worker, path=None, quantization=quantization)
    assert loaded["version"] == f"{__version__} {_native.level() if _native.levels() else 'reference'}"
    assert loaded["weight_bytes"] == stored_bytes(worker.model)
    linear = worker.model.model.layers[0].mixer.in_proj.weight
    assert linear.dtype == (torch.bfloat16 if quantization is None else torch.uint8)
    rates = worker.compare_paths(tokens=3, repeats=2)["tokens_per_second"]
    assert set(rates) == {"step", "model.generate", "LLM.generate"}
    assert min(rates.values()) > 0


def test_the_version_names_the_kernels(environment):
    environment(NEMOTRON_H_IMPL="reference")
    assert ours_worker._kernels() == "reference"
    for level in _native.levels():
        environment(NEMOTRON_H_IMPL="", NEMOTRON_H_ISA=level)
        assert ours_worker._kernels() == level


def test_paths_are_medians_of_the_same_work(monkeypatch, restored_threads):
    worker, work = ours_worker.Worker(), []
    worker.load(config=tiny_config(**SHAPE).to_dict(), threads=1, path=None, quantization=None)
    for name in ("_by_step", "_by_generate", "_by_llm"):
        monkeypatch.setattr(worker, name, lambda tokens, name=name: work.append((name, tokens)))
    seconds = iter([1, 10, 100, 2, 20, 200, 9, 90, 900])
    monkeypatch.setattr(ours_worker, "timed", lambda way, tokens: next(seconds))
    rates = worker.compare_paths(tokens=8, repeats=3)["tokens_per_second"]
    assert rates == {"step": 4, "model.generate": 0.4, "LLM.generate": 0.04}
    assert work == [("_by_step", 4), ("_by_generate", 4), ("_by_llm", 4)]


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_our_worker_on_files(tmp_path, quantization, restored_threads):
    config = tiny_config(**SHAPE).to_dict()
    ours_worker.Worker().write(config, quantization, str(tmp_path))
    worker, memory = ours_worker.Worker(), ours_worker.Worker()
    loaded = worker.load(None, str(tmp_path), quantization, 1)
    drawn = memory.load(config, None, quantization, 1)
    assert loaded["weight_bytes"] == drawn["weight_bytes"]
    for a, b in zip(worker.model.parameters(), memory.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_their_worker(restored_threads):
    worker = transformers_worker.Worker()
    loaded = run_worker(worker)
    assert type(worker.model) is Peer
    shapes = {name: tuple(p.shape) for name, p in worker.model.named_parameters()}
    ours = ours_worker.random_model(tiny_config(**SHAPE).to_dict(), None)
    assert {tuple(shape) for shape in shapes.values()} == {tuple(p.shape) for p in ours.parameters()}
    assert loaded["weight_bytes"] == stored_bytes(worker.model) == stored_bytes(ours)
    assert worker.model.dtype == torch.bfloat16


def test_the_same_shape_for_them():
    ours = tiny_config(**SHAPE, time_step_limit=(0.0, 5.0))
    theirs = transformers_worker.peer_config(ours)
    for name in ("hidden_size", "n_routed_experts", "moe_latent_size", "num_experts_per_tok", "head_dim", "vocab_size"):
        assert getattr(theirs, name) == getattr(ours, name)
    assert len(theirs.layers_block_type) == 4
