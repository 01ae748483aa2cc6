"""`nemotron-h chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron_h.cli import _interrupts, _options
from nemotron_h.cli._models import weights
from nemotron_h.cli._options import adapter_name, check_dtype, check_quantization, check_text, load
from nemotron_h.cli._output import note, print_json, styled
from nemotron_h.errors import InputError, NemotronHError

if TYPE_CHECKING:
    from nemotron_h.generation import LLM, SamplingParams

HELP = """\
/reset              forget the conversation
/system TEXT        set the system message and forget the conversation; without TEXT there is none
/set NAME=VALUE     change sampling, for example /set temperature=0.2; without NAME=VALUE show it
/quit               leave, as Ctrl-D does; Ctrl-C interrupts an answer"""

OPEN, CLOSE = "<think>", "</think>"


def command(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False)] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="Let a model that can reason first; default its own."),
    ] = None,
    max_tokens: _options.MaxTokens = 1024,
    temperature: _options.Temperature = 0.7,
    top_p: _options.TopP = 1.0,
    top_k: _options.TopK = 0,
    min_p: _options.MinP = 0.0,
    seed: _options.Seed = None,
    dtype: _options.Dtype = "auto",
    device: _options.Device = "cpu",
    threads: _options.Threads = None,
    adapter: _options.Adapter = None,
    merge_adapter: _options.MergeAdapter = False,
    quantization: _options.Quantization = None,
    as_json: _options.Json = False,
) -> None:
    """Talk with a model. MODEL is a checkpoint directory or a hub id; the default is the shipped model.

    Reasoning is dimmed on a terminal and stands between <think> and </think> elsewhere. Piped input works, a line is a
    turn. With --json answers go to stderr and the whole conversation is printed at the end. /help lists the commands.
    """
    check_quantization(quantization)
    check_dtype(dtype)
    name = adapter_name(adapter, merge_adapter)
    path = weights(model)
    note(f"loading {path}")
    from nemotron_h.generation import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, adapter=name
    )
    llm = load(path, dtype, device, threads, adapter, merge_adapter, quantization)
    chat = Chat(llm, params, thinking, sys.stderr if as_json else sys.stdout)
    chat.set_system(system or "")
    interactive = sys.stdin is not None and sys.stdin.isatty()
    if interactive:
        note("/help lists the commands")
    try:
        for line in _lines(interactive):
            if not _turn(chat, line, interactive):
                break
    finally:
        chat.write("" if chat.at_line_start else "\n")
    if as_json:
        print_json({"model": path, "messages": chat.messages, "stats": llm.stats()})


def _turn(chat: Chat, line: str, interactive: bool) -> bool:
    """Answer one line; False when the user leaves. At a terminal errors and Ctrl-C end the turn, not the program."""
    try:
        return chat.take(line)
    except NemotronHError as error:
        if not interactive:
            raise
        note(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        if not interactive:
            raise
        _interrupts.forget()
        note("interrupted")
    return True


class Chat:
    """A conversation: its messages, the sampling in force, and where the answers are written."""

    def __init__(self, llm: LLM, params: SamplingParams, thinking: bool | None, stream: Any) -> None:
        self.llm, self.params, self.stream = llm, params, stream
        self.template = {} if thinking is None else {"enable_thinking": thinking}
        self.messages: list[dict[str, str]] = []
        self.styled = styled(stream)
        self.at_line_start, self._inside = True, False

    def take(self, line: str) -> bool:
        """A line of the user: a command, or what the model shall answer. False to leave."""
        line = check_text(line.strip(), "the line")
        name, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: note(HELP),
            "/reset": lambda _: self.reset(),
            "/system": self.set_system,
            "/set": self.set,
        }
        if name in ("/quit", "/exit"):
            return False
        if name in commands:
            commands[name](rest.strip())
        elif line.startswith("/"):
            raise InputError(f"{name}: no such command; /help lists them")
        elif line:
            self.answer(line)
        return True

    def reset(self) -> None:
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def set_system(self, text: str) -> None:
        self.messages = [{"role": "system", "content": check_text(text, "the system message")}] if text else []

    def set(self, text: str) -> None:
        """`name=value`: a field of SamplingParams, read as a number where it is one."""
        name, equals, value = text.partition("=")
        known = {field.name: getattr(self.params, field.name) for field in fields(self.params)}
        if not text:
            note(
                " ".join(
                    f"{key}={known[key]}" for key in ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
                )
            )
            return
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            raise InputError(f"/set {text}: must be NAME=VALUE, with one of the names {', '.join(known)}")
        self.params = replace(self.params, **{name: _value(value.strip())})

    def answer(self, text: str) -> None:
        """Stream the model's answer. What it said before Ctrl-C stays in the conversation; a failed turn does not."""
        messages = [*self.messages, {"role": "user", "content": text}]
        said: list[str] = []
        try:
            self._stream(messages, said)
        except KeyboardInterrupt:
            if said:
                self.messages = [*messages, _answer(said)]
            raise
        self.messages = [*messages, _answer(said)]

    def _stream(self, messages: list[dict[str, str]], said: list[str]) -> None:
        ids = self.llm.encode_chat(messages, None, self.template)
        split = Reasoning(self.llm.tokenizer, ids)
        try:
            for event in self.llm.stream(ids, self.params):
                for inside, text in split.push(event.text, event.token_id, last=event.finish_reason is not None):
                    self._show(inside, text)
                    said += [] if inside else [text]
                if event.error:
                    raise NemotronHError(event.error)
        finally:
            self._show(False, "")
            self.write("" if self.at_line_start else "\n")

    def _show(self, inside: bool, text: str) -> None:
        if inside != self._inside:
            marks = {True: "\x1b[2m", False: "\x1b[0m"} if self.styled else {True: OPEN, False: CLOSE}
            self.write(marks[inside])
            self._inside = inside
        self.write(text)

    def write(self, text: str) -> None:
        if text:
            print(text, end="", file=self.stream, flush=True)
            self.at_line_start = text.endswith("\n")


