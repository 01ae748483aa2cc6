"""What is measured: each engine as a program to start, a request to load its model, and the bytes of its format."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemotron_h import family
from nemotron_h.benchmark import limits
from nemotron_h.benchmark.peers import llama_cpp
from nemotron_h.benchmark.process import Worker
from nemotron_h.errors import InputError

OURS, TRANSFORMERS, LLAMA_CPP = "nemotron-h", "transformers", llama_cpp.NAME
PEERS = (LLAMA_CPP, TRANSFORMERS)
FORMATS = ("int4", "int8", "bf16", "none")
"""`none`: the weights as they are stored, and bfloat16 for random ones."""


@dataclass(frozen=True)
class Subject:
    """What is measured.

    config: Keyword arguments of its configuration. path: Directory or hub id of weights; None draws random ones.
    quantization: "int4", "int8", "bf16" or None.
    """

    name: str
    config: Mapping[str, Any]
    path: str | None = None
    quantization: str | None = None


@dataclass(frozen=True, eq=False)
class Engine:
    """One participant; equal only to itself.

    matrix_bits, other_bytes, head_bits: Of its format, as `family.decode_reads` takes them.
    request: Arguments of its worker's `load`. size: Bytes of its weights in memory, by arithmetic.
    """

    name: str
    format: str
    python: str
    program: str
    weights: str
    matrix_bits: float
    other_bytes: float
    request: Mapping[str, Any]
    size: int
    head_bits: float | None = None

    @property
    def arithmetic(self) -> str:
        """What its products are done in: packed integers meet activations of 8 bits."""
        if self.matrix_bits < 16:
            return "int8"
        return "bf16" if self.matrix_bits == 16 else "float32"

    def bytes_per_token(self, spec: Any, tokens: int, sequences: int, context: int) -> float:
        """What a step of `tokens` tokens of each of `sequences`, behind `context` others, reads for each token."""
        reads = family.decode_reads(
            spec, self.matrix_bits, self.other_bytes, context,
            head_bits=self.head_bits, tokens=tokens, sequences=sequences,
        )  # fmt: skip
        return reads.total / (tokens * sequences)


def ours(subject: Subject, spec: Any, python: str, threads: int, load: bool = False) -> Engine:
    """This package's model; with `load`, random weights too come from files, which `loading` writes."""
    dtype = "bfloat16" if subject.path is None else _dtype(spec)
    name = _packed_format(spec) or subject.quantization or dtype
    weights = "loaded" if load or subject.path is not None else "random"
    config = None if weights == "loaded" else dict(subject.config)
    request = {"config": config, "path": subject.path, "quantization": subject.quantization, "threads": threads}
    bits, other = 8 * family.DTYPE_BYTES[name], family.DTYPE_BYTES[dtype]
    size = round(family.count(spec).total * bits / 8)
    head = 8 * other if spec.tie_word_embeddings else None  # the embedding itself, which is never packed
    return Engine(OURS, name, python, "ours_worker", weights, bits, other, request, size, head)


def transformers(subject: Subject, spec: Any, python: str, threads: int) -> Engine:
    """transformers' model of the same shape, always in bfloat16 with random weights."""
    request = {"config": dict(subject.config), "threads": threads}
    size = 2 * family.count(spec).total
    return Engine(TRANSFORMERS, "bfloat16", python, "transformers_worker", "random", 16, 2, request, size)


def llama(subject: Subject, spec: Any, python: str, threads: int, context: int) -> Engine:
    """llama.cpp on a file of random weights of the same shape; `loading` adds the file's path to the request.

    Raises:
        MissingDependencyError, UnsupportedError: not installed in `python`; not a shape for it.
    """
    llama_cpp.check_installed(python)
    llama_cpp.check_shape(spec, subject.quantization)
    encoding = llama_cpp.ENCODINGS[subject.quantization]
    bits = 8 * encoding.block_bytes / encoding.block
    request = {"vocab": spec.vocab_size, "context": context, "threads": threads}
    size = llama_cpp.file_bytes(spec, subject.quantization)
    return Engine(LLAMA_CPP, encoding.name, python, llama_cpp.PROGRAM, "loaded", bits, 4, request, size)


@contextmanager
def loading(engine: Engine, subject: Subject, spec: Any, progress: Callable[[str], None]) -> Iterator[Engine]:
    """The engine with all that its request needs; temporary files live as long as the block.

    Raises:
        InputError: no room on the disk.
    """
    if engine.weights == "random" or (engine.name == OURS and subject.path is not None):
        yield engine
        return
    with tempfile.TemporaryDirectory(prefix="nemotron-h-bench-") as name:
        directory = Path(name)
        free = limits.free_disk(directory)
        if engine.size > 0.95 * free:
            raise InputError(
                f"{engine.name}: its files take {engine.size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in"
                f" {directory.parent}; set TMPDIR to a directory with more room"
            )
        progress(f"{engine.name}: writing random weights to {directory}")
        path = _write(engine, subject, spec, directory)
        yield replace(engine, request={**engine.request, "path": str(path)})


def _write(engine: Engine, subject: Subject, spec: Any, directory: Path) -> Path:
    if engine.name == LLAMA_CPP:
        path = directory / "random.gguf"
        llama_cpp.write_random(path, spec, subject.quantization, engine.request["context"])
        return path
    # In a process of its own, or its memory would count as the loading one's peak.
    with Worker(engine.name, engine.python, engine.program, engine.request["threads"]) as writer:
        config, quantization = dict(subject.config), subject.quantization
        writer.ask("write", config=config, quantization=quantization, directory=str(directory))
    return directory


def fits_together(engines: Sequence[Engine], caches: int, free: int) -> bool:
    """Whether all models may be in memory at once."""
    return sum(needed(engine, caches) for engine in engines) < free


def needed(engine: Engine, caches: int) -> int:
    """Bytes that a worker takes: weights with a tenth on top, its cache, and the interpreter with its libraries."""
    return round(1.1 * engine.size) + caches + (600 << 20)


def _packed_format(spec: Any) -> str | None:
    """Of a checkpoint whose weights are packed already."""
    stored = spec.extras.get("quantization_config")
    name = stored.get("format") if isinstance(stored, Mapping) else None
    return name if name in FORMATS else None


def _dtype(spec: Any) -> str:
    stored = str(spec.extras.get("dtype") or spec.extras.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return stored if stored in family.DTYPE_BYTES else "bfloat16"
