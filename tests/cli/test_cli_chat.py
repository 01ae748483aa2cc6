"""`chat`: turns, commands, reasoning, and what Ctrl-C does; piped, and at a pretended terminal."""

import io
import signal
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_h import LLM, SamplingParams
from nemotron_h.cli import chat as module
from nemotron_h.cli.chat import Chat, Reasoning
from nemotron_h.errors import InputError
from nemotron_h.generation import Event


@pytest.fixture
def talk(run, monkeypatch, talker):
    """`talk("line", ...)`: a piped conversation with the random model."""

    def piped(*lines, options=("--temperature", "0", "--max-tokens", "6")):
        content = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return run("chat", talker, *options)

    return piped


@pytest.fixture(scope="module")
def llm(talker):
    return LLM(talker)


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text):
    return {"role": "assistant", "content": text.strip()}


GREEDY = SamplingParams(temperature=0, max_tokens=6)
JSON = ("--temperature", "0", "--max-tokens", "6", "--json")


def test_a_line_is_a_turn(talk, llm):
    first = [_user("Hello")]
    first.append(_assistant(llm.chat(first, GREEDY).text))
    second = [*first, _user("And now?")]
    second.append(_assistant(llm.chat(second, GREEDY).text))
    outcome = talk("Hello", "", "And now?", options=JSON)
    assert outcome.status == 0
    assert outcome.json["messages"] == second
    assert outcome.json["stats"]["steps"] > 0
    text = talk("Hello", "", "And now?")
    assert text.status == 0
    assert [line.strip() for line in text.out.splitlines()] == [m["content"] for m in second[1::2]]


def test_commands(talk):
    lines = ["Hi", "/system Be brief", "One", "/reset", "/set temperature=0.3", "/set", "Two", "/quit", "Three"]
    outcome = talk(*lines, options=JSON)
    messages = outcome.json["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert (messages[0]["content"], messages[1]["content"]) == ("Be brief", "Two")
    assert "temperature=0.3" in outcome.err


def test_help_names_every_command(talk):
    outcome = talk("/help")
    assert outcome.status == 0
    assert all(name in outcome.err for name in ("/reset", "/system", "/set", "/quit"))


def test_a_system_message_from_the_start(talk):
    outcome = talk("Hi", options=(*JSON, "--system", "Be brief"))
    assert outcome.json["messages"][0] == {"role": "system", "content": "Be brief"}


def test_thinking_reaches_the_template(talk, monkeypatch):
    seen = []
    monkeypatch.setattr(LLM, "encode_chat", lambda self, messages, tools, template: seen.append(template) or [5])
    for option in ([], ["--thinking"], ["--no-thinking"]):
        assert talk("Hi", options=["--max-tokens", "1", *option]).status == 0
    assert seen == [{}, {"enable_thinking": True}, {"enable_thinking": False}]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/dance", "/dance: no such command"),
        ("/set temperature=-1", "temperature=-1"),
        ("/set colour=red", "temperature"),
        ("/set temperature", "NAME=VALUE"),
        ("/set regex=a", "not in this version"),
        ("a\udcff", "not valid UTF-8"),
        ("word " * 600, "max_model_len"),
    ],
)
def test_a_wrong_line_ends_a_piped_conversation(talk, line, words):
    outcome = talk(line, "Hi")
    assert outcome.status == 2
    assert words in outcome.error
    assert outcome.out == ""


def test_wrong_use(talk, run, mute, monkeypatch):
    assert "system message" in talk(options=["--system", "a\udcff"]).error
    assert talk(options=["--adapter", "x"]).status == 2
    assert talk(options=["--max-tokens", "0"]).status == 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
    outcome = run("chat", mute)
    assert outcome.status == 2
    assert "no tokenizer" in outcome.error


