"""The workers of PyTorch models, in this process."""

import time

import pytest
import torch
from transformers.models.nemotron_h import NemotronHForCausalLM as Peer

from helpers import tiny_config
from nemotron_h import LLM, NemotronHForCausalLM, __version__
from nemotron_h.benchmark.workers import bits, ours_worker, torch_model, transformers_worker
from nemotron_h.benchmark.workers.torch_model import Decoder, random_weights, stored_bytes
from nemotron_h.ops import _native

SHAPE = {"hidden_size": 128, "hybrid_override_pattern": "ME*M", "mamba_num_heads": 4, "mamba_head_dim": 16}


class Recorder:
    """A model that counts: its cache is the number of tokens so far."""

    def __init__(self, value=1.0, rows=1):
        self.calls, self.kept, self.value, self.rows = [], [], value, rows

    def __call__(self, ids_BT, cache, keep):
        assert not torch.is_grad_enabled()
        assert ids_BT.shape[0] == self.rows
        self.kept.append(keep)
        assert ids_BT.min() >= 0
        assert ids_BT.max() < 7
        self.calls.append((cache or 0, ids_BT.shape[1]))
        return torch.full((self.rows, keep, 7), self.value), (cache or 0) + ids_BT.shape[1]


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


def test_steps_of_several_tokens_keep_all_logits():
    step = Recorder()
    found = Decoder(step, 7).decode(3, 4)
    assert step.calls == [(0, 4), (4, 4), (8, 4)]
    assert step.kept == [4, 4, 4]
    assert found["tokens"] == 12


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_turn_begins_with_a_step_that_is_not_timed(tokens, monkeypatch):
    step, clock = Recorder(), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def slow_at_first(ids_BT, cache, keep):
        clock[0] += 1.0 if step.calls else 100.0
        return step(ids_BT, cache, keep)

    found = Decoder(slow_at_first, 7).turn(3, tokens)
    assert step.calls == [(tokens * i, tokens) for i in range(4)]
    assert step.kept == [tokens] * 4
    assert (found["tokens"], found["seconds"]) == (3 * tokens, 3.0)


def test_prompts_start_anew_and_keep_the_last_logits():
    step = Recorder()
    decoder = Decoder(step, 7)
    decoder.decode(3)
    step.calls.clear()
    step.kept.clear()
    found = decoder.prefill(2 * torch_model.PASS + 5)
    assert step.calls == [(0, torch_model.PASS), (torch_model.PASS, torch_model.PASS), (2 * torch_model.PASS, 5)]
    assert step.kept == [1, 1, 1]
    assert found["tokens"] == 2 * torch_model.PASS + 5
    step.calls.clear()
    decoder.decode(1)
    assert step.calls == [(3, 1)], "the cache of decoding is where it was"


def test_rows_that_decode_together():
    step = Recorder(rows=5)
    decoder = Decoder(step, 7, 5)
    decoder.fill(16)
    step.calls.clear()
    assert decoder.decode(2)["tokens"] == 10
    assert step.calls == [(20, 1), (21, 1)]


def test_only_the_model_is_timed(monkeypatch):
    """Drawing tens of thousands of tokens takes Python longer than a small model needs."""
    clock = iter([10.0, 12.5])
    decoder = Decoder(Recorder(), 7)
    drawn = []
    draw = Decoder._draw
    monkeypatch.setattr(Decoder, "_draw", lambda self, tokens: (drawn.append(tokens), draw(self, tokens))[1])

    def now():
        assert drawn == [3], "before the clock starts"
        return next(clock)

    monkeypatch.setattr(torch_model.time, "perf_counter", now)
    assert decoder.prefill(3)["seconds"] == 2.5


def test_tokens_vary():
    seen = []
    step = Recorder()

    def watched(ids_BT, cache, keep):
        seen.extend(ids_BT[0].tolist())
        return step(ids_BT, cache, keep)

    Decoder(watched, 7).decode(200)
    assert set(seen) == set(range(7))


@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (float("nan"), False), (float("inf"), False)])
def test_time_and_finite_logits(value, finite):
    for found in (Decoder(Recorder(value), 7).decode(2), Decoder(Recorder(value), 7).prefill(3)):
        assert found["seconds"] > 0
        assert found["finite"] is finite


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
    worker.gather(3, 8)
    for measured, tokens in (
        (worker.decode(2), 2), (worker.verify(2, 4), 8), (worker.prefill(70), 70), (worker.together(4), 12)
    ):  # fmt: skip
        assert measured["seconds"] > 0
        assert measured["finite"] is True
        assert measured["tokens"] == tokens
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


