"""Tokens to text and back: the checkpoint's tokenizer, its chat template, incremental decoding, stop texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError
from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from nemotron_h.errors import CheckpointError, InputError, ModelNotFoundError


class Text:
    """The text side of a checkpoint; every method says so when the checkpoint has no tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None) -> None:
        self.tokenizer = tokenizer
        self._longest: int | None = None

    @classmethod
    def load(cls, name: str, **kwargs: Any) -> Text:
        """The tokenizer of a directory or hub id, or none if it has none.

        Raises:
            CheckpointError: there is one, but it cannot be read. ModelNotFoundError: the hub cannot be asked for it.
        """
        if not _has_tokenizer(name, kwargs):
            return cls(None)
        try:
            return cls(PreTrainedTokenizerFast.from_pretrained(name, **kwargs))
        except Exception as error:  # tokenizers raises bare Exception for a damaged file
            files = "tokenizer.json or tokenizer_config.json"
            raise CheckpointError(f"{name}: {files} cannot be read ({error})") from error

    def _need(self) -> PreTrainedTokenizerFast:
        if self.tokenizer is None:
            raise InputError("this checkpoint has no tokenizer: give prompts as lists of token ids")
        return self.tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt; special tokens written in it count as such."""
        return self._ids(_unicode(text, "the prompt"))

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, without tokenizing it: megabytes are then refused at once."""
        tokenizer = self._need()
        if tokenizer.backend_tokenizer.normalizer is not None:  # it may shorten the text
            return 0
        if self._longest is None:
            self._longest = max(map(len, tokenizer.get_vocab()))
        return len(text) // self._longest

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, template_kwargs: Mapping[str, Any]
    ) -> list[int]:
        """Token ids of a conversation up to the assistant's turn; special tokens in messages and tools are plain text.

        Only the special tokens are kept from the template, by marks that it copies: what it does with the rest of a
        text (strip it, look for `/no_think`) still happens.
        """
        tokenizer = self._need()
        _check_messages(messages)
        if not tokenizer.chat_template:
            raise InputError("this checkpoint has no chat template: use generate() with a plain prompt")
        given = _strings([*messages, *(tools or ())])
        specials = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        mark = next(chr(c) for c in range(0xE000, 0x110000) if not any(chr(c) in text for text in given))

        def hide(match: re.Match[str]) -> str:
            return f"{mark}{specials.index(match[0])}{mark}"

        longest_first = "|".join(re.escape(special) for special in sorted(specials, key=len, reverse=True))
        hidden = partial(re.sub, longest_first, hide) if specials else str
        rendered = self._render(
            [_map_strings(hidden, m) for m in messages], tools and _map_strings(hidden, tools), template_kwargs
        )
        ids: list[int] = []
        for index, piece in enumerate(re.split(f"{mark}(\\d+){mark}", rendered)):
            text = specials[int(piece)] if index % 2 else piece
            ids += self._ids(text, add_special_tokens=False, split_special_tokens=bool(index % 2))
        return ids

    def _ids(self, text: str, **kwargs: Any) -> list[int]:
        return self._need()(text, verbose=False, **kwargs)["input_ids"]

    def _render(self, messages: list[Any], tools: Any, template_kwargs: Mapping[str, Any]) -> str:
        try:
            rendered = self._need().apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False, **template_kwargs
            )
        except (TemplateError, TypeError, ValueError) as error:  # templates add and index what is in the messages
            raise InputError(f"the chat template refuses these messages: {error}") from error
        return _unicode(str(rendered), "the conversation")

    def decoder(self) -> Decoder:
        return Decoder(self.tokenizer)


def _has_tokenizer(name: str, hub: Mapping[str, Any]) -> bool:
    """Whether there is a tokenizer.json; of a repository only the hub, or the cache's note of its answer, says no."""
    if Path(name).is_dir():
        return (Path(name) / "tokenizer.json").exists()
    where = {key: hub[key] for key in ("cache_dir", "revision") if hub.get(key) is not None}
    if try_to_load_from_cache(name, "tokenizer.json", **where) is _CACHED_NO_EXIST:
        return False
    try:
        return bool(hf_hub_download(name, "tokenizer.json", **hub))
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError.of(f"{name}: tokenizer.json is not in the cache", error) from error
    except EntryNotFoundError:
        return False
    except (OSError, HTTPError) as error:
        raise ModelNotFoundError.of(f"{name}: tokenizer.json", error) from error


def _unicode(text: str, what: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not valid Unicode: {error.reason} at position {error.start}") from error
    return text


def _strings(value: Any) -> list[str]:
    """Every text inside lists and dicts."""
    found: list[str] = []
    _map_strings(found.append, value)
    return found


def _map_strings(change: Callable[[str], Any], value: Any) -> Any:
    """A copy of nested lists and dicts with every text changed, keys excepted."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(change, item) for key, item in value.items()}
    return [_map_strings(change, item) for item in value] if isinstance(value, list | tuple) else value


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
