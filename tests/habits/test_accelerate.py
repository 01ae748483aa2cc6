"""accelerate: prepare, accumulate, save_state and load_state; empty weights, device maps; FSDP2 on one rank."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from training_cases import LOSSES, assert_same_bits, gradients, other, pad, read_weights, rows_of

from helpers import BOUND64, assert_close, draw_ids, tiny_model
from nemotron_h import NemotronHForCausalLM

LENGTHS = [9, 12, 3, 7, 12, 5, 10, 10]


@pytest.fixture(autouse=True)
def own_state() -> Any:
    """accelerate remembers its settings for the whole process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


class Loop:
    """A training loop as accelerate's manual has it."""

    def __init__(self, model: NemotronHForCausalLM, batch: int, accumulate: int) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loader: Any = torch.utils.data.DataLoader(rows_of(LENGTHS), batch_size=batch, collate_fn=pad)  # type: ignore[arg-type]
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model.train(), optimizer, loader, schedule
        )

    def epoch(self, items: int | None = None, clip: float = 1.0) -> list[float]:
        losses = []
        for batch in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch, num_items_in_batch=items).loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.accelerator.unwrap_model(self.model).update_router_bias()
            losses.append(loss.item())
        return losses

    def state(self) -> dict[str, Any]:
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": torch.random.get_rng_state(),
        }


def test_accumulated_micro_batches_are_one_batch() -> None:
    """accelerate divides each micro-batch's loss by their number, so its sum is over a quarter of the items."""
    items = sum(length - 1 for length in LENGTHS)
    whole, parts = tiny_model(**LOSSES).double(), tiny_model(**LOSSES).double()
    (expected,) = Loop(whole, batch=8, accumulate=1).epoch(items)
    AcceleratorState._reset_state(True)
    found = Loop(parts, batch=2, accumulate=4).epoch(items // 4)
    assert items % 4 == 0
    assert sum(found) / 4 == pytest.approx(expected, rel=1e-9)
    # Adam divides by the root of the gradient's square, which leaves less of the digits where that is tiny.
    for name, tensor in whole.state_dict().items():
        assert_close(parts.state_dict()[name], tensor, name, 1e3 * BOUND64)


def test_saved_and_loaded_state_goes_on_exactly(tmp_path: Path) -> None:
    config = {**LOSSES, "hidden_dropout": 0.1, "attention_dropout": 0.1}
    set_seed(0)
    loop = Loop(tiny_model(**config), batch=2, accumulate=2)
    loop.epoch()
    loop.accelerator.save_state(os.fspath(tmp_path))
    losses = loop.epoch()
    expected = loop.state()

    AcceleratorState._reset_state(True)
    set_seed(1)
    again = Loop(other(tiny_model(**config)), batch=2, accumulate=2)
    again.accelerator.load_state(os.fspath(tmp_path))
    assert again.epoch() == losses
    assert_same_bits(again.state(), expected)


def test_save_model_writes_what_from_pretrained_reads(tmp_path: Path) -> None:
    """`unwrap_model(...).save_pretrained(..., state_dict=get_state_dict)`, the way that accelerate documents."""
    loop = Loop(tiny_model(**LOSSES, tie_word_embeddings=True), batch=4, accumulate=1)
    loop.epoch()
    model = loop.accelerator.unwrap_model(loop.model)
    model.save_pretrained(
        tmp_path, is_main_process=loop.accelerator.is_main_process, save_function=loop.accelerator.save,
        state_dict=loop.accelerator.get_state_dict(loop.model),
    )  # fmt: skip
    assert_same_bits(NemotronHForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())
    assert "backbone.layers.1.mixer.experts.7.up_proj.weight" in read_weights(tmp_path)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_mixed_precision(mixed_precision: str) -> None:
    model = tiny_model(**LOSSES)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    prepared = accelerator.prepare(model)
    ids = draw_ids(model, 2, 9)
    out = prepared(ids, labels=ids)
    accelerator.backward(out.loss)
    assert out.logits.dtype == torch.float32
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}
    plain = tiny_model(**LOSSES)(ids, labels=ids).loss
    assert out.loss.item() == pytest.approx(plain.item(), rel=0 if mixed_precision == "no" else 5e-2)


# Big models


def test_empty_weights_and_a_device_map() -> None:
    with init_empty_weights():
        model = NemotronHForCausalLM(tiny_model(tie_word_embeddings=True).config)
    assert all(p.is_meta for p in model.parameters())
    model.tie_weights()  # accelerate replaces every parameter by one on meta, which undoes the tie
    assert model.lm_head.weight is model.model.embeddings.weight
    whole = infer_auto_device_map(model, {"cpu": "1GB"}, no_split_module_classes=model._no_split_modules)
    assert whole == {"": "cpu"}
    half = sum(p.nbytes for p in model.parameters()) // 2
    mapped = infer_auto_device_map(
        model, {0: half, "cpu": "1GB"}, no_split_module_classes=model._no_split_modules, clean_result=False
    )
    assert set(mapped.values()) == {0, "cpu"}
    parts = [name for name in mapped if name.startswith("model.layers.")]
    assert {name.count(".") for name in parts} == {2}, "a block is never split"


@pytest.mark.parametrize("how", ["dispatch", "dispatch by block", "offload", "from_pretrained", "from_pretrained map"])
@torch.no_grad()
def test_dispatched_and_loaded_with_a_device_map(how: str, tmp_path: Path) -> None:
    model = tiny_model(**LOSSES, tie_word_embeddings=True)
    ids = draw_ids(model, 2, 9)
    model.save_pretrained(tmp_path)
    blocks = [f"model.layers.{i}" for i in range(len(model.model.layers))]
    by_block = dict.fromkeys(["model.embeddings", *blocks, "model.norm_f", "lm_head", "mtp"], "cpu")
    if how.startswith("dispatch"):
        loaded = dispatch_model(other(model), by_block if "block" in how else {"": "cpu"}, force_hooks=True)
        loaded.load_state_dict(read_weights(tmp_path))
    elif how == "offload":  # each module's parameters are there only while that module runs
        loaded = cpu_offload(NemotronHForCausalLM.from_pretrained(tmp_path), torch.device("cpu"))
        assert all(p.is_meta for p in loaded.model.layers.parameters())
    else:
        loaded = NemotronHForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"} if "map" in how else "cpu")
    assert_close(loaded(ids, labels=ids).loss, model(ids, labels=ids).loss, bound=0)
    options = {"max_new_tokens": 5, "eos_token_id": None, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))


# FSDP2

SHARD = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
sys.path[:0] = sys.argv[1:3]
from helpers import draw_ids, tiny_model
from training_cases import LOSSES

torch.set_num_threads(1)
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
plain, model = (tiny_model(**LOSSES, tie_word_embeddings=True).train() for _ in range(2))
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)
ids = draw_ids(plain, 2, 9)
steps = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (plain, model)]
losses = [[], []]
for _ in range(3):
    for m, step, seen in zip((plain, model), steps, losses):
        loss = m(ids, labels=ids).loss
        loss.backward()
        step.step()
        step.zero_grad()
        seen.append(loss.item())
print(json.dumps({
    "losses": losses,
    "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
    "apart": max(float((p.full_tensor() - q).abs().max()) for p, q in zip(model.parameters(), plain.parameters())),
}))
dist.destroy_process_group()
"""


def test_fsdp2_on_one_rank() -> None:
    tests = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", SHARD, str(tests), str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert found["sharded"]
    plain, sharded = (torch.tensor(losses) for losses in found["losses"])
    assert_close(sharded, plain)
    assert plain[-1] < plain[0]
    assert found["apart"] < 1e-4
