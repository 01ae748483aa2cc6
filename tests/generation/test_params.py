"""`SamplingParams`: defaults, ranges, and what every hostile value meets."""

import dataclasses
import math
from typing import Any

import pytest

from nemotron_h import SamplingParams
from nemotron_h.errors import InputError, UnsupportedError

HOSTILE: list[Any] = [
    -1, 0, 1.5, math.nan, math.inf, -math.inf, 1e308, -1e308, 2**70, -(2**70), 10**400, 10**5000, "5", "", b"5", True,
    None, [], {}, [[]], Ellipsis,
]  # fmt: skip

# For each parameter the hostile values that are legal, and some more on either side of its bounds.
TABLE: dict[str, tuple[list[Any], list[Any], list[Any]]] = {
    "max_tokens": ([], [1, 2**31 - 1], [2**31]),
    "temperature": ([0, 1.5], [0.0, 1e-300, 100], [100.1, -0.1]),
    "top_p": ([], [1, 1.0, 1e-300], [1.0001, 0.0]),
    "top_k": ([0], [1, 2**31 - 1], [2**31]),
    "min_p": ([0], [1, 0.5], [1.0001, -0.1]),
    "repetition_penalty": ([1.5], [0.01, 1, 100], [0.0, 0.009, 100.1]),
    "presence_penalty": ([-1, 0, 1.5], [-100, 100.0], [-100.1, 100.1]),
    "frequency_penalty": ([-1, 0, 1.5], [-100, 100.0], [-100.1, 100.1]),
    "seed": ([0, None], [2**62], [2**62 + 1]),
    "stop": (
        ["5", None, []],
        ["x" * 1024, ["a"] * 64, ("a", "b")],
        ["x" * 1025, ["a"] * 65, [""], ["a", ""], ["a", 5], ["a", None], {"a"}],
    ),
    "stop_token_ids": ([None, []], [[0, 5], (7,)], [[-1], [1.0], [True], ["5"], [None], 5, {5}]),
    "ignore_eos": ([True], [False], [1, "True"]),
    "logprobs": ([0, None], [1000], [1001]),
    "prompt_logprobs": ([0, None], [1000], [1001]),
    "logit_bias": (
        [None, {}],
        [{5: -100, 0: 100.0}],
        [
            *[{5: v} for v in (100.1, 1e30, math.nan, math.inf, "1", None, True, 10**400)],
            *[{key: 1.0} for key in (-1, "5", 5.0, True, None)],
            [(5, 1.0)],
        ],
    ),
    "n": ([], [1, 1024], [1025]),
    "adapter": (["5", "", None], ["a name"], [["a"], {"a"}]),
}


def same(a: Any, b: Any) -> bool:
    """Equal and of one type: `True` is not 1 here."""
    return type(a) is type(b) and a == b


def label(value: Any) -> str:
    """An id for pytest: some of the values have no repr."""
    return f"10^{len(bin(value)) // 3.32:.0f}" if type(value) is int and abs(value) > 10**20 else repr(value)[:30]


LEGAL = [(name, value) for name, (hostile, legal, _) in TABLE.items() for value in hostile + legal]
ILLEGAL = [
    (name, value)
    for name, (legal, _, illegal) in TABLE.items()
    for value in [v for v in HOSTILE if not any(same(v, ok) for ok in legal)] + illegal
]


def test_the_table_has_every_parameter() -> None:
    later = {"thinking_budget", "json_schema", "regex", "grammar"}
    assert {field.name for field in dataclasses.fields(SamplingParams)} == TABLE.keys() | later


@pytest.mark.parametrize(("name", "value"), LEGAL, ids=label)
def test_legal_values(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), ILLEGAL, ids=label)
def test_illegal_values_name_the_parameter_and_its_range(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{name}=.*: must be (a|an|one|True) ?") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 250  # whatever was given


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("max_tokens", "from 1 to 2147483647"),
        ("temperature", "from 0 to 100"),
        ("top_p", r"\(0, 1\]"),
        ("top_k", r"from 0 \(all\) to 2147483647"),
        ("min_p", r"\[0, 1\]"),
        ("repetition_penalty", "from 0.01 to 100"),
        ("presence_penalty", "from -100 to 100"),
        ("frequency_penalty", "from -100 to 100"),
        ("seed", r"from 0 to 2\*\*62"),
        ("stop", "at most 64 texts, each of 1 to 1024 characters"),
        ("stop_token_ids", ">= 0"),
        ("logprobs", "from 0 to 1000"),
        ("prompt_logprobs", "from 0 to 1000"),
        ("logit_bias", "from -100 to 100"),
        ("n", "from 1 to 1024"),
    ],
)
def test_messages_state_the_range(name: str, bounds: str) -> None:
    with pytest.raises(InputError, match=bounds):
        SamplingParams(**{name: object()})


@pytest.mark.parametrize("name", ["thinking_budget", "json_schema", "regex", "grammar"])
@pytest.mark.parametrize("value", [0, {}, "", "x", False])
def test_parameters_of_later_versions(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=name):
        SamplingParams(**{name: value})
    assert getattr(SamplingParams(**{name: None}), name) is None


def test_defaults() -> None:
    params = SamplingParams()
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.min_p) == (128, 1.0, 1.0, 0, 0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty, params.n) == (1, 0, 0, 1)
    assert (params.seed, params.stop, params.logprobs, params.ignore_eos) == (None, None, None, False)


@pytest.mark.parametrize(("stop", "stops"), [(None, []), ("a", ["a"]), (["a", "b"], ["a", "b"]), (("a",), ["a"])])
def test_stop_as_a_list(stop: Any, stops: list[str]) -> None:
    assert SamplingParams(stop=stop).stops == stops


def test_parameters_are_named_and_known() -> None:
    with pytest.raises(TypeError):
        SamplingParams(16)  # type: ignore[misc]
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 2.0  # type: ignore[misc]
