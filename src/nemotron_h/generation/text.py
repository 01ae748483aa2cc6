"""Tokens to text and back: the checkpoint's tokenizer, its chat template, incremental decoding, stop texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from nemotron_h.errors import CheckpointError, InputError

_SENTINEL = "\ue000{}\ue001"  # private use: no template looks for it, no vocabulary merges over it


class Text:
    """The text side of a checkpoint; every method says so when the checkpoint has no tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, name: str, **kwargs: Any) -> Text:
        """The tokenizer of a directory or hub id, or none if it has none.

        Raises:
            CheckpointError: there is one, but it cannot be read.
        """
        if Path(name).is_dir() and not (Path(name) / "tokenizer.json").exists():
            return cls(None)
        try:
            return cls(PreTrainedTokenizerFast.from_pretrained(name, **kwargs))
        except OSError:
            return cls(None)
        except Exception as error:  # tokenizers raises bare Exception for a damaged file
            raise CheckpointError(f"{name}: tokenizer.json cannot be read ({error})") from error

    def _need(self) -> PreTrainedTokenizerFast:
        if self.tokenizer is None:
            raise InputError("this checkpoint has no tokenizer: give prompts as lists of token ids")
        return self.tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt; special tokens written in it count as such."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt is not valid Unicode: {error.reason} at position {error.start}") from error
        return self._need()(text)["input_ids"]

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, template_kwargs: Mapping[str, Any]
    ) -> list[int]:
        """Token ids of a conversation up to the assistant's turn; special tokens inside messages are plain text."""
        tokenizer = self._need()
        _check_messages(messages)
        if not tokenizer.chat_template:
            raise InputError("this checkpoint has no chat template: use generate() with a plain prompt")
        specials = [t.content for t in tokenizer.added_tokens_decoder.values()]
        contents = [m["content"] for m in messages if isinstance(m.get("content"), str)]
        if not any(special in content for content in contents for special in specials):
            return tokenizer(self._render(messages, tools, template_kwargs), add_special_tokens=False)["input_ids"]
        hidden = [
            dict(m, content=_SENTINEL.format(i)) if isinstance(m.get("content"), str) else dict(m)
            for i, m in enumerate(messages)
        ]
        ids: list[int] = []
        for index, piece in enumerate(re.split("\ue000(\\d+)\ue001", self._render(hidden, tools, template_kwargs))):
            text = messages[int(piece)]["content"] if index % 2 else piece
            ids += tokenizer(text, add_special_tokens=False, split_special_tokens=bool(index % 2))["input_ids"]
        return ids

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Any, template_kwargs: Mapping[str, Any]) -> str:
        try:
            rendered = self._need().apply_chat_template(
                [dict(m) for m in messages], tools=tools, add_generation_prompt=True, tokenize=False, **template_kwargs
            )
        except TemplateError as error:
            raise InputError(f"the chat template refuses these messages: {error}") from error
        return str(rendered)

    def decoder(self) -> Decoder:
        return Decoder(self.tokenizer)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError('messages must be a non-empty list of {"role": ..., "content": ...}')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f'messages[{index}] must be a dict with a "role", got {message!r:.80}')
        if message.get("content") is not None and not isinstance(message["content"], str):
            raise InputError(f"messages[{index}]: content must be text, got {type(message['content']).__name__}")


class Decoder:
    """Text of a growing token list; bytes of an unfinished character are held back."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None) -> None:
        self._backend = None if tokenizer is None else tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._length = 0

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        if self._backend is None:
            return ""
        self._ids.append(token)
        piece = self._stream.step(self._backend, token) or ""
        self._length += len(piece)
        return piece

    def finish(self) -> str:
        """What is still held back, as far as it can be shown."""
        if self._backend is None:
            return ""
        return self._backend.decode(self._ids, skip_special_tokens=True)[self._length :]


class StopTexts:
    """Passes text on until one of the stop texts begins; holds back what could still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = list(stops)
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that is certain."""
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self.held = self.held[: min(found)], ""
            return shown
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def finish(self) -> str:
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