def test_no_input_at_all(run, talker, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert run("chat", talker).status == 0


# At a terminal


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(run, monkeypatch, talker):
    """`terminal(line or exception, ...)`: what a person types; the end of input follows."""

    def typed(*events, options=("--temperature", "0", "--max-tokens", "6")):
        waiting = iter(events)

        def ask():
            event = next(waiting, EOFError())
            if isinstance(event, BaseException):
                raise event
            return event

        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr(module, "_asker", lambda: ask)
        return run("chat", talker, *options)

    return typed


def test_errors_and_ctrl_c_at_the_prompt_do_not_end_it(terminal):
    outcome = terminal("/dance", "/set top_p=7", KeyboardInterrupt(), "Hi")
    assert outcome.status == 0
    assert outcome.err.count("error: ") == 2
    assert "leaves" in outcome.err
    assert outcome.out.strip()


def test_ctrl_c_interrupts_an_answer(terminal, monkeypatch):
    stream = LLM.stream

    def interrupted(self, ids, params):
        for number, event in enumerate(stream(self, ids, params)):
            if number == 2:
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr(LLM, "stream", interrupted)
    outcome = terminal("Hi", options=JSON)
    assert outcome.status == 0
    assert "interrupted" in outcome.err
    assert [m["role"] for m in outcome.json["messages"]] == ["user", "assistant"]  # what was said stays


def test_an_interrupt_that_was_dealt_with_hides_no_later_mistake(terminal, monkeypatch):
    monkeypatch.setattr(LLM, "stream", lambda self, ids, params: signal.raise_signal(signal.SIGINT))
    with pytest.raises(ValueError, match="ours"):
        terminal("Hi", ValueError("ours"))


def test_ctrl_c_ends_a_piped_conversation(talk, monkeypatch):
    def interrupted(self, ids, params):
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream", interrupted)
    assert talk("Hi").status == 130


def test_a_failed_turn_is_forgotten(terminal):
    outcome = terminal("word " * 600, "Hi", options=JSON)
    assert outcome.status == 0
    assert outcome.json["messages"][0]["content"] == "Hi"


def test_logits_that_are_not_finite(talk, monkeypatch):
    failing = [Event("a", 5), Event("", None, finish_reason="error", error="the logits are not finite")]
    monkeypatch.setattr(LLM, "stream", lambda self, ids, params: iter(failing))
    outcome = talk("Hi")
    assert outcome.status == 1
    assert "not finite" in outcome.error


# Reasoning


def _events(*pieces):
    events = [Event(text, token) for text, token in pieces]
    return [*events[:-1], Event(events[-1].text, events[-1].token_id, finish_reason="stop")]


def _answer(llm, monkeypatch, stream, events, template=None):
    monkeypatch.setattr(LLM, "stream", lambda self, ids, params: iter(events))
    if template is not None:
        ids = llm.tokenizer(template)["input_ids"]
        monkeypatch.setattr(LLM, "encode_chat", lambda self, messages, tools, options: ids)
    chat = Chat(llm, GREEDY, None, stream)
    chat.answer("Hi")
    return chat.messages[-1]["content"]


THINKING = [("hm", 20), ("", 13), ("Yes", 21), (".", 22)]  # 13 is </think>, which the decoder does not show


def test_reasoning_is_dimmed_at_a_terminal(llm, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    content = _answer(llm, monkeypatch, stream, _events(*THINKING), "<|im_start|>assistant\n<think>\n")
    assert stream.getvalue() == "\x1b[2mhm\x1b[0mYes.\n"
    assert content == "Yes."  # reasoning is not part of the conversation


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_without_colour_it_stands_between_tags(llm, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    stream = Terminal()
    _answer(llm, monkeypatch, stream, _events(*THINKING), "<|im_start|>assistant\n<think>\n")
    assert stream.getvalue() == "<think>hm</think>Yes.\n"


def test_tags_that_arrive_as_text(llm, monkeypatch):
    stream = io.StringIO()
    events = _events(("<th", 20), ("ink>h", 21), ("m</", 22), ("think>Y", 23), ("es <", 24), ("b>", 25))
    assert _answer(llm, monkeypatch, stream, events) == "Yes <b>"
    assert stream.getvalue() == "<think>hm</think>Yes <b>\n"


def test_reasoning_that_never_ends(llm, monkeypatch):
    stream = io.StringIO()
    assert _answer(llm, monkeypatch, stream, _events(("<think>", 12), ("hm", 20), ("</th", 21))) == ""
    assert stream.getvalue() == "<think>hm</th</think>\n"


class _Plain:
    """A tokenizer without special tokens."""

    class backend_tokenizer:
        @staticmethod
        def token_to_id(tag):
            return None

    @staticmethod
    def decode(ids):
        return "assistant\n"


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "th", ">", "a", "\n", "</thin"]), min_size=1, max_size=8),
    st.lists(st.integers(1, 9), min_size=1, max_size=30),
)
def test_how_the_text_is_cut_into_events_does_not_matter(parts, lengths):
    text = "".join(parts)

    def split(pieces):
        reasoning, found = Reasoning(_Plain, [1]), {True: "", False: ""}
        for number, piece in enumerate(pieces):
            for inside, shown in reasoning.push(piece, 5, last=number == len(pieces) - 1):
                found[inside] += shown
        return found

    pieces, rest = [], text
    for length in lengths:
        pieces.append(rest[:length])
        rest = rest[length:]
    assert split([*pieces, rest]) == split([text])


def test_set_reads_json(llm):
    chat = Chat(llm, GREEDY, None, io.StringIO())
    chat.take('/set stop=["a", "b"]')
    chat.take("/set ignore-eos=true")
    chat.take("/set seed=None")
    assert (chat.params.stop, chat.params.ignore_eos, chat.params.seed) == (["a", "b"], True, None)
    with pytest.raises(InputError, match="stop"):
        chat.take("/set stop=5")
