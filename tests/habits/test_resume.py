"""Trainer resumes exactly: a run that was interrupted ends with the bits of one that was not."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from training_cases import (
    LOSSES,
    BalanceRouters,
    assert_same_bits,
    different,
    losses_of,
    other,
    read_weights,
    rows_of,
    trainer,
)  # fmt: skip
from transformers import TrainerCallback
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from helpers import tiny_model
from nemotron_h import NemotronHForCausalLM

STEPS, HALF = 6, 3
FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


class Interrupted(Exception):
    pass


class Interrupt(BalanceRouters):
    """Balance the routers, and die in the step behind the checkpoint."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == HALF + 1:
            raise Interrupted


def train(
    model: Any, directory: Path, resume: Path | None = None, callback: Any = BalanceRouters, **changes: Any
) -> Any:
    run = trainer(
        model, directory, rows_of([9, 12, 7, 12, 5, 10, 12, 8]), max_steps=STEPS, save_strategy="steps",
        save_steps=HALF, callbacks=[callback()], lr_scheduler_type="cosine", **changes,
    )  # fmt: skip
    run.train(resume_from_checkpoint=None if resume is None else str(resume))
    return run


def training_state(checkpoint: Path) -> dict[str, Any]:
    return {name: torch.load(checkpoint / name, weights_only=False) for name in FILES}


def comparable(state: Any) -> Any:
    """numpy's generator state as lists."""
    if isinstance(state, dict):
        return {key: comparable(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [comparable(value) for value in state]
    return state.tolist() if hasattr(state, "tolist") and not isinstance(state, torch.Tensor) else state


@pytest.mark.parametrize(
    ("config", "changes", "sharded"),
    [
        ({}, {}, False),
        ({"tie_word_embeddings": True}, {"gradient_accumulation_steps": 2}, True),
        ({}, {"gradient_checkpointing": True}, False),
        ({}, {"bf16": True}, True),
    ],
    ids=["plain", "tied, accumulating, sharded", "gradient checkpointing", "bf16, sharded"],
)
def test_an_interrupted_run_ends_as_the_whole_one(
    config: dict[str, Any], changes: dict[str, Any], sharded: bool, tmp_path: Path
) -> None:
    model = tiny_model(**LOSSES, **DROPOUT, **config)
    start = other(model)
    whole = train(model, tmp_path / "whole", **changes)

    broken = tiny_model(**LOSSES, **DROPOUT, **config)
    with pytest.raises(Interrupted):
        train(broken, tmp_path / "broken", callback=Interrupt, **changes)
    checkpoint = tmp_path / "broken" / f"checkpoint-{HALF}"
    if sharded:
        saved = NemotronHForCausalLM.from_pretrained(checkpoint)
        saved.save_pretrained(checkpoint, max_shard_size="60KB")
        assert len(list(checkpoint.glob("*.safetensors"))) > 2
    resumed = train(start, tmp_path / "broken", checkpoint, **changes)

    assert_same_bits(start.state_dict(), model.state_dict())
    ends = [tmp_path / name / f"checkpoint-{STEPS}" for name in ("broken", "whole")]
    assert_same_bits(*(read_weights(end) for end in ends))
    assert_same_bits(*(comparable(training_state(end)) for end in ends))
    assert losses_of(resumed) == losses_of(whole)
    assert all(bool(bias.any()) for bias in model.buffers()), "the routers' biases were moved"


def test_dropout_draws_other_numbers_than_from_the_start(tmp_path: Path) -> None:
    """Otherwise the random state would not be tested above."""
    runs = [train(tiny_model(**DROPOUT), tmp_path / str(seed), seed=seed, data_seed=0) for seed in (1, 2)]
    assert losses_of(runs[0]) != losses_of(runs[1])


@pytest.mark.parametrize("sharded", [False, True])
def test_the_best_model_comes_back(sharded: bool, tmp_path: Path) -> None:
    model = tiny_model(**LOSSES)
    states = {}

    class Record(BalanceRouters):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            states[state.global_step] = {name: t.clone() for name, t in model.state_dict().items()}
            if sharded:
                directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                NemotronHForCausalLM.from_pretrained(directory).save_pretrained(directory, max_shard_size="60KB")

    run = train(
        model, tmp_path, callback=Record, eval_strategy="steps", eval_steps=HALF, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{HALF}"), "the loss falls, so the first is the 'best'"
    assert different(states[HALF], states[STEPS]) == list(model.state_dict())
    assert_same_bits(model.state_dict(), states[HALF])


def test_lora(tmp_path: Path) -> None:
    """Without BalanceRouters: an adapter's file has no place for the routers' biases."""

    def adapted() -> Any:
        config = peft.LoraConfig(r=4, target_modules=["in_proj", "q_proj", "up_proj"], lora_dropout=0.1)
        return peft.get_peft_model(tiny_model(**LOSSES), config)

    torch.manual_seed(0)
    model = adapted()
    whole = train(model, tmp_path / "whole", callback=TrainerCallback)
    torch.manual_seed(1)
    resumed = adapted()
    assert different(resumed.state_dict(), model.state_dict()), "it starts elsewhere"
    checkpoint = tmp_path / "whole" / f"checkpoint-{HALF}"
    run = train(resumed, tmp_path / "resumed", checkpoint, callback=TrainerCallback)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * sum(isinstance(m, peft.tuners.lora.Linear) for m in model.modules())
    for name in trained:
        assert_same_bits(resumed.state_dict()[name], model.state_dict()[name], name)
    assert losses_of(run) == losses_of(whole)

    again = peft.PeftModel.from_pretrained(tiny_model(**LOSSES), tmp_path / "resumed" / f"checkpoint-{STEPS}")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, run.model.eval()(ids).logits)


def test_transformers_own_class_restores_only_a_part(tmp_path: Path) -> None:
    """Why this needs tests: when it changes, docs/training.md should no longer say so."""
    config = transformers.NemotronHConfig.from_dict(tiny_model().config.to_diff_dict())
    config._experts_implementation = "eager"
    model: nn.Module = theirs.NemotronHForCausalLM(config)
    train(model, tmp_path / "theirs", callback=TrainerCallback)
    resumed = theirs.NemotronHForCausalLM(config)
    resumed.load_state_dict(read_weights(tmp_path / "theirs" / f"checkpoint-{STEPS}"), strict=False)
    names = different(resumed.state_dict(), model.state_dict())
    assert len(names) > len(model.state_dict()) / 2
