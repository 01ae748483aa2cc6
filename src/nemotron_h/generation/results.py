"""What `LLM` answers with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Completion:
    """One sample. finish_reason: "stop", "length" or "error" (`error` says why)."""

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[dict[int, float]] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Result:
    """Answer to one prompt: `outputs` holds its n samples, the other attributes are those of the first."""

    prompt_token_ids: list[int]
    outputs: list[Completion]
    usage: Usage
    prompt_logprobs: list[dict[int, float] | None] | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> list[dict[int, float]] | None:
        return self.outputs[0].logprobs

    @property
    def error(self) -> str | None:
        return self.outputs[0].error


@dataclass(frozen=True)
class Event:
    """One step of a stream: a token and the text that is certain with it. The last event has a finish_reason, and no
    token_id when only held-back text was left."""

    text: str
    token_id: int | None
    logprobs: dict[int, float] | None = None
    finish_reason: str | None = None
    error: str | None = None
