"""Ways to put words into a model's mouth, and the names of the files that read them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nemotron_h import LLM

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
Hook = Callable[[Any, tuple[Any, ...], Any], Any]


@contextmanager
def hooked(llm: LLM, hook: Hook) -> Iterator[None]:
    """With a forward hook on the whole model."""
    handle = llm.model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def scripted(llm: LLM, ids: Iterable[int]) -> Iterator[list[int]]:
    """`with scripted(llm, ids) as calls:` the model's favourite tokens are `ids`, one after the other; `calls` collects
    how many tokens each forward pass read."""
    pending, calls = iter(ids), []

    def say(_module: Any, args: tuple[Any, ...], output: Any) -> Any:
        calls.append(args[0].shape[1])
        output.logits = torch.zeros_like(output.logits)
        output.logits[:, -1, next(pending)] = 50.0
        return output

    with hooked(llm, say):
        yield calls