class Reasoning:
    """Splits a stream into reasoning and answer, whether the tags come as special tokens or as text."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self.inside = tokenizer.decode(prompt[-16:]).rstrip().endswith(OPEN)  # the template may open it
        self._special = {tokenizer.backend_tokenizer.token_to_id(tag): tag for tag in (OPEN, CLOSE)}
        self._held = ""

    def push(self, text: str, token: int | None, last: bool = False) -> Iterator[tuple[bool, str]]:
        """Pieces (is it reasoning, text) that are certain; an unfinished tag is held back unless this is the end."""
        special = self._special.get(token, "") if token is not None else ""
        self._held += text if special in text else special + text
        while (tag := CLOSE if self.inside else OPEN) in self._held:
            piece, _, self._held = self._held.partition(tag)
            if piece:
                yield self.inside, piece
            self.inside = not self.inside
        keep = 0 if last else next((n for n in range(len(tag) - 1, 0, -1) if self._held.endswith(tag[:n])), 0)
        piece, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        if piece:
            yield self.inside, piece


def _answer(said: list[str]) -> dict[str, str]:
    return {"role": "assistant", "content": "".join(said).strip()}


def _value(text: str) -> Any:
    """A value of /set: JSON's, Python's constants, or else a string."""
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _lines(interactive: bool) -> Iterator[str]:
    """Lines of the user until the end of input. At a terminal Ctrl-C only drops the line that is being typed."""
    if not interactive:
        if sys.stdin is not None:
            for line in sys.stdin.buffer:
                yield line.decode(errors="surrogateescape")
        return
    ask = _asker()
    while True:
        try:
            line = ask()
        except KeyboardInterrupt:
            _interrupts.forget()
            note("\nCtrl-D or /quit leaves")
            continue
        except EOFError:
            return
        yield line


def _asker() -> Callable[[], str]:
    """prompt-toolkit's line editor where it is installed, else the built-in one."""
    if sys.stdout is None or not sys.stdout.isatty():
        return lambda: input("")
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        return lambda: input("> ")
    session: PromptSession[str] = PromptSession()
    return lambda: session.prompt("> ")
