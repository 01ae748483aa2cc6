"""Fresh processes: PEFT as it is with files of ours, this package without PEFT, adapters from a hub."""

import json
import os
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from hub_stand_in import running_hub
from peft_cases import adapted, build, logits, saved, without

import fresh
from helpers import assert_close
from nemotron_h import ModelNotFoundError, load_adapter, lora_targets
from nemotron_h.adapters import export_adapter

# What PEFT's own functions are before and after, by their code; `show` prints the logits of the test's tokens.
UNTOUCHED = """
import hashlib, inspect, json, sys, types
import peft, peft.tuners.tuners_utils as utils, peft.tuners.lora.model as lora_model
def code():
    found = {}
    for module in (utils, lora_model, peft.tuners.lora.layer, peft.peft_model, peft.utils.save_and_load):
        for name, value in vars(module).items():
            for one in [value, *(vars(value).values() if isinstance(value, type) else [])]:
                if isinstance(one, types.FunctionType):
                    found[f"{module.__name__}.{name}.{one.__name__}"] = hashlib.md5(one.__code__.co_code).hexdigest()
    return found
before = code()
import torch
torch.set_num_threads(1)
from peft import LoraConfig, PeftModel, get_peft_model
from nemotron_h import NemotronHForCausalLM, load_adapter, peft_compat, register
root = sys.argv[1]
ids = torch.tensor(json.loads(sys.argv[2]))
def model(): return NemotronHForCausalLM.from_pretrained(f"{root}/model")
@torch.no_grad()
def show(m): return m(ids).logits.double().tolist()
def refusal(call):
    try: call()
    except ValueError as error: return str(error)
results = {}
results["plain"] = show(PeftModel.from_pretrained(model(), f"{root}/inner"))
results["refusal"] = refusal(lambda: PeftModel.from_pretrained(model(), f"{root}/all"))
m = model()
with peft_compat(m):
    m = PeftModel.from_pretrained(m, f"{root}/all")
results["in context"] = show(m)
results["name"] = m.config.model_type
results["load_adapter"] = show(load_adapter(model(), f"{root}/all"))
m = model()
with peft_compat(m):
    m = get_peft_model(m, LoraConfig(target_modules=["out_proj"]))
m.save_pretrained(f"{root}/saved later")
results["saved"] = show(load_adapter(model(), f"{root}/saved later"))
results["base"] = show(model())
results["refusal after"] = refusal(lambda: PeftModel.from_pretrained(model(), f"{root}/all"))
results["untouched"] = code() == before and len(before) > 300
register()
results["registered"] = show(load_adapter(model(), f"{root}/all"))
print(json.dumps(results))
"""


def answer(done: CompletedProcess[str]) -> Any:
    """What it printed last, as JSON."""
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_plain_peft_in_a_fresh_process(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "model")
    ids = torch.arange(40).reshape(2, 20)
    expected = {}
    for name, targets in {"inner": without(lora_targets(model), "out_proj"), "all": lora_targets(model)}.items():
        source = adapted(build(), targets=targets)
        export_adapter(source, tmp_path / name) if name == "inner" else saved(source, tmp_path / name)
        with torch.no_grad():
            expected[name] = source(ids).logits.double()
    results = answer(fresh.python(UNTOUCHED, str(tmp_path), json.dumps(ids.tolist())))
    for name, of in {"plain": "inner", "in context": "all", "load_adapter": "all", "registered": "all"}.items():
        assert_close(torch.tensor(results[name], dtype=torch.float64), expected[of], name, bound=1e-5)
    assert results["saved"] == results["base"]  # a fresh adapter has B = 0
    assert results["refusal"] == results["refusal after"]
    assert "'out_proj' is incompatible with Mamba-based models" in results["refusal"]
    assert results["name"] == "nemotron_h"
    assert results["untouched"] is True


