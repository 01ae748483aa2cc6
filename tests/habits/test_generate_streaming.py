"""Streamers, stopping criteria and the example of transformers' page, on the shipped model with its tokenizer."""

from pathlib import Path
from queue import Empty
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, TextIteratorStreamer, TextStreamer

from nemotron_h import InputError, NemotronHForCausalLM, demo_model

PAGE = (Path(__file__).parent.parent / "data" / "seed_example.txt").read_text()


@pytest.fixture(scope="module")
def model() -> NemotronHForCausalLM:
    return NemotronHForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_model())


def options(**others: Any) -> dict[str, Any]:
    return {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, **others}


def test_the_pages_example_word_for_word() -> None:
    """Its own lines run, with our class under the name that they import and the shipped model under their hub id."""
    lines = [line.removeprefix(">>> ") for line in PAGE.splitlines() if line.startswith(">>> ")]
    assert lines[0] == "from transformers import AutoTokenizer, NemotronHForCausalLM"
    lines[0] = "from transformers import AutoTokenizer; from nemotron_h import NemotronHForCausalLM"
    *statements, shown = lines
    names: dict[str, Any] = {}
    exec("\n".join(statements).replace('"Zyphra/NemotronH-7B-v1"', repr(str(demo_model()))), names)
    text = eval(shown, names)
    assert text.startswith("Hey, are you conscious? Can you talk to me?")
    assert names["generate_ids"].shape == (1, 30)
    ids = names["inputs"].input_ids
    for position in range(ids.shape[1], 30):  # greedy: each token is the best one after those before it
        logits_V = names["model"](names["generate_ids"][:, :position], use_cache=False).logits[0, -1]
        assert logits_V.max() - logits_V[names["generate_ids"][0, position]] < 0.1  # bfloat16


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_text_streamer(
    model: NemotronHForCausalLM, tokenizer: Any, skip_prompt: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tokenizer("Elizabeth", return_tensors="pt")
    result = model.generate(**inputs, **options(), streamer=TextStreamer(tokenizer, skip_prompt=skip_prompt))
    shown = result[0, inputs.input_ids.shape[1] if skip_prompt else 0 :]
    assert capsys.readouterr().out == tokenizer.decode(shown) + "\n"


@pytest.mark.parametrize("others", [{}, {"use_mtp": True}, {"prompt_lookup_num_tokens": 3}])
def test_iterator_in_a_thread(model: NemotronHForCausalLM, tokenizer: Any, others: dict[str, Any]) -> None:
    inputs = tokenizer("The weather was", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = Thread(target=model.generate, kwargs={**inputs, **options(**others), "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    expected = model.generate(**inputs, **options())[0, inputs.input_ids.shape[1] :]
    assert "".join(pieces) == tokenizer.decode(expected)
    assert len([piece for piece in pieces if piece]) > 3


def test_each_token_reaches_a_streamer_of_ones_own(model: NemotronHForCausalLM, tokenizer: Any) -> None:
    class Ids:
        def __init__(self) -> None:
            self.put_ids: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.put_ids.append(value.flatten().tolist())

        def end(self) -> None:
            self.put_ids.append([])

    streamer, inputs = Ids(), tokenizer("A horse", return_tensors="pt")
    result = model.generate(**inputs, **options(), streamer=streamer)
    assert streamer.put_ids[0] == inputs.input_ids[0].tolist()
    assert [len(ids) for ids in streamer.put_ids[1:]] == [1] * 24 + [0]
    assert sum(streamer.put_ids, []) == result[0].tolist()  # noqa: RUF017
    with pytest.raises(ValueError, match="beam"):
        model.generate(**inputs, **options(num_beams=2), streamer=streamer)


def test_a_failing_pass_ends_the_generation_with_its_error(model: NemotronHForCausalLM, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="vocab_size"):
        model.generate(torch.tensor([[5000]]), **options(), streamer=TextStreamer(tokenizer))


def test_a_failure_in_a_thread_hangs_nobody(model: NemotronHForCausalLM, tokenizer: Any) -> None:
    """The reader's timeout ends its wait; pieces from before the failure arrive."""
    errors: list[Exception] = []

    def fail_late(input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > inputs.input_ids.shape[1] + 8:
            raise RuntimeError("on purpose")
        return scores

    def work() -> None:
        try:
            model.generate(**inputs, **options(), streamer=streamer, logits_processor=[fail_late])
        except RuntimeError as error:
            errors.append(error)

    inputs = tokenizer("The weather was", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=2)
    thread = Thread(target=work)
    thread.start()
    pieces: list[str] = []
    with pytest.raises(Empty):
        pieces.extend(streamer)
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert [str(error) for error in errors] == ["on purpose"]
    expected = model.generate(**inputs, **options(max_new_tokens=9))[0, inputs.input_ids.shape[1] :]
    assert "".join(pieces)
    assert tokenizer.decode(expected).startswith("".join(pieces))


@pytest.mark.parametrize("others", [{}, {"use_mtp": True}, {"num_beams": 2}])
def test_stop_strings(model: NemotronHForCausalLM, tokenizer: Any, others: dict[str, Any]) -> None:
    inputs = tokenizer("Elizabeth was", return_tensors="pt")
    full = tokenizer.decode(model.generate(**inputs, **options(**others, max_new_tokens=40))[0])
    word = full.split()[6]
    stopped = model.generate(
        **inputs, **options(**others, max_new_tokens=40), stop_strings=[f" {word}"], tokenizer=tokenizer
    )
    text = tokenizer.decode(stopped[0])
    assert full.startswith(text.rstrip()) or others.get("num_beams")
    assert f" {word}" in text
    assert len(text) < len(full)


def test_generation_config_object_and_limits(model: NemotronHForCausalLM, tokenizer: Any) -> None:
    inputs = tokenizer("Elizabeth was", return_tensors="pt")
    config = GenerationConfig(max_new_tokens=5, do_sample=True, top_k=1, eos_token_id=None, pad_token_id=0)
    assert model.generate(**inputs, generation_config=config).shape[1] == inputs.input_ids.shape[1] + 5
    greedy = model.generate(**inputs, **options(max_new_tokens=5))
    assert torch.equal(model.generate(**inputs, generation_config=config), greedy)
    assert model.generate(**inputs, **options(max_time=0.0)).shape[1] == inputs.input_ids.shape[1] + 1
    assert model.generate(**inputs, **options(max_new_tokens=None, max_length=9)).shape[1] == 9
