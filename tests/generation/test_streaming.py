"""The text of `LLM`: streams, characters of several bytes, stop texts, conversations."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripting import scripted

from nemotron_h import LLM, SamplingParams
from nemotron_h.errors import InputError
from nemotron_h.generation import Event

PROMPT = [40, 1999, 300, 300, 17, 901]
TEXT = "Yes, I am: héllo 👩‍👩‍👧 日本語 🇩🇪, the end of it."


def run(llm: LLM, text: str, **kwargs: object) -> tuple[list[Event], list[int]]:
    """The stream of a model that would say `text` and then </s>; and the ids of it. `generate` must say the same."""
    ids = llm.tokenizer(text)["input_ids"]
    params = SamplingParams(temperature=0, **{"max_tokens": len(ids) + 5, **kwargs})  # type: ignore[arg-type]
    with scripted(llm, [*ids, 2]):
        events = list(llm.stream(PROMPT, params))
    with scripted(llm, [*ids, 2]):
        result = llm.generate(PROMPT, params)[0]
    assert result.text == "".join(event.text for event in events)
    assert result.token_ids == [event.token_id for event in events]
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == result.finish_reason
    return events, ids


def test_a_stream_of_samples_is_the_result(llm: LLM) -> None:
    params = SamplingParams(seed=2, max_tokens=20, logprobs=1, ignore_eos=True)
    events, result = list(llm.stream("Once", params)), llm.generate("Once", params)[0]
    assert "".join(event.text for event in events) == result.text
    assert [event.token_id for event in events] == result.token_ids
    assert [event.logprobs for event in events] == result.logprobs
    assert len(events) == 20


def test_text_arrives_as_soon_as_it_is_certain(llm: LLM) -> None:
    events, ids = run(llm, TEXT)
    assert "".join(event.text for event in events) == TEXT
    decode = llm.tokenizer.decode
    for count in range(1, len(ids) + 1):
        certain = decode(ids[:count]).rstrip("\ufffd")
        assert "".join(event.text for event in events[:count]) == certain
    assert (events[-1].token_id, events[-1].finish_reason, events[-1].text) == (2, "stop", "")


def test_unfinished_character_is_shown_as_such_at_the_end(llm: LLM) -> None:
    events, ids = run(llm, "a👩", max_tokens=3)
    assert len(ids) > 3  # the character is cut
    assert [event.text for event in events] == ["a", "", "\ufffd"]
    assert events[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("héllo", "Yes, I am: "),
        (["nowhere", "the end"], TEXT[: TEXT.index("the end")]),
        (["the end", "I am"], "Yes, "),
        ("👩‍👧", "Yes, I am: héllo 👩‍"),
        ("Yes", ""),
        (("of it.",), TEXT[: TEXT.index("of it.")]),
        ("end of it. And", TEXT),
        ([], TEXT),
    ],
)
def test_stop_texts(llm: LLM, stop: str | list[str], expected: str) -> None:
    events, ids = run(llm, TEXT, stop=stop)
    assert "".join(event.text for event in events) == expected
    assert events[-1].finish_reason == "stop"
    found = [s for s in ([stop] if isinstance(stop, str) else stop) if s in TEXT]
    if found:  # the last token is the one that completes a stop text
        said = [event.token_id for event in events]
        decode = llm.tokenizer.decode
        assert any(s in decode(said) for s in found)
        assert not any(s in decode(said[:-1]) for s in found)
        assert said == ids[: len(said)]


def test_what_may_become_a_stop_text_is_held_back(llm: LLM) -> None:
    events, _ = run(llm, "count: one, two, three", stop="one, two, four", max_tokens=50)
    shown = ["".join(event.text for event in events[: i + 1]) for i in range(len(events))]
    assert "".join(event.text for event in events) == "count: one, two, three"
    assert not any(text.endswith((" o", " on", " one", " one,", " one, t", " one, two", "two, ")) for text in shown)
    cut, _ = run(llm, "count: one, two, three", stop="one, two, four", max_tokens=5)
    assert "".join(event.text for event in cut).startswith("count: ")
    assert cut[-1].finish_reason == "length"
    assert cut[-1].text  # what was held back comes with the last token


@settings(max_examples=60)
@given(text=st.text("ab👩é ", min_size=1, max_size=12), stop=st.lists(st.text("ab👩é ", min_size=1, max_size=3)))
def test_no_stream_shows_a_stop_text(shared_llm: LLM, text: str, stop: list[str]) -> None:
    events, _ = run(shared_llm, text, stop=stop)
    shown = "".join(event.text for event in events)
    assert text.startswith(shown)
    assert not any(s in shown for s in stop)
    first = min((text.find(s) for s in stop if s in text), default=len(text))
    assert shown == text[:first] or len(shown) > first  # a later stop text may be complete first
    ends = [text.find(s) + len(s) for s in stop if s in text]
    assert len(shown) <= min(ends, default=len(text))


def test_chat_is_generate_with_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    answer = llm.chat(messages, params)
    assert answer.prompt_token_ids == llm.encode_chat(messages)
    assert answer == llm.generate([llm.encode_chat(messages)], params)[0]
    assert answer.prompt_token_ids[0] == 10


def test_a_text_of_megabytes_is_refused_before_it_is_tokenized(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "The quick brown fox. " * 200_000
    monkeypatch.setattr(llm._text, "encode", lambda _: pytest.fail("tokenized 4 MB"))
    with pytest.raises(InputError, match=r"tokens or more, max_model_len=512"):
        llm.generate(text)
