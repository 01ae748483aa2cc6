"""transformers' Trainer: it learns, evaluates, accumulates, checkpoints gradients, packs, in float32 and bfloat16."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from training_cases import (
    HEAD,
    LOSSES,
    BalanceRouters,
    Rows,
    arguments,
    assert_same_bits,
    different,
    losses_of,
    pad,
    rows_of,
    trainer,
)  # fmt: skip
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    default_data_collator,
)

from helpers import BOUND64, assert_close, tiny_model
from nemotron_h import NemotronHForCausalLM, demo_model

LENGTHS = [9, 12, 7, 12, 5, 10, 12, 8]


def fresh(**config: Any) -> NemotronHForCausalLM:
    """Initialized as from scratch."""
    torch.manual_seed(0)
    return NemotronHForCausalLM(tiny_model(**config).config)


@pytest.mark.parametrize("bf16", [False, True])
def test_it_learns_every_tensor(bf16: bool, tmp_path: Path) -> None:
    model = fresh(**LOSSES)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    run = trainer(model, tmp_path, rows_of(LENGTHS), max_steps=30, bf16=bf16, callbacks=[BalanceRouters()])
    run.train()
    losses = losses_of(run)
    assert len(losses) == 30
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert different(model.state_dict(), before) == list(before), "every tensor moved, routers' biases included"
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}


def test_autocast_is_close_to_float32(tmp_path: Path) -> None:
    """bf16=True: the first loss is the float32 one but for bfloat16's eight bits, and not the same."""
    losses = [
        losses_of(run)[0]
        for bf16 in (False, True)
        for run in [trainer(fresh(**LOSSES), tmp_path, rows_of(LENGTHS), max_steps=1, bf16=bf16)]
        if run.train()
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1] != losses[0]


def test_a_bfloat16_model(tmp_path: Path) -> None:
    model = fresh(**LOSSES).bfloat16()
    run = trainer(model, tmp_path, rows_of(LENGTHS), max_steps=30, callbacks=[BalanceRouters()])
    run.train()
    assert sum(losses_of(run)[-3:]) < 0.8 * sum(losses_of(run)[:3])
    run.save_model()
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(loaded.state_dict(), model.state_dict())
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in loaded.buffers()} == {torch.float32}
    assert all(bool(bias.any()) for bias in loaded.buffers())


def after_one_step(directory: Path, rows: Rows, **changes: Any) -> tuple[list[float], dict[str, Tensor]]:
    model = tiny_model(**LOSSES).double()
    run = trainer(model, directory, rows, max_steps=1, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, **changes)
    run.train()
    return losses_of(run), dict(model.state_dict())


def test_four_micro_batches_are_one_batch(tmp_path: Path) -> None:
    """Rows of different lengths, labels missing, every term of the loss."""
    rows = rows_of([9, 12, 3, 7])
    rows[1]["labels"] = [-100] * 6 + rows[1]["labels"][6:]
    whole, expected = after_one_step(tmp_path, rows, per_device_train_batch_size=4)
    parts, found = after_one_step(tmp_path, rows, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert parts == pytest.approx(whole, rel=1e-6)
    for name, tensor in expected.items():
        assert_close(found[name], tensor, name, BOUND64)
    model = tiny_model(**LOSSES).double()
    batch, items = pad(rows), sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    assert whole == pytest.approx([model(**batch, num_items_in_batch=items).loss.item()], rel=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, tmp_path: Path) -> None:
    plain = after_one_step(tmp_path, rows_of(LENGTHS))
    checkpointed = after_one_step(
        tmp_path, rows_of(LENGTHS), gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    assert_same_bits(checkpointed, plain)


@pytest.mark.parametrize("config", [{}, LOSSES, {**HEAD, "output_router_logits": True}])
def test_evaluation(config: dict[str, Any], tmp_path: Path) -> None:
    model, rows, seen = tiny_model(**config), rows_of(LENGTHS), []
    run = trainer(model, tmp_path, rows, compute_metrics=lambda p: seen.append(p) or {"rows": len(p.label_ids)})
    metrics = run.evaluate()
    batches = [rows[0:2], rows[2:4], rows[4:5]]
    with torch.no_grad():
        outputs = [model(**pad(batch), num_items_in_batch=_items(batch)) for batch in batches]
    mean = sum(len(batch) * out.loss.item() for batch, out in zip(batches, outputs, strict=True)) / 5
    assert metrics["eval_loss"] == pytest.approx(mean, rel=1e-5)
    assert metrics["eval_rows"] == 5
    logits = seen[0].predictions[0] if config.get("output_router_logits") else seen[0].predictions
    assert logits.shape == (5, 12, 50)
    assert_close(logits[0, :9], outputs[0].logits[0, :9])
    assert seen[0].label_ids[0].tolist() == rows[0]["labels"] + [-100] * 3


def _items(rows: Rows) -> int:
    return sum(len(row["labels"]) - 1 for row in rows)


def test_the_flattening_collator_gives_the_loss_of_the_padded_batch(tmp_path: Path) -> None:
    rows = rows_of([9, 12, 3, 7])
    padded = after_one_step(tmp_path, rows, per_device_train_batch_size=4)
    for options in ({}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}):
        collator = DataCollatorWithFlattening(**options)
        flat = after_one_step(tmp_path, rows, per_device_train_batch_size=4, data_collator=collator)
        assert flat[0] == pytest.approx(padded[0], rel=1e-6)
        for name, tensor in padded[1].items():
            assert_close(flat[1][name], tensor, name, BOUND64)


def test_a_dataset_of_texts(tmp_path: Path) -> None:
    """datasets: map, set_format, a collator that pads and makes labels."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    texts = Dataset.from_dict(
        {"text": ["A dog is an animal.", "A cat is an animal that sleeps.", "It was a dark night."]}
    )
    tokens = texts.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    tokens.set_format("torch")
    model = NemotronHForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    run = Trainer(
        model, arguments(tmp_path, max_steps=6, learning_rate=1e-3), train_dataset=tokens, data_collator=collator,
    )  # fmt: skip
    first = collator([tokens[0], tokens[1]])
    assert (first["labels"][first["attention_mask"] == 0] == -100).all()
    assert torch.equal(first["labels"][first["attention_mask"] == 1], first["input_ids"][first["attention_mask"] == 1])
    run.train()
    assert losses_of(run)[-1] < 0.7 * losses_of(run)[0]


def test_tokens_of_equal_length_need_no_collator(tmp_path: Path) -> None:
    model = fresh()
    data = Dataset.from_list(rows_of([12] * 8))
    data.set_format("torch", columns=["input_ids", "labels"])
    run = trainer(model, tmp_path, data, max_steps=20, data_collator=default_data_collator)  # type: ignore[arg-type]
    run.train()
    assert losses_of(run)[-1] < 0.6 * losses_of(run)[0]
