"""generation_config.json with values of the wrong type: refused at load, with key, value and rule; sound ones load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import nemotron_h
from helpers import tiny_model
from nemotron_h import NemotronHForCausalLM, NemotronHModel
from nemotron_h.errors import CheckpointError

COUNTS = ("max_length", "max_new_tokens", "num_beams", "num_return_sequences", "prompt_lookup_num_tokens")
FROM_ZERO = ("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size")
IDS = ("bos_token_id", "pad_token_id", "forced_bos_token_id")
SHARES = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
POSITIVE = ("repetition_penalty", "max_time")
REAL = ("length_penalty", "guidance_scale")
FLAGS = ("do_sample", "use_cache", "use_mtp", "renormalize_logits", "output_scores", "return_dict_in_generate")
BAD: list[tuple[str, Any]] = [
    *((key, value) for key in COUNTS for value in ("x", 1.5, 0, -1, True, [1])),
    *((key, value) for key in (*FROM_ZERO, *IDS) for value in ("x", 1.5, -1, False, {})),
    *((key, value) for key in SHARES for value in ("x", -0.1, 1.1, True, [0.5])),
    *((key, value) for key in POSITIVE for value in ("x", 0, -1.0, True)),
    *((key, value) for key in REAL for value in ("x", True, [])),
    *((key, value) for key in ("temperature", "penalty_alpha") for value in ("hot", -1.0, True, [1.0])),
    *((key, value) for key in FLAGS for value in ("yes", 1, 0, [])),
    *((key, value) for key in ("eos_token_id", "forced_eos_token_id") for value in ("x", [], [2, "x"], -1, 1.5, True)),
    *((key, value) for key in ("suppress_tokens", "begin_suppress_tokens") for value in ("x", 5, [1.5], ["x"])),
    *(("bad_words_ids", value) for value in (5, [], [5], [[]], [["x"]])),
    *(("stop_strings", value) for value in (5, [5], {})),
    *(("early_stopping", value) for value in (1, "always")),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    tiny_model(hybrid_override_pattern="M", hidden_size=8).save_pretrained(directory)
    return directory


def test_nonsense_is_refused_at_load(saved: Path) -> None:
    nemotron_h.register()
    file = saved / "generation_config.json"
    for number, (key, value) in enumerate(BAD):
        file.write_text(json.dumps({key: value}))
        loaders: list[Any] = [NemotronHForCausalLM]
        if number % 20 == 0:  # they all come to the same place
            loaders += [NemotronHModel, AutoModelForCausalLM]
        for cls in loaders:
            with pytest.raises(CheckpointError) as error:
                cls.from_pretrained(saved)
            text = str(error.value)
            assert text.startswith(f"{file}: {key}={value!r}: must be "), text
            assert "\n" not in text


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2, 11], "pad_token_id": 0, "do_sample": True,
         "temperature": 1.0, "top_p": 1, "transformers_version": "4.48.3"},
        {"temperature": 0.0, "top_p": 0.95, "top_k": 0, "max_length": 20, "min_length": 0, "repetition_penalty": 1.2},
        {"eos_token_id": None, "temperature": None, "stop_strings": ["a", "b"], "early_stopping": "never"},
        {"suppress_tokens": [], "bad_words_ids": [[3, 4]], "num_beams": 2, "length_penalty": -1.0, "guidance_scale": 1},
        {"some_key_of_a_later_version": "x"},
    ],
)  # fmt: skip
def test_sound_values_are_kept(saved: Path, values: dict[str, Any]) -> None:
    (saved / "generation_config.json").write_text(json.dumps(values))
    model = NemotronHForCausalLM.from_pretrained(saved)
    expected = GenerationConfig.from_dict(dict(values))
    for key in values:
        assert getattr(model.generation_config, key) == getattr(expected, key), key
    stop = None if model.generation_config.stop_strings else {"max_new_tokens": 2}
    if stop:
        assert model.generate(torch.tensor([[3, 5]]), **stop).shape[1] <= 4


def test_what_transformers_writes_is_read(saved: Path) -> None:
    """Every default of it, written out, passes the table."""
    written = GenerationConfig(max_new_tokens=3, eos_token_id=[2, 11], do_sample=True, top_k=5).to_dict()
    (saved / "generation_config.json").write_text(json.dumps(written))
    assert NemotronHForCausalLM.from_pretrained(saved).generation_config.top_k == 5
