"""A random model with the shipped tokenizer."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripting import TOKENIZER

from helpers import tiny_model
from nemotron_h import LLM, demo_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four block types, 2048 tokens; its end tokens: 5 and 9 by generation_config, 7 by the config."""
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny_model(vocab_size=2048, eos_token_id=7, max_position_embeddings=512).save_pretrained(directory)
    for name in TOKENIZER:
        shutil.copy(demo_model() / name, directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9], "pad_token_id": 0}))
    return directory


@pytest.fixture(scope="session")
def shared_llm(checkpoint: Path) -> LLM:
    """The engine of that checkpoint, not to be changed."""
    return LLM(checkpoint)


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """The same; a test may set its limits."""
    limit, threads = shared_llm.max_model_len, shared_llm.threads
    yield shared_llm
    shared_llm.max_model_len, shared_llm.threads = limit, threads
