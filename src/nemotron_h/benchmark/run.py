"""The rounds: every engine in its own process, in turn, on the same work; the read bandwidth is measured between."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_h import __version__, family
from nemotron_h.benchmark import engines, limits
from nemotron_h.benchmark.engines import Engine, Subject
from nemotron_h.benchmark.process import Worker
from nemotron_h.benchmark.report import Decode, EngineFacts, Machine, Paths, Report
from nemotron_h.errors import InputError

Progress = Callable[[str], None]
CONTEXTS = (0, 4096, 16384)
_REST = 0.05  # seconds before a turn, in which the threads of the engine before stop spinning
_WARM_UP = 16  # tokens that workers decode besides the measured ones, at most


@dataclass(frozen=True)
class Options:
    """How to measure.

    contexts: Tokens in the cache before the first measured one; None is `CONTEXTS`, as far as the model goes.
    tokens: Decoded in each round, by each engine.
    threads: None is the number of physical cores. llama_python: Interpreter that has llama_cpp; None is this one.
    check_paths: Also compare the plain step with `model.generate` and `LLM.generate`.
    load: Write random weights of ours to a temporary checkpoint first, and load that.

    Raises:
        InputError: a number below its least, an unknown peer.
    """

    contexts: Sequence[int] | None = None
    tokens: int = 32
    repeats: int = 5
    threads: int | None = None
    peers: Sequence[str] = ()
    llama_python: str | None = None
    check_paths: bool = False
    load: bool = False

    def __post_init__(self) -> None:
        if self.contexts is not None and (not self.contexts or min(self.contexts) < 0):
            raise InputError(f"--context {','.join(map(str, self.contexts))}: must be numbers >= 0, such as 0,4096")
        for name in ("tokens", "repeats", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value}: must be at least 1")
        for peer in self.peers:
            if peer not in engines.PEERS:
                raise InputError(f"--peers {peer}: must be among {', '.join(engines.PEERS)}")


def run(subject: Subject, options: Options, progress: Progress = lambda _: None) -> Report:
    """Measure a subject, and the peers on the same shape.

    Raises:
        ConfigError, InputError, UnsupportedError, MissingDependencyError: before any work: no such shape, not enough
            memory or disk, a peer that cannot run it or is not installed.
        NemotronHError: a worker failed.
    """
    spec = family.describe(subject.config)
    threads = options.threads or limits.allowed_cores()
    contexts = _contexts(spec, options)
    found, skipped = _fitting(_engines(subject, spec, options, threads, contexts), spec, contexts)
    machine = _machine(threads)
    with _bandwidth(threads, progress) as measure:
        rounds = _Rounds(subject, spec, options, contexts, machine, measure, progress)
        groups = _groups(found, spec, contexts)
        if len(groups) > 1:
            progress("the models do not fit into memory together: one after the other")
        for group in groups:
            rounds.run(group)
    order = {engine.name: place for place, engine in enumerate([*found, *skipped])}
    return Report(
        subject.name,
        family.pattern(spec.layers_block_type),
        family.count(spec).total,
        machine,
        sorted([*rounds.engines, *skipped], key=lambda engine: order[engine.name]),
        sorted(rounds.decode, key=lambda row: (row.context, order[row.engine])),
        rounds.paths,
    )


def _contexts(spec: Any, options: Options) -> list[int]:
    longest = spec.max_position_embeddings - options.tokens * options.repeats - _WARM_UP
    if options.contexts is None:
        return [context for context in CONTEXTS if context == 0 or context <= longest]
    if max(options.contexts) > max(longest, 0):
        raise InputError(
            f"--context {max(options.contexts)}: the model's longest is {spec.max_position_embeddings}, the measured"
            f" tokens included; give at most {max(longest, 0)}"
        )
    return sorted(set(options.contexts))


class _Rounds:
    """What the engines found so far."""

    def __init__(
        self, subject: Subject, spec: Any, options: Options, contexts: list[int], machine: Machine,
        measure: Callable[[], float], progress: Progress,
    ) -> None:  # fmt: skip
        self.subject, self.spec, self.options, self.contexts = subject, spec, options, contexts
        self.machine, self.measure, self.progress = machine, measure, progress
        self.engines: list[EngineFacts] = []
        self.decode: list[Decode] = []
        self.paths: Paths | None = None

    def run(self, group: Sequence[Engine]) -> None:
        """Load the engines of a group, let them decode in turn behind every context, and end them."""
        with ExitStack() as stack:
            workers: dict[Engine, Worker] = {}  # in the order of the group
            loaded: dict[Engine, dict[str, Any]] = {}
            for engine in group:
                worker = Worker(engine.name, engine.python, engine.program, engine.request["threads"])
                workers[engine] = stack.enter_context(worker)
                loaded[engine] = self._load(engine, worker)
            for context in self.contexts:
                self._decode(workers, context)
            ours = next((engine for engine in group if engine.name == engines.OURS), None)
            if self.options.check_paths and ours is not None:
                self.progress("comparing model.generate, LLM.generate and the plain step")
                answer = workers[ours].ask("compare_paths", tokens=self.options.tokens, repeats=self.options.repeats)
                self.paths = Paths(answer["tokens_per_second"])
            for engine, worker in workers.items():
                peak = worker.ask("decode", tokens=1)["peak_bytes"]
                self.engines.append(_facts(engine, loaded[engine], peak))

    def _load(self, engine: Engine, worker: Worker) -> dict[str, Any]:
        self.progress(f"{engine.name}: {engine.weights} weights, {engine.format}, {engine.size / 1e9:.3g} GB")
        with engines.loading(engine, self.subject, self.spec, self.progress) as ready:
            return worker.ask("load", **ready.request)

    def _decode(self, workers: dict[Engine, Worker], context: int) -> None:
        for engine, worker in workers.items():
            if context:
                self.progress(f"{engine.name}: reading {context:,} tokens")
            worker.ask("fill", context=context)
        tokens, order = self.options.tokens, list(workers)
        rates: dict[Engine, list[float]] = {engine: [] for engine in order}
        finite = dict.fromkeys(order, True)
        for number in range(self.options.repeats):
            time.sleep(_REST)
            self.machine.bandwidth.append(self.measure())
            for engine in order if number % 2 == 0 else reversed(order):
                time.sleep(_REST)
                answer = workers[engine].ask("decode", tokens=tokens)
                rates[engine].append(tokens / answer["seconds"])
                finite[engine] &= answer["finite"]
        for engine in order:
            read = engine.bytes_per_token(self.spec, context)
            row = Decode(engine.name, engine.format, context, rates[engine], read, finite[engine])
            self.progress(f"{engine.name}: {row.tokens_per_second:.4g} tok/s behind {context:,} tokens")
            self.decode.append(row)


def _facts(engine: Engine, loaded: dict[str, Any], peak: int) -> EngineFacts:
    return EngineFacts(
        engine.name,
        engine.format,
        loaded["version"],
        engine.weights,
        loaded["seconds"],
        loaded["weight_bytes"],
        peak,
    )


def _engines(subject: Subject, spec: Any, options: Options, threads: int, contexts: list[int]) -> list[Engine]:
    found = [engines.ours(subject, spec, sys.executable, threads, options.load)]
    if engines.LLAMA_CPP in options.peers:
        room = contexts[-1] + options.tokens * options.repeats + _WARM_UP
        python = options.llama_python or sys.executable
        found.append(engines.llama(subject, spec, python, threads, -(-room // 256) * 256))
    if engines.TRANSFORMERS in options.peers:
        found.append(engines.transformers(subject, spec, sys.executable, threads))
    return found


def _caches(spec: Any, contexts: list[int]) -> int:
    cache = family.cache_bytes(spec, "bfloat16")
    return cache.fixed + contexts[-1] * cache.per_token


def _fitting(found: list[Engine], spec: Any, contexts: list[int]) -> tuple[list[Engine], list[EngineFacts]]:
    """(engines that memory has room for, the peers that it has not). Raises InputError where our model has none."""
    free, caches = limits.available_memory() - limits.SET_BYTES, _caches(spec, contexts)
    fitting: list[Engine] = []
    skipped: list[EngineFacts] = []
    for engine in found:
        need = engines.needed(engine, caches)
        reason = f"it needs about {need / 1e9:.3g} GB of memory, {free / 1e9:.3g} GB are free"
        if need <= free:
            fitting.append(engine)
        elif engine.name == engines.OURS:
            raise InputError(f"{engine.format}: {reason}; take a smaller shape or a shorter format")
        else:
            skipped.append(EngineFacts(engine.name, engine.format, skipped=reason))
    return fitting, skipped


def _groups(found: list[Engine], spec: Any, contexts: list[int]) -> list[list[Engine]]:
    """Engines that run side by side: all, or else one at a time."""
    room = limits.available_memory() - limits.SET_BYTES
    return [found] if engines.fits_together(found, _caches(spec, contexts), room) else [[engine] for engine in found]


@contextmanager
def _bandwidth(threads: int, progress: Progress) -> Iterator[Callable[[], float]]:
    meter = limits.ReadBandwidth(threads, limits.SET_BYTES)
    try:
        progress(f"read bandwidth: {meter.measure() / 1e9:.3g} GB/s")
        yield meter.measure
    finally:
        meter.close()


def _machine(threads: int) -> Machine:
    return Machine(
        cpu=limits.cpu_model(),
        cores=limits.allowed_cores(),
        threads=threads,
        memory_bytes=limits.total_memory(),
        system=f"{platform.system()} {platform.release()}",
        version=__version__,
        commit=_commit(),
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        load=os.getloadavg()[0],
    )


def _commit() -> str | None:
    """Of the sources that run here, with a plus where files differ from it; None for an installed package."""
    here = Path(__file__)
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None  # not ours: an environment inside somebody's repository
    return _git(here.parent, "describe", "--always", "--dirty=+", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, or None."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
