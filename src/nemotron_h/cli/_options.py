"""Options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron_h.errors import InputError

if TYPE_CHECKING:
    from nemotron_h.generation import LLM

Json = Annotated[bool, typer.Option("--json", help="One line of JSON on stdout instead of text.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the configuration; repeatable."),
]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to write.")]
Temperature = Annotated[float, typer.Option(help="Divides the logits; 0 always takes the best token.")]
TopP = Annotated[float, typer.Option(help="Keep the smallest set of tokens whose probability reaches this.")]
TopK = Annotated[int, typer.Option(help="Keep this many best tokens; 0 keeps all.")]
MinP = Annotated[float, typer.Option(help="Keep tokens at least this fraction as probable as the best.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling reproducible.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64; auto is the checkpoint's.")]
Device = Annotated[str, typer.Option(help="Where the model runs. CUDA has not been run by us.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default torch's choice.")]
Adapter = Annotated[str | None, typer.Option(help="Directory or hub id of a LoRA adapter to put on the model.")]
MergeAdapter = Annotated[
    bool, typer.Option("--merge-adapter", help="Put --adapter into the weights: faster, from a longer start.")
]
Quantization = Annotated[
    str | None, typer.Option(metavar="FORMAT", help="Pack the weights while they are read: bf16, int8 or int4.")
]
FORMATS = ("bf16", "int8", "int4")

DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_dtype(dtype: str, allow_auto: bool = True) -> None:
    allowed = ("auto", *DTYPES) if allow_auto else DTYPES
    if dtype not in allowed:
        raise InputError(f"--dtype {dtype}: must be one of {', '.join(allowed)}")


def check_quantization(quantization: str | None) -> None:
    if quantization is not None and quantization not in FORMATS:
        raise InputError(f"--quantization {quantization}: must be one of {', '.join(FORMATS)}")


ADAPTER = "adapter"


def load(
    path: str,
    dtype: str,
    device: str,
    threads: int | None,
    adapter: str | None = None,
    merge: bool = False,
    quantization: str | None = None,
) -> LLM:
    """A model ready to write. Raises as `LLM`; `InputError` for a device that does not exist here.

    With `adapter` every request of the run names it (`adapter_name`), unless it is merged.
    """
    import torch

    from nemotron_h.generation import LLM

    try:
        usable = not torch.empty(1, device=device).is_meta
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if not usable:
        raise InputError(f"--device {device}: it holds no values")
    adapters = None if adapter is None else {ADAPTER: adapter}
    llm = LLM(path, dtype=dtype, device=device, threads=threads, **given(adapters=adapters, quantization=quantization))
    if merge:
        llm.merge_adapter(ADAPTER)
    return llm


def adapter_name(adapter: str | None, merge: bool) -> str | None:
    """What SamplingParams says of --adapter. Raises `InputError` for --merge-adapter alone."""
    if merge and adapter is None:
        raise InputError("--merge-adapter: give --adapter PATH with it")
    return None if adapter is None or merge else ADAPTER


def check_text(text: str, what: str) -> str:
    """`text`, unless it is not Unicode: bytes that are not UTF-8 arrive from the shell as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not valid UTF-8 (at character {error.start})") from error
    return text


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}
