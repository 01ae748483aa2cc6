"""`nemotron-h info --memory` against tensors: of a model, of an optimizer, of an adapter, of a cache.

B batch · T tokens.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import draw_ids, tiny_config
from nemotron_h import NemotronHConfig, NemotronHForCausalLM, demo_model, family, lora_targets, peft_compat
from nemotron_h.cli import main
from nemotron_h.cli._output import size as shown

CONFIGS: dict[str, dict[str, Any]] = {
    "all blocks": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"use_bias": True, "mlp_bias": True, "attention_bias": True, "mamba_conv_bias": False},
    "no latent": {"moe_latent_size": None},
    "MTP heads": {"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "*E-", "mtp_loss_coef": 0.1},
    "MTP head of one block": {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "E", "mtp_loss_coef": 0.1},
    "large vocabulary": {"vocab_size": 900},
    "own widths": {
        "block_configs": [
            {"block_type": "moe", "n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 1},
            {"block_type": "mamba"},
            {"block_type": "moe", "n_routed_experts": 16, "moe_latent_size": 8, "num_experts_per_tok": 3},
        ],
        "n_group": 1,
    },
}  # fmt: skip
Info = Callable[..., dict[str, Any]]
each_config = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())


@pytest.fixture
def info(capfd: pytest.CaptureFixture[str]) -> Info:
    """`info(MODEL, "--batch", 2)`: what `--memory --json` prints."""

    def run(*arguments: object) -> dict[str, Any]:
        assert main(["info", *map(str, arguments), "--memory", "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    return run


def saved(tmp_path: Path, changes: dict[str, Any]) -> tuple[NemotronHConfig, Path]:
    config = tiny_config(**changes)
    config.save_pretrained(tmp_path)
    return config, tmp_path / "config.json"


def size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def contents(module: torch.nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def largest(model: NemotronHForCausalLM) -> torch.nn.Module:
    heads = [] if model.mtp is None else [*model.mtp.layers]
    parts = [model.model.embeddings, model.model.norm_f, model.lm_head, *model.model.layers, *heads]
    return max(parts, key=lambda part: sum(t.numel() for t in contents(part)))


@each_config
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_largest_layer(info: Info, tmp_path: Path, changes: dict[str, Any], dtype: str) -> None:
    config, path = saved(tmp_path, changes)
    facts = info(path)
    model = NemotronHForCausalLM(config).to(getattr(torch, dtype))
    assert facts["inference"][dtype]["weights"] == size(contents(model))
    assert facts["inference"][dtype]["largest_layer"] == size(contents(largest(model)))
    assert facts["largest_layer"]["parameters"] == sum(t.numel() for t in contents(largest(model)))


def test_name_of_the_largest_layer(info: Info, tmp_path: Path) -> None:
    names = {}
    for key in ("all blocks", "MTP head of one block", "large vocabulary"):
        _, path = saved(tmp_path, CONFIGS[key])
        names[key] = info(path)["largest_layer"]["name"]
    assert list(names.values()) == ["moe block", "MTP moe block", "embeddings"]


def step(model: torch.nn.Module, parameters: list[Tensor], config: NemotronHConfig, masters: list[Tensor]) -> Any:
    """One step of AdamW on `masters`, whose gradients are those of `parameters`; returns the optimizer."""
    ids_BT = torch.randint(0, config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    model.train()
    model(ids_BT, labels=ids_BT).loss.backward()
    optimizer = torch.optim.AdamW(masters)
    for parameter, master in zip(parameters, masters, strict=True):
        assert parameter.grad is not None
        master.grad = parameter.grad.to(master.dtype)
    optimizer.step()
    return optimizer


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]


@each_config
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_all_weights(info: Info, tmp_path: Path, changes: dict[str, Any], dtype: str) -> None:
    config, path = saved(tmp_path, changes)
    model = NemotronHForCausalLM(config).to(getattr(torch, dtype))
    parameters = list(model.parameters())
    in_place = dtype == "float32"
    masters = parameters if in_place else [p.detach().float() for p in parameters]
    optimizer = step(model, parameters, config, masters)
    expected = {
        "weights": size(contents(model)),
        "gradients": size(p.grad for p in parameters if p.grad is not None),
        "masters": 0 if in_place else size(masters),
        "optimizer": size(moments(optimizer)),
    }
    assert info(path)["training"][dtype] == expected | {"total": sum(expected.values())}


@each_config
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_an_adapter(info: Info, tmp_path: Path, changes: dict[str, Any], dtype: str) -> None:
    from peft import LoraConfig, get_peft_model

    config, path = saved(tmp_path, changes)
    model: Any = NemotronHForCausalLM(config).to(getattr(torch, dtype))
    with peft_compat(model):
        model = get_peft_model(model, LoraConfig(r=16, lora_dropout=0.0, **lora_targets(model)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = step(model, trained, config, trained)
    expected = {
        "weights": size(contents(model)),
        "gradients": size(p.grad for p in trained if p.grad is not None),
        "masters": 0,
        "optimizer": size(moments(optimizer)),
    }
    lora = info(path)["lora"]
    assert lora["parameters"] == sum(p.numel() for p in trained)
    assert (lora["rank"], lora[dtype]) == (16, expected | {"total": sum(expected.values())})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ssm_dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_cache(info: Info, tmp_path: Path, dtype: str, ssm_dtype: str) -> None:
    config, path = saved(tmp_path, {"mamba_ssm_cache_dtype": ssm_dtype, "hybrid_override_pattern": "M*EM*"})
    facts = info(path, "--batch", 3, "--context", 11, "--context", 4)
    assert facts["batch"] == 3
    row = facts["inference"][dtype]
    assert list(row["cache"]) == list(row["total"]) == ["4", "11"]
    model = NemotronHForCausalLM(config).to(getattr(torch, dtype)).eval()
    for tokens in (4, 11):
        cache = model(draw_ids(model, 3, tokens), use_cache=True).past_key_values
        held = size(t for layer in cache.layers for t in layer.tensors().values())
        assert row["cache"][str(tokens)] == held
        assert row["total"][str(tokens)] == held + row["weights"]


def test_it_agrees_with_the_other_table(info: Info, capfd: pytest.CaptureFixture[str]) -> None:
    for name in family.PRESETS:
        if "puzzle" in name:
            continue
        facts = info(name)
        assert main(["info", name, "--json"]) == 0
        memory = json.loads(capfd.readouterr().out)["memory"]
        for form, row in facts["inference"].items():
            assert {"weights": row["weights"]} | row["total"] == memory[form]
        parameters = facts["parameters"]
        assert sum(unit.number * unit.parameters for unit in units_of(name)) == parameters
        assert facts["training"]["float32"]["total"] == pytest.approx(16 * parameters, rel=1e-4)


def units_of(name: str) -> list[family.Unit]:
    return list(family.units(family.describe(family.preset(name))))


def test_packed_formats_of_the_largest_layer(info: Info) -> None:
    facts = info("nemotron-3-nano-30b-a3b")
    biases = 128
    plain = facts["largest_layer"]["parameters"] - biases
    assert facts["inference"]["int8"]["largest_layer"] == plain * 1.0078125 + 4 * biases
    assert facts["inference"]["int4"]["largest_layer"] == math.ceil(plain * 0.52734375) + 4 * biases


def test_text(info: Info, capfd: pytest.CaptureFixture[str]) -> None:
    """The tables for people have the numbers of those for machines; without a model it is the shipped one."""
    options = ["--context", "2000", "--batch", "2"]
    facts = info(demo_model(), *options)
    assert main(["info", "--memory", *options]) == 0
    head, *tables = capfd.readouterr().out.split("\n\n")
    assert f"{facts['parameters']:,}" in head
    assert f"{facts['lora']['parameters']:,}" in head
    assert "batch          2;" in head
    assert "activations are not in them" in head
    rows = [re.split(r"\s{2,}", line) for table in tables for line in table.splitlines()]
    expected = [["inference", "largest layer", "weights", "+ 2,000 tokens"]]
    for name, row in facts["inference"].items():
        expected.append([name, *map(shown, (row["largest_layer"], row["weights"], row["total"]["2000"]))])
    expected.append(["cache", "2,000 tokens"])
    expected += [[name, shown(facts["inference"][name]["cache"]["2000"])] for name in ("float32", "bfloat16")]
    parts = ["weights", "gradients", "masters", "optimizer", "total"]
    expected.append(["training, AdamW", *parts])
    for suffix, table in (("", facts["training"]), (", LoRA r=16", facts["lora"])):
        expected += [[n + suffix, *(shown(table[n][part]) for part in parts)] for n in ("float32", "bfloat16")]
    assert rows == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--context", "5"], "belong to --memory"),
        (["--batch", "5"], "belong to --memory"),
        (["--memory", "--batch", "0"], "--batch 0: must be at least 1"),
        (["--memory", "--context", "7", "--context", "-1"], "--context -1: must be at least 1"),
        (["--memory", "--context", "many"], "'--context'"),
        (["no-such-model", "--memory"], "no-such-model"),
    ],
)
def test_wrong_use(capfd: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["info", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert words in err
