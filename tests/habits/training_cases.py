"""Shared by the tests of training: tiny models, texts without a pattern, and comparison of bits."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from nemotron_h import NemotronHForCausalLM

HEAD: dict[str, Any] = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
LOSSES: dict[str, Any] = {
    **HEAD, "mtp_loss_coef": 0.3, "router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.05,
}  # fmt: skip
"""Every term that a loss can have."""

Rows = list[dict[str, list[int]]]


def rows_of(lengths: list[int], vocab_size: int = 50, seed: int = 0) -> Rows:
    """Texts that count upwards, so that there is something to learn; labels are the ids."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, vocab_size, (len(lengths),), generator=generator).tolist()
    rows = [[(start + t) % vocab_size for t in range(n)] for start, n in zip(starts, lengths, strict=True)]
    return [{"input_ids": row, "labels": row} for row in rows]


def pad(rows: Rows) -> dict[str, Tensor]:
    """A padded batch, as collators make it."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, fill: int) -> Tensor:
        return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["labels"]) + [0] * (longest - len(row["labels"])) for row in rows])
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": mask}


class BalanceRouters(TrainerCallback):
    """What docs/training.md tells to add where the model has experts."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.update_router_bias()


def arguments(directory: Path, **changes: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(directory), **values | changes)


def trainer(model: NemotronHForCausalLM, directory: Path, rows: Rows, **changes: Any) -> Trainer:
    """A Trainer over these rows; `callbacks`, `data_collator` and such go to it, all else to its arguments."""
    own = {key: changes.pop(key) for key in ("callbacks", "data_collator", "compute_metrics") if key in changes}
    own.setdefault("data_collator", pad)
    return Trainer(model, arguments(directory, **changes), train_dataset=rows, eval_dataset=list(rows)[:5], **own)


def losses_of(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint directory, as the `safetensors` package reads it."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def other(model: nn.Module) -> Any:
    """A copy with other values in every tensor."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in result.state_dict().values():
            tensor.add_(1)
    return result


def assert_same_bits(actual: Any, expected: Any, what: str = "") -> None:
    """Tensors anywhere in nested dicts and lists have the same dtypes, shapes and bits, all else is equal."""
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype, what
        assert actual.shape == expected.shape, what
        assert torch.equal(_bits(actual), _bits(expected)), what
    elif isinstance(expected, Mapping):
        assert actual.keys() == expected.keys(), what
        for key in expected:
            assert_same_bits(actual[key], expected[key], f"{what}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), what
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(a, b, f"{what}[{index}]")
    else:
        assert actual == expected, what


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def different(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors whose bits differ."""
    return [name for name in expected if not torch.equal(_bits(actual[name]), _bits(expected[name]))]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
