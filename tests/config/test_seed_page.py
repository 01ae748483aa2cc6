"""The documented signature is true of our class: names, order, defaults, attributes, and a text for each."""

import ast
import inspect
import math
import re
from typing import Any

import pytest
from config_cases import DATA

from nemotron_h import NemotronHConfig, family

LINES = (DATA / "seed_config_signature.txt").read_text().splitlines()
SIGNATURE = " ".join(line for line in LINES if not line.startswith("#"))


def documented() -> dict[str, Any]:
    """Names and defaults of the documentation page's signature."""
    pairs = re.findall(r"(\w+) = (.+?)(?= \w+ = | \*\*kwargs)", SIGNATURE)
    return {name: ast.literal_eval(value.replace("inf", "1e999")) for name, value in pairs}


SEED = documented()
ATTRIBUTES = SEED | {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "num_hidden_layers": 4}


def test_the_whole_page_was_parsed() -> None:
    assert len(SEED) == SIGNATURE.count(" = ") == 55
    assert SEED["mamba_dt_limit"] == (0.0, math.inf)
    assert SEED["mtp_layers_block_type"] == ["attention", "moe"]
    assert SEED["rescale_prenorm_residual"] is True


@pytest.mark.parametrize("name", SEED)
def test_default_is_the_documented_one(name: str) -> None:
    parameter = inspect.signature(NemotronHConfig).parameters[name]
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    assert (type(parameter.default), parameter.default) == (type(SEED[name]), SEED[name])
    value = getattr(NemotronHConfig(), name)
    assert (type(value), value) == (type(ATTRIBUTES[name]), ATTRIBUTES[name])


@pytest.mark.parametrize("name", SEED)
def test_documented_default_may_be_given(name: str) -> None:
    assert NemotronHConfig(**{name: SEED[name]}) == NemotronHConfig()


@pytest.mark.parametrize("name", sorted({*SEED, *family.FIELDS}))
def test_docstring_says_what_it_does(name: str) -> None:
    entry = re.search(rf"^    {name} \(defaults to `([^`]*)`\): (.+)$", inspect.getdoc(NemotronHConfig) or "", re.M)
    assert entry, f"no entry for {name}"
    assert entry[1] == repr(inspect.signature(NemotronHConfig).parameters[name].default)
    assert len(entry[2].split()) >= 3


def test_signature_has_the_documented_order() -> None:
    parameters = inspect.signature(NemotronHConfig).parameters
    assert [name for name in parameters if name in SEED] == list(SEED)
    assert set(family.FIELDS) < set(parameters)
    assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
