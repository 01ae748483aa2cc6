"""`LLM.generate` on a list: texts that decode together are, bit for bit, those that each prompt has alone."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from scripting import hooked

from helpers import tiny_model
from nemotron_h import LLM, NemotronHForCausalLM, SamplingParams
from nemotron_h.generation import Completion, Result
from nemotron_h.generation.batch import most_rows
from nemotron_h.ops import _native, block_step
from nemotron_h.ops.linear import native as linear

MODELS: dict[str, tuple[dict[str, Any], torch.dtype, str | None]] = {
    "float32": ({}, torch.float32, None),
    "bfloat16": ({"sliding_window": 3}, torch.bfloat16, None),
    "int4": ({}, torch.bfloat16, "int4"),
    "int8, float32": ({"moe_latent_size": 24, "attention_bias": True, "mlp_bias": True}, torch.float32, "int8"),
    "bf16 panels": ({"hybrid_override_pattern": "M*EM*-M", "residual_in_fp32": True}, torch.bfloat16, "bf16"),
    "states in bfloat16": ({"mamba_ssm_cache_dtype": "bfloat16"}, torch.bfloat16, "int4"),
    "Mamba alone": ({"hybrid_override_pattern": "MM"}, torch.float32, None),
    "attention alone": ({"hybrid_override_pattern": "*-*"}, torch.bfloat16, "int8"),
}


def made(name: str) -> NemotronHForCausalLM:
    changes, dtype, quantization = MODELS[name]
    model = tiny_model(eos_token_id=7, max_position_embeddings=64, **changes).to(dtype).eval()
    if quantization is not None:
        model.quantize(quantization)
    return model


@pytest.fixture(autouse=True)
def unchecked(environment: Callable[..., None]) -> None:
    """Texts decode together only where nobody asked for a check of every op."""


@contextmanager
def passes(llm: LLM) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens of every pass of the model."""
    seen: list[tuple[int, int]] = []
    with hooked(llm, lambda _module, args, _output: seen.append(tuple(args[0].shape))):
        yield seen


def draw_params(rng: random.Random, **fixed: Any) -> SamplingParams:
    drawn: dict[str, Any] = {
        "max_tokens": rng.choice((1, 2, 3, 5, 8, 13)),
        "temperature": rng.choice((0, 0, 0.6, 1.0, 1.7)),
        "seed": rng.randrange(1000),
        "n": rng.choice((1, 1, 1, 2, 5)),
        "ignore_eos": rng.random() < 0.5,
        "logprobs": rng.choice((None, 0, 3)),
        "prompt_logprobs": rng.choice((None, None, 1)),
        "stop_token_ids": rng.choice((None, rng.sample(range(50), 4))),
    }
    for name, values in {
        "top_k": (0, 3), "top_p": (1.0, 0.8), "min_p": (0.0, 0.05), "repetition_penalty": (1.0, 1.3),
        "presence_penalty": (0.0, 0.7), "frequency_penalty": (0.0, 0.4), "logit_bias": (None, {3: 2.0, 11: -1.0}),
    }.items():  # fmt: skip
        drawn[name] = rng.choice(values)
    return SamplingParams(**{**drawn, **fixed})


def draw_prompts(rng: random.Random, count: int, vocabulary: int = 50) -> list[list[int]]:
    return [[rng.randrange(vocabulary) for _ in range(rng.choice((1, 2, 3, 5, 9, 17, 40)))] for _ in range(count)]


def alone(llm: LLM, prompt: Any, params: SamplingParams) -> Result:
    """The result of a call for each sample: one sequence, which keeps the cache of its prompt."""
    results = []
    for sample in range(params.n):
        with passes(llm) as seen:
            seed = None if params.seed is None else params.seed + sample
            results += llm.generate([prompt], replace(params, n=1, seed=seed))
        assert {rows for rows, _ in seen} == {1}
    outputs = [result.outputs[0] for result in results]
    usage = replace(results[0].usage, completion_tokens=sum(len(output.token_ids) for output in outputs))
    return replace(results[0], outputs=outputs, usage=usage)


def assert_same(found: list[Result], expected: list[Result]) -> None:
    """Dataclasses of numbers: equal where every bit is (no logarithm here is a zero with a sign or NaN)."""
    assert [result.prompt_token_ids for result in found] == [result.prompt_token_ids for result in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == other


@pytest.mark.parametrize("name", MODELS)
def test_bits_of_each_alone(name: str) -> None:
    model, rng = made(name), random.Random(name)
    llm, reasons = LLM(model), set()
    for seats in (2, 3, 16, 16):
        prompts = draw_prompts(rng, rng.choice((2, 5, 14)))
        params = [draw_params(rng) for _ in prompts]
        expected = [alone(llm, *each) for each in zip(prompts, params, strict=True)]
        llm.max_num_seqs = seats
        with passes(llm) as seen:
            assert_same(llm.generate(prompts, params), expected)
        prefills = [(1, len(prompt)) for prompt in prompts]
        assert sorted(each for each in seen if each[1] > 1) == sorted(each for each in prefills if each[1] > 1)
        assert max(rows for rows, _ in seen) <= seats
        reasons |= {output.finish_reason for result in expected for output in result.outputs}
    assert reasons == {"stop", "length"}
