"""Options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron_h.errors import InputError, UnsupportedError

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
Adapter = Annotated[str | None, typer.Option(help="Not in this version.")]
Quantization = Annotated[str | None, typer.Option(help="Not in this version.")]

DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_dtype(dtype: str, allow_auto: bool = True) -> None:
    allowed = ("auto", *DTYPES) if allow_auto else DTYPES
    if dtype not in allowed:
        raise InputError(f"--dtype {dtype}: must be one of {', '.join(allowed)}")


def refuse_later(**options: str | None) -> None:
    """Options that the interface has and this version does not."""
    for name, value in options.items():
        if value is not None:
            raise UnsupportedError(f"--{name} {value}: not in this version; leave it out")


def load(path: str, dtype: str, device: str, threads: int | None) -> LLM:
    """A model ready to write. Raises as `LLM`; `InputError` for a device that does not exist here."""
    import torch

    from nemotron_h.generation import LLM

    try:
        usable = not torch.empty(1, device=device).is_meta
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if not usable:
        raise InputError(f"--device {device}: it holds no values")
    return LLM(path, dtype=dtype, device=device, threads=threads)


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
