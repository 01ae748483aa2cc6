"""The model that ships with the package: small, complete, and able to write."""

import math
from pathlib import Path

import pytest
import torch

from nemotron_h import LLM, NemotronHForCausalLM, SamplingParams, demo_model

HELD_OUT = Path(__file__).parent / "data" / "held_out_austen.txt"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(demo_model())


def test_size_and_parts() -> None:
    assert sum(file.stat().st_size for file in demo_model().iterdir() if file.is_file()) <= 4_000_000
    config = NemotronHForCausalLM.config_class.from_pretrained(demo_model())
    assert set(config.layers_block_type) == {"mamba", "attention", "moe", "mlp"}
    assert config.moe_latent_size
    assert config.num_nextn_predict_layers == 1
    assert config.vocab_size == 2048
    assert {"README.md", "config.json", "generation_config.json", "tokenizer.json"} <= {
        file.name for file in demo_model().iterdir()
    }


def test_it_is_saved_in_bfloat16(llm: LLM) -> None:
    assert {parameter.dtype for parameter in llm.model.parameters()} == {torch.bfloat16}


def test_bits_per_byte_of_a_text_it_has_not_seen(llm: LLM) -> None:
    text = HELD_OUT.read_text().split("\n\n", 1)[1].strip()
    scores = [score for score in llm.score(text)[0] if score is not None]
    bits = -sum(scores) / math.log(2) / len(text.encode())
    assert bits < 2.2  # an untrained model of this vocabulary needs 3.7


def test_mtp_head_predicts_the_token_after_next(llm: LLM) -> None:
    """Its accuracy one token further is far above chance, so the trunk's output and the embedding meet in order."""
    ids = torch.tensor([llm.tokenizer(HELD_OUT.read_text())["input_ids"][:600]])
    with torch.no_grad():
        out = llm.model(ids, output_mtp_logits=True)
    hits = (out.mtp_logits[0][0, :-1].argmax(-1) == ids[0, 2:]).float().mean()
    assert hits > 0.15


def test_it_writes(llm: LLM) -> None:
    first, second = (llm.generate("Elizabeth", SamplingParams(max_tokens=40, seed=1))[0] for _ in range(2))
    assert first.text == second.text
    assert len(first.text.split()) > 5


def test_it_answers_in_chat(llm: LLM) -> None:
    result = llm.chat([{"role": "user", "content": "What is a horse?"}], SamplingParams(max_tokens=60, temperature=0))
    assert result.text.startswith("A horse is ")
