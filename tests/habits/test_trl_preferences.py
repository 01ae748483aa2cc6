"""TRL's DPOTrainer and GRPOTrainer: three steps each, with a reference model of our class."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from training_cases import assert_same_bits, different
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl_cases import COMMON, PREFERENCES, logged, shipped, snapshot, tokenizer

from nemotron_h import NemotronHForCausalLM, demo_model

OURS = {"architecture": NemotronHForCausalLM, "dtype": "float32"}


def dpo(directory: Path, model: Any, ref_model: Any = None, config: Any = None, **changes: Any) -> DPOTrainer:
    values = {**COMMON, "per_device_train_batch_size": 3, "max_length": 100, "beta": 0.1} | changes
    return DPOTrainer(
        model,
        ref_model,
        args=DPOConfig(output_dir=str(directory), **values),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer(),
        peft_config=config,
    )


def log_probability(model: NemotronHForCausalLM, prompt: Any, answer: Any) -> Tensor:
    """Of an answer behind its prompt, by one pass over this text alone."""
    chat = {"tokenize": True, "return_dict": True}
    asked = tokenizer().apply_chat_template(prompt, add_generation_prompt=True, **chat)["input_ids"]
    ids = torch.tensor(tokenizer().apply_chat_template(prompt + answer, **chat)["input_ids"])
    first = next((i for i, (a, b) in enumerate(zip(asked, ids.tolist(), strict=False)) if a != b), len(asked))
    logits = model.eval()(ids[None]).logits[0, :-1]
    return -F.cross_entropy(logits[first - 1 :], ids[first:], reduction="sum")


def test_dpo(tmp_path: Path) -> None:
    model, reference = shipped(), shipped()
    before = snapshot(model)
    run = dpo(tmp_path, model, reference)
    assert type(run.ref_model) is NemotronHForCausalLM
    run.train()
    assert logged(run)[0] == pytest.approx(0.6931, abs=1e-4), "log 2: policy and reference begin equal"
    assert logged(run)[-1] < logged(run)[0]
    assert different(model.state_dict(), before)
    assert_same_bits(snapshot(reference), before)


def test_dpo_with_a_path(tmp_path: Path) -> None:
    """The policy and, from the same arguments, the reference."""
    run = dpo(tmp_path, str(demo_model()), model_init_kwargs=OURS)
    assert type(run.model) is type(run.ref_model) is NemotronHForCausalLM
    assert run.ref_model is not run.model
    run.train()
    assert logged(run)[-1] < logged(run)[0]
    assert type(dpo(tmp_path, shipped()).ref_model) is transformers.NemotronHForCausalLM, "docs/training.md says so"


def test_dpo_log_probabilities(tmp_path: Path) -> None:
    """What TRL logs of a padded batch is what single passes give."""
    model = shipped()
    run = dpo(tmp_path, model, shipped(), max_steps=1, learning_rate=0.0)
    run.train()
    for kind in ("chosen", "rejected"):
        with torch.no_grad():
            alone = [log_probability(model, row["prompt"], row[kind]).item() for row in PREFERENCES]
        assert logged(run, f"logps/{kind}") == pytest.approx([sum(alone) / 3], rel=1e-4)


def test_dpo_with_lora_needs_no_reference(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["in_proj", "q_proj"])
    run = dpo(tmp_path, shipped(), config=config)
    assert run.ref_model is None
    before = snapshot(run.model)
    run.train()
    assert logged(run)[-1] < logged(run)[0]
    assert all("lora_" in name for name in different(run.model.state_dict(), before))


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Any number that differs between answers."""
    return [float(sum(map(ord, completion[0]["content"])) % 17) for completion in completions]


def grpo(directory: Path, model: Any, **changes: Any) -> GRPOTrainer:
    values = {
        **COMMON, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "beta": 0.1,
        "temperature": 1.0, "model_init_kwargs": OURS,
    }  # fmt: skip
    return GRPOTrainer(
        model,
        reward,
        args=GRPOConfig(output_dir=str(directory), **values | changes),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in PREFERENCES]),
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("by_path", [False, True])
def test_grpo(by_path: bool, tmp_path: Path) -> None:
    run = grpo(tmp_path, str(demo_model()) if by_path else shipped())
    assert type(run.model) is type(run.ref_model) is NemotronHForCausalLM
    before, reference = snapshot(run.model), snapshot(run.ref_model)
    run.train()
    assert len(logged(run)) == 3
    assert all(abs(loss) < 10 for loss in logged(run))
    assert logged(run, "kl")[0] == pytest.approx(0.0, abs=1e-6), "policy and reference begin equal"
    assert logged(run, "kl")[-1] > 0
    assert all(length > 0 for length in logged(run, "completions/mean_length"))
    assert different(run.model.state_dict(), before)
    assert_same_bits(snapshot(run.ref_model), reference)


def test_grpo_without_an_architecture_takes_transformers_reference(tmp_path: Path) -> None:
    run = grpo(tmp_path, shipped(), model_init_kwargs=None)
    assert type(run.ref_model) is transformers.NemotronHForCausalLM, "docs/training.md says so"
    assert grpo(tmp_path, shipped(), model_init_kwargs=None, beta=0.0).ref_model is None
