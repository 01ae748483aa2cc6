"""The names that users type: which there are, where they come from, their arguments, and what importing them costs."""

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import fresh
import nemotron_h
from nemotron_h import errors

ALL = [
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "InputError",
    "KernelError",
    "LLM",
    "MissingDependencyError",
    "ModelNotFoundError",
    "NemotronHConfig",
    "NemotronHError",
    "NemotronHForCausalLM",
    "NemotronHHybridDynamicCache",
    "NemotronHModel",
    "SamplingParams",
    "UnsupportedError",
    "__version__",
    "demo_model",
    "load_adapter",
    "lora_targets",
    "peft_compat",
    "presets",
    "register",
    "register_block",
]


def python(code: str) -> Any:
    """What a fresh interpreter prints, as JSON."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return json.loads(run.stdout)


# Names


def test_all_is_exact() -> None:
    assert sorted(nemotron_h.__all__) == ALL
    assert dir(nemotron_h) == ALL


@pytest.mark.parametrize("name", ALL)
def test_every_name_is_there(name: str) -> None:
    value = getattr(nemotron_h, name)
    assert name == "__version__" or value is getattr(import_module(nemotron_h._WHERE[name]), name)
    assert name == "__version__" or inspect.getdoc(value)


def test_star_import() -> None:
    namespace: dict[str, Any] = {}
    exec("from nemotron_h import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(ALL)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match=r"'nemotron_h'.*'NemotronHForCausalML'"):
        _ = nemotron_h.NemotronHForCausalML  # type: ignore[attr-defined]


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(nemotron_h.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == nemotron_h._WHERE
    assert sorted([*seen, "__version__"]) == ALL


def test_version_is_the_packages() -> None:
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', pyproject, re.MULTILINE)[1] == nemotron_h.__version__  # type: ignore[index]


# Importing


HEAVY = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "jinja2", "typer", "rich")
MEASURE = """
import sys, time, json
before = set(sys.modules); start = time.process_time()
import nemotron_h
seconds = time.process_time() - start
{more}
print(json.dumps([seconds, sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})]))
"""


def test_import_is_light_and_fast() -> None:
    seconds, modules = python(MEASURE.format(more="nemotron_h.__all__; nemotron_h.__version__"))
    assert not set(HEAVY) & set(modules)
    assert seconds < 0.1


@pytest.mark.parametrize("name", ["presets", "demo_model"])
def test_names_that_need_no_torch(name: str) -> None:
    _, modules = python(MEASURE.format(more=f"nemotron_h.{name}()"))
    assert not set(HEAVY) & set(modules)


def test_import_changes_nothing_in_transformers() -> None:
    code = """
import json, transformers
from transformers import AutoConfig, AutoModelForCausalLM
before = transformers.NemotronHConfig.__module__
from nemotron_h import LLM, NemotronHForCausalLM, NemotronHConfig, register
import torch
plain = AutoConfig.for_model("nemotron_h").__class__.__module__
dtype, grad = str(torch.get_default_dtype()), torch.is_grad_enabled()
register()
register()
ours = AutoConfig.for_model("nemotron_h").__class__.__module__
print(json.dumps([before, plain, ours, transformers.NemotronHConfig.__module__, dtype, grad]))
"""
    before, plain, ours, after, dtype, grad = json.loads(fresh.python(code).stdout)
    assert before == plain == after == "transformers.models.nemotron_h.configuration_nemotron_h"
    assert ours == "nemotron_h.configuration"
    assert (dtype, grad) == ("torch.float32", True)


# Signatures


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Names in order with their defaults, `self` excepted; a name without a default has `...`."""
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "self":
            continue
        stars = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "")
        found[stars + name] = ... if parameter.default is inspect.Parameter.empty else parameter.default
    return found


CAUSAL_LM = [
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels", "use_cache",
    "logits_to_keep", "**kwargs",
]  # fmt: skip
MODEL = ["input_ids", "inputs_embeds", "position_ids", "past_key_values", "use_cache", "attention_mask", "**kwargs"]


def test_forward_takes_the_seed_pages_arguments_in_its_order() -> None:
    causal_lm, model = (parameters(c.forward) for c in (nemotron_h.NemotronHForCausalLM, nemotron_h.NemotronHModel))
    assert list(causal_lm) == CAUSAL_LM
    assert causal_lm.pop("logits_to_keep") == 0
    assert list(model) == MODEL
    for found in (causal_lm, model):
        assert found.pop("**kwargs") is ...
        assert set(found.values()) == {None}


def test_engine_and_cache_take_the_interfaces_arguments() -> None:
    llm = nemotron_h.LLM
    assert parameters(llm) == {
        "model": ..., "quantization": None, "dtype": "auto", "device": "cpu", "threads": None, "max_num_seqs": 16,
        "max_model_len": None, "prefix_cache": True, "speculative": None, "num_speculative_tokens": 3, "adapters": None,
    }  # fmt: skip
    assert parameters(llm.generate) == {"prompts": ..., "params": None}
    assert parameters(llm.stream) == {"prompt": ..., "params": None}
    assert parameters(llm.chat) == {"messages": ..., "params": None, "tools": None, "chat_template_kwargs": None}
    assert parameters(llm.score) == {"prompts": ...}
    assert parameters(llm.stats) == {}
    cache = parameters(nemotron_h.NemotronHHybridDynamicCache)
    assert cache == {"config": ..., "batch_size": None, "dtype": None, "device": None, "kv_dtype": None}
    assert [field.name for field in fields(nemotron_h.SamplingParams)] == [
        "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "seed", "stop", "stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs",
        "logit_bias", "n", "thinking_budget", "json_schema", "regex", "grammar", "adapter",
    ]  # fmt: skip


def test_shipped_model_and_presets() -> None:
    assert (nemotron_h.demo_model() / "tokenizer.json").is_file()
    assert len(nemotron_h.presets()) == 12


# Errors


ERRORS = {
    "ConfigError": ValueError,
    "CheckpointError": ValueError,
    "ModelNotFoundError": OSError,
    "InputError": ValueError,
    "UnsupportedError": NotImplementedError,
    "CacheError": ValueError,
    "KernelError": RuntimeError,
    "MissingDependencyError": ImportError,
}


def test_the_table_has_every_error() -> None:
    found = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert found == ERRORS.keys() | {"NemotronHError"}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_ours_and_the_built_in_that_a_caller_expects(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.NemotronHError)
    assert issubclass(error, ERRORS[name])
    assert str(error("expected this, got that")) == "expected this, got that"
    assert inspect.getdoc(error)


def test_a_missing_model_is_a_checkpoint_error_too() -> None:
    assert issubclass(errors.ModelNotFoundError, errors.CheckpointError)
    long = OSError("first line\nsecond line")
    assert str(errors.ModelNotFoundError.of("x", long)) == "x: first line"
    assert str(errors.ModelNotFoundError.of("x", OSError())) == "x: OSError"