WITHOUT = """
import json, sys
import nemotron_h, nemotron_h.adapters
from nemotron_h import LLM, NemotronHConfig, NemotronHForCausalLM, load_adapter, lora_targets, peft_compat
model = NemotronHForCausalLM(NemotronHConfig(
    vocab_size=8, hidden_size=8, hybrid_override_pattern="M", mamba_num_heads=2, mamba_head_dim=4, mamba_n_groups=1,
    ssm_state_size=4))
targets = lora_targets(model)
with peft_compat(model):
    pass
imported = "peft" in sys.modules
sys.modules["peft"] = None
found = []
from nemotron_h.adapters import allow_expert_dora, export_adapter, merge_adapter
for call in (
    lambda: load_adapter(model, "x"), lambda: export_adapter(model, "x"), lambda: allow_expert_dora(None),
    lambda: merge_adapter(model),
    lambda: LLM(model, adapters={"a": "x"}),
):
    try:
        call()
    except nemotron_h.MissingDependencyError as error:
        found.append(str(error))
print(json.dumps([imported, found, targets, len(LLM(model).generate([[1, 2]], None))]))
"""


def test_without_peft() -> None:
    imported, errors, targets, answers = answer(fresh.python(WITHOUT))
    assert not imported
    assert errors == ["adapters need PEFT: pip install 'nemotron-h[peft]'"] * 5
    modules = ["model.layers.0.mixer.in_proj", "model.layers.0.mixer.out_proj", "lm_head"]
    assert targets == {"target_modules": modules, "target_parameters": []}
    assert answers == 1


FROM_HUB = """
import json, sys
import torch
torch.set_num_threads(1)
from nemotron_h import CheckpointError, ModelNotFoundError, NemotronHForCausalLM, load_adapter
ids = torch.tensor(json.loads(sys.argv[2]))
def load(name, **kwargs):
    model = NemotronHForCausalLM.from_pretrained(sys.argv[1])
    try:
        with torch.no_grad():
            return load_adapter(model, name, **kwargs)(ids).logits.double().tolist()
    except ModelNotFoundError as error:
        return str(error)
print(json.dumps([
    load("me/adapter"), load("me/adapter", subfolder="inner"), load("me/adapter", revision="v1"), load("me/nothing"),
    load("me/pickle"), load("me/adapter", local_files_only=True), load("me/adapter", revision="v9"),
    load("me/truncated")]))
"""


def test_adapters_from_a_hub(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "model")
    sources = {name: adapted(build(), seed=seed) for seed, name in enumerate(("main", "inner", "v1"))}
    saved(sources["main"], tmp_path / "repository")
    saved(sources["inner"], tmp_path / "repository" / "inner")
    saved(sources["v1"], tmp_path / "v1")
    saved(sources["v1"], tmp_path / "pickle").joinpath("adapter_model.safetensors").unlink()
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"never read")
    ids = torch.arange(40).reshape(2, 20)
    with running_hub() as hub:
        hub.add("me/adapter", tmp_path / "repository").add(tmp_path / "v1", "v1")
        hub.add("me/pickle", tmp_path / "pickle")
        hub.add("me/truncated", tmp_path / "v1", broken="truncated")
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "x"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", FROM_HUB, str(tmp_path / "model"), json.dumps(ids.tolist())],
            capture_output=True, text=True, timeout=120, env=os.environ | own | {"HF_HUB_DISABLE_TELEMETRY": "1"},
        )  # fmt: skip
        results = answer(done)
        fetched = hub.files("me/pickle")
    for found, name in zip([*results[:3], results[5]], ["main", "inner", "v1", "main"], strict=True):
        with torch.no_grad():
            expected = sources[name](ids).logits
        assert_close(torch.tensor(found, dtype=torch.float64), expected, name, bound=1e-5)
    parts = ["me/nothing", "me/pickle", "me/adapter", "me/truncated"]
    for message, part in zip([results[index] for index in (3, 4, 6, 7)], parts, strict=True):
        assert part in message
        assert "\n" not in message
    assert "adapter_model.bin" not in fetched


def test_a_hub_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = build()
    base = logits(model)
    with pytest.raises(ModelNotFoundError, match="me/adapter"):
        load_adapter(model, "me/adapter", cache_dir=tmp_path)
    assert torch.equal(logits(model), base)