@pytest.fixture(scope="module")
def packed():
    worker = ours_worker.Worker()
    worker.load(tiny_config(**SHAPE).to_dict(), None, "int4", torch.get_num_threads())
    return worker


@pytest.fixture(scope="module")
def found(packed):
    return packed.check_bits(150, 5)


def test_bits_of_packed_weights(packed, found):
    vocab = packed.model.config.vocab_size
    assert set(found["differing"].values()) == {0} or not _native.levels()
    assert found["promised"] is bool(_native.levels())
    prompt, rows, batch = found["compared"].values()
    assert (prompt, found["rounding"][0]) == (150 * vocab, 150 * vocab)
    assert batch == 5 * bits.WRITTEN * min(20, vocab)
    widths = [
        layer.out_features if isinstance(layer, torch.nn.Linear) else packed.model.config.moe_latent_size
        for layer in packed.model.modules()
        if isinstance(layer, bits._LAYERS)
    ]
    assert rows == sum(widths) * len(range(0, 150, 150 // 16)), "every layer, some rows of it"


def test_bits_of_plain_weights_are_not_promised(restored_threads):
    worker = ours_worker.Worker()
    worker.load(tiny_config(**SHAPE).to_dict(), None, None, 1)
    assert worker.check_bits(20, 2)["promised"] is False


@pytest.mark.parametrize("level", _native.levels()[-1:])
def test_one_wrong_bit_is_found(packed, monkeypatch, level):
    """In a layer that treats many rows otherwise, in a model that reads pieces otherwise, in a batch."""
    linear = packed.model.model.layers[0].mixer.in_proj
    forward = linear.forward

    def other(x, *rest, **more):
        y = forward(x, *rest, **more)
        if y.reshape(-1, y.shape[-1]).shape[0] > 40:
            y.view(-1)[0] += 1
        return y

    monkeypatch.setattr(linear, "forward", other)
    differing = packed.check_bits(150, 2)["differing"]
    assert differing["rows of layers against each alone"] == 1
    assert differing["a batch against each alone"] == 0
    monkeypatch.undo()
    ids_BT = torch.tensor(bits.random_prompts(50, 1, 30))
    read = bits.read
    monkeypatch.setattr(bits, "read", lambda m, ids, pieces: read(m, ids, pieces) + (len(pieces) > 1))
    assert packed.check_bits(150, 2)["differing"]["a prompt against pieces of it"] == 150 * 50
    assert packed.check_bits(150, 2)["rounding"] == (7500, 7500)
    monkeypatch.undo()
    generate = LLM.generate

    def wrong(self, prompts, params):
        results = generate(self, prompts, params)
        if len(prompts) > 1:
            step = results[1].logprobs[2]
            step[next(iter(step))] += 1e-3
        return results

    monkeypatch.setattr(LLM, "generate", wrong)
    assert packed.check_bits(20, 2)["differing"]["a batch against each alone"] == 1
    assert ids_BT.shape == (1, 30)


def test_pieces_of_a_prompt(packed, monkeypatch):
    model, sizes = packed.model, []
    handle = model.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    ids_BT = torch.tensor(bits.random_prompts(50, 1, 30))
    try:
        whole_BTV = bits.read(model, ids_BT, [30])
        cut_BTV = bits.read(model, ids_BT, [16, 8])
    finally:
        handle.remove()
    assert sizes == [30, 16, 8, 6]
    assert whole_BTV.shape == cut_BTV.shape == (1, 30, 50)


def test_counting_of_bits():
    nan = float("nan")
    assert bits.count(torch.tensor([1.0, nan, 2.0]), torch.tensor([1.0, nan, 3.0])) == (3, 1)
    assert bits.count(torch.tensor([nan]), torch.tensor([0.0])) == (1, 1)


def test_a_batch_counts_its_decode_phase_alone(packed, monkeypatch):
    packed.gather(2, 8)
    stats = {"tokens": {"prefill": 99, "decode": 6}, "seconds": {"prefill": 50.0, "decode": 2.0}}
    monkeypatch.setattr(LLM, "stats", lambda self: stats)
    assert packed.together(3) == {"tokens": 6, "seconds": 2.0, "finite": True}


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
