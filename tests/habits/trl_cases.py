"""Shared by the TRL tests: the shipped model with a chat template in Nemotron's style, and a few conversations."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from nemotron_h import NemotronHForCausalLM, demo_model

TEMPLATE = Path(__file__).parent.parent / "data" / "chat" / "nemotron_style.jinja"
COMMON: dict[str, Any] = {
    "max_steps": 3, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "report_to": [],
    "disable_tqdm": True, "use_cpu": True, "bf16": False, "dataloader_pin_memory": False,
    "lr_scheduler_type": "constant", "gradient_checkpointing": False, "router_aux_loss_coef": 0.0,
}  # fmt: skip


def tokenizer() -> Any:
    result = AutoTokenizer.from_pretrained(demo_model())
    result.chat_template = TEMPLATE.read_text()
    return result


@cache
def _loaded() -> NemotronHForCausalLM:
    return NemotronHForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)


def shipped() -> NemotronHForCausalLM:
    """The shipped model in float32, a copy of its own."""
    return copy.deepcopy(_loaded())


def said(role: str, content: str, **more: str) -> dict[str, str]:
    return {"role": role, "content": content, **more}


CONVERSATIONS = [
    [
        said("system", "Be short."),
        said("user", "What is a dog?"),
        said("assistant", "An animal that barks."),
        said("user", "And a cat?"),
        said("assistant", "Another animal.", reasoning_content="The same question again."),
    ],
    [said("user", "What is rain?"), said("assistant", "Water that falls from clouds.")],
    [said("user", "Is a chair an animal?"), said("assistant", "No, a chair is a piece of furniture.")],
    [said("user", "What is a house?"), said("assistant", "A building in which people live.")],
]
PREFERENCES = [
    {"prompt": [said("user", question)], "chosen": [said("assistant", good)], "rejected": [said("assistant", bad)]}
    for question, good, bad in (
        ("What is a dog?", "An animal that barks.", "A kind of soup."),
        ("What is rain?", "Water that falls from clouds.", "It is made of wood."),
        ("What is a house?", "A building in which people live.", "Nobody has ever seen one."),
    )
]


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def logged(run: Any, key: str = "loss") -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]
