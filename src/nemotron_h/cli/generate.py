"""`nemotron-h generate`: continue a prompt."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron_h.cli import _options
from nemotron_h.cli._models import weights
from nemotron_h.cli._options import adapter_name, check_dtype, check_quantization, check_text, load
from nemotron_h.cli._output import note, print_json
from nemotron_h.errors import InputError

if TYPE_CHECKING:
    from nemotron_h.generation import LLM, Event


def command(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[MODEL] PROMPT", show_default=False)] = None,
    ids: Annotated[
        str | None, typer.Option(help="The prompt as token ids, for example 1,5,9; then without PROMPT.")
    ] = None,
    max_tokens: _options.MaxTokens = 128,
    temperature: _options.Temperature = 0.7,
    top_p: _options.TopP = 1.0,
    top_k: _options.TopK = 0,
    min_p: _options.MinP = 0.0,
    seed: _options.Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the output; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's end tokens.")] = False,
    dtype: _options.Dtype = "auto",
    device: _options.Device = "cpu",
    threads: _options.Threads = None,
    adapter: _options.Adapter = None,
    merge_adapter: _options.MergeAdapter = False,
    quantization: _options.Quantization = None,
    json: _options.Json = False,
) -> int:
    """Continue a prompt: the text streams to stdout, speed and reason of the end go to stderr.

    MODEL is a checkpoint directory or a hub id; with one argument, the prompt, the shipped model writes. PROMPT `-` is
    read from stdin. Without a tokenizer token ids are printed.
    """
    check_quantization(quantization)
    check_dtype(dtype)
    name = adapter_name(adapter, merge_adapter)
    model, prompt = _prompt(arguments or [], ids)
    path = weights(model)
    note(f"loading {path}")
    start = time.perf_counter()
    from nemotron_h.generation import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed,
        stop=stop or None, ignore_eos=ignore_eos, adapter=name,
    )  # fmt: skip
    llm = load(path, dtype, device, threads, adapter, merge_adapter, quantization)
    loaded = time.perf_counter() - start
    events: list[Event] = []
    for event in llm.stream(prompt, params):
        events.append(event)
        if not json:
            _show(event, llm)
    if not json:
        print(flush=True)
    last = events[-1]
    note(_speed(llm, str(last.finish_reason)))
    if last.error:
        note(f"error: {last.error}")
    if json:
        print_json(_result(path, events, llm, loaded))
    return 1 if last.error else 0


def _prompt(arguments: list[str], ids: str | None) -> tuple[str | None, str | list[int]]:
    """MODEL and PROMPT."""
    if ids is not None:
        if len(arguments) > 1:
            raise InputError("give PROMPT or --ids, not both")
        return (arguments or [None])[0], _numbers(ids)
    if not 1 <= len(arguments) <= 2:
        raise InputError(f"expected [MODEL] PROMPT, got {len(arguments)} arguments; quote a prompt that has blanks")
    prompt = arguments[-1]
    if len(arguments) == 1 and Path(prompt[:4096], "config.json").exists():
        raise InputError(f"{prompt} is a model: give a prompt after it")
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode(errors="surrogateescape")
    if not prompt:
        raise InputError("the prompt is empty: give at least one character")
    return (arguments[0] if len(arguments) == 2 else None), check_text(prompt, "the prompt")


def _numbers(text: str) -> list[int]:
    parts = text.replace(",", " ").split()
    if not parts:
        raise InputError("the prompt is empty: give at least one token id")
    if not all(part.isascii() and part.isdecimal() and len(part) < 20 for part in parts):
        raise InputError(f"--ids {text[:80]}: must be token ids with commas between them, for example 1,5,9")
    return [int(part) for part in parts]


def _show(event: Event, llm: LLM) -> None:
    if llm.tokenizer is not None:
        print(event.text, end="", flush=True)
    elif event.token_id is not None:
        print(event.token_id, end=" ", flush=True)


def _rates(llm: LLM) -> dict[str, dict[str, Any]]:
    stats = llm.stats()
    return {
        phase: {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds if seconds else None}
        for phase in ("prefill", "decode")
        for tokens, seconds in [(stats["tokens"][phase], stats["seconds"][phase])]
    }


def _speed(llm: LLM, reason: str) -> str:
    parts = [
        f"{phase} {rate['tokens']} tokens, {rate['tokens_per_second']:,.1f} tokens/s"
        for phase, rate in _rates(llm).items()
        if rate["seconds"]
    ]
    return " · ".join([*parts, f"end: {reason}"])


def _result(path: str, events: list[Event], llm: LLM, loaded: float) -> dict[str, Any]:
    ids = [event.token_id for event in events if event.token_id is not None]
    rates = _rates(llm)
    return {
        "model": path,
        "text": "".join(event.text for event in events),
        "token_ids": ids,
        "finish_reason": events[-1].finish_reason,
        "error": events[-1].error,
        "usage": {"prompt_tokens": rates["prefill"]["tokens"], "completion_tokens": len(ids)},
        "load_seconds": loaded,
        **rates,
    }
