"""TRL's SFTTrainer: packing, padding-free batches, assistant-only loss, LoRA; which class a path gives."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from training_cases import BalanceRouters, different
from trl import SFTConfig, SFTTrainer
from trl_cases import COMMON, CONVERSATIONS, logged, shipped, snapshot, tokenizer

from helpers import assert_close
from nemotron_h import NemotronHForCausalLM, demo_model


def sft(directory: Path, model: Any = None, config: Any = None, callbacks: Any = None, **changes: Any) -> SFTTrainer:
    values = {**COMMON, "assistant_only_loss": True, "max_length": 200, "per_device_train_batch_size": 4} | changes
    return SFTTrainer(
        model or shipped(),
        SFTConfig(output_dir=str(directory), **values),
        train_dataset=Dataset.from_list([{"messages": c} for c in CONVERSATIONS]),
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=callbacks,
    )


def batch(run: SFTTrainer) -> dict[str, Tensor]:
    return next(iter(run.get_train_dataloader()))


MODES = {"packing": {"packing": True}, "padding_free": {"padding_free": True, "max_length": None}, "padded": {}}


@pytest.mark.parametrize("mode", MODES)
def test_three_steps(mode: str, tmp_path: Path) -> None:
    model = shipped()
    before = snapshot(model)
    run = sft(tmp_path, model, **MODES[mode])
    run.train()
    losses = logged(run)
    assert len(losses) == 3
    assert all(0 < loss < 20 for loss in losses)
    assert losses[-1] < losses[0]
    moved = set(different(model.state_dict(), before))
    still = set(before) - moved
    assert all(name.startswith("mtp.") or name.endswith("e_score_correction_bias") for name in still), (
        "TRL trains the trunk and the head; MTP heads and routers' biases it does not see"
    )
    assert any(name.startswith("mtp.") for name in still)


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_that_of_the_separate_documents(mode: str, tmp_path: Path) -> None:
    """The batch as TRL makes it, its own loss, its gradients; against one pass of our own for each document."""
    model = shipped()
    model.config.mtp_loss_coef = model.config.router_aux_loss_coef = 0.0
    run = sft(tmp_path, model, **MODES[mode])
    inputs = run._prepare_inputs(batch(run))
    loss = run.compute_loss(model, dict(inputs))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    rows = [encoded(c) for c in CONVERSATIONS]
    items = sum(int((labels[1:] != -100).sum()) for _, labels in rows)
    alone = sum(
        NemotronHForCausalLM.forward(model, ids[None], labels=labels[None], num_items_in_batch=items).loss
        for ids, labels in rows
    )
    assert isinstance(alone, Tensor)
    alone.backward()
    assert_close(loss, alone, "loss")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(found[name], parameter.grad, name)


def encoded(conversation: Any) -> tuple[Tensor, Tensor]:
    """Ids and labels of one conversation, by transformers' chat template alone."""
    tokens = tokenizer().apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = torch.tensor(tokens["input_ids"]), torch.tensor(tokens["assistant_masks"])
    return ids, ids.masked_fill(mask == 0, -100)


@pytest.mark.parametrize("mode", MODES)
def test_labels_are_what_the_assistant_says(mode: str, tmp_path: Path) -> None:
    run = sft(tmp_path, **MODES[mode])
    inputs = batch(run)
    if mode == "packing":
        assert inputs["input_ids"].shape[0] < 4
        assert (inputs["position_ids"] == 0).sum() >= 4
    text = tokenizer().decode(inputs["labels"][inputs["labels"] != -100])
    answers = [t for t in text.split("<|im_end|>") if t]
    assert sorted(answers) == sorted([
        "<think></think>An animal that barks.",
        "<think>\nThe same question again.\n</think>\nAnother animal.",
        "<think></think>Water that falls from clouds.",
        "<think></think>No, a chair is a piece of furniture.",
        "<think></think>A building in which people live.",
    ])  # fmt: skip
    assert text.count("<|im_end|>") == 5, "the model learns to stop"


def test_router_biases_move_with_the_callback(tmp_path: Path) -> None:
    model = shipped()
    before = {name: bias.clone() for name, bias in model.model.named_buffers()}
    sft(tmp_path, model, callbacks=[BalanceRouters()], packing=True, max_steps=1).train()
    assert different(dict(model.model.named_buffers()), before) == list(before)


@pytest.mark.parametrize(("given", "added"), [(None, True), (0.0, False)])
def test_trl_adds_mixtrals_balance_loss_unless_told_not_to(given: float | None, added: bool, tmp_path: Path) -> None:
    """Softmax of logits that are meant for a sigmoid; docs/training.md says how to leave it out."""
    model = shipped()
    assert model.config.router_aux_loss_coef > 0
    run = sft(tmp_path, model, max_steps=1, router_aux_loss_coef=given)
    run.train()
    assert bool(logged(run, "aux_loss")) == added


def test_lora(tmp_path: Path) -> None:
    model = shipped()
    config = peft.LoraConfig(r=4, target_modules=["in_proj", "q_proj", "v_proj", "up_proj"])
    run = sft(tmp_path, model, config=config, packing=True)
    before = snapshot(run.model)
    run.train()
    moved = different(run.model.state_dict(), before)
    assert moved
    assert all("lora_" in name for name in moved)
    assert all(loss > 0 for loss in logged(run))
    run.save_model()
    again = peft.PeftModel.from_pretrained(shipped(), tmp_path)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, run.model.eval()(ids).logits)


def test_which_class_a_path_gives(tmp_path: Path) -> None:
    """Ours with `architecture`; without it transformers' class of the same name."""
    path = str(demo_model())
    ours = sft(tmp_path, path, model_init_kwargs={"architecture": NemotronHForCausalLM, "dtype": "float32"})
    assert type(ours.model) is NemotronHForCausalLM
    ours.train()
    assert all(0 < loss < 20 for loss in logged(ours))
    theirs = sft(tmp_path, path, max_steps=1)
    assert type(theirs.model) is transformers.NemotronHForCausalLM
