"""A run: what was asked for is checked, engines that fit are chosen, and `rounds` measures them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_h import __version__, family
from nemotron_h.benchmark import engines, limits
from nemotron_h.benchmark.engines import Engine, Subject
from nemotron_h.benchmark.measures import SIZES, EngineFacts, Machine
from nemotron_h.benchmark.report import Report
from nemotron_h.benchmark.rounds import STEP, Plan, Progress, Rounds
from nemotron_h.errors import InputError

CONTEXTS = (0, 4096, 16384)
PROMPTS = (512, 2048)
SEQUENCES = (1, 4, 16)
_WARM_UP = 32  # tokens that workers decode besides the measured ones, at most
_PASS_BYTES = 400 << 20  # activations of a pass through a prompt


@dataclass(frozen=True)
class Options:
    """How to measure.

    contexts: Tokens in the cache before the first measured one; None is `CONTEXTS`, as far as the model goes.
    tokens: Decoded in each round, by each engine; of batches, by each sequence.
    prompts: Lengths of prompts to read; empty for none, None is `PROMPTS`, as far as the model goes.
    sequences: Numbers of sequences that decode together; empty for none.
    limit: Seconds that one engine may spend on prompts of one length.
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
    prompts: Sequence[int] | None = None
    sequences: Sequence[int] = SEQUENCES
    limit: float = 120

    def __post_init__(self) -> None:
        if self.contexts is not None and (not self.contexts or min(self.contexts) < 0):
            raise InputError(f"--context {','.join(map(str, self.contexts))}: must be numbers >= 0, such as 0,4096")
        for option, numbers in (("prefill", self.prompts), ("batches", self.sequences)):
            if numbers and min(numbers) < 1:
                raise InputError(f"--{option} {','.join(map(str, numbers))}: must be numbers >= 1, or none")
        for name in ("tokens", "repeats", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value}: must be at least 1")
        if not self.limit > 0:
            raise InputError(f"--limit {self.limit:g}: must be more than 0 seconds")
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
    plan = _plan(spec, options)
    found, skipped = _fitting(_engines(subject, spec, options, threads, plan), spec, plan)
    machine = _machine(threads)
    with _meters(machine, progress) as measure:
        rounds = Rounds(subject, spec, plan, measure, progress)
        groups = _groups(found, spec, plan)
        if len(groups) > 1:
            progress("the models do not fit into memory together: one after the other")
        for group in groups:
            rounds.run(group)
    kinds = list(SIZES)
    order = {engine.name: place for place, engine in enumerate([*found, *skipped])}
    return Report(
        subject.name,
        family.pattern(spec.layers_block_type),
        family.count(spec).total,
        machine,
        sorted([*rounds.engines, *skipped], key=lambda engine: order[engine.name]),
        sorted(rounds.rows, key=lambda row: (kinds.index(row.measure), row.size, order[row.engine])),
        rounds.left_out,
        rounds.paths,
        rounds.bits,
    )


def _plan(spec: Any, options: Options) -> Plan:
    return Plan(
        _contexts(spec, options), _prompts(spec, options), sorted(set(options.sequences)), options.tokens,
        options.repeats, options.limit, options.check_paths,
    )  # fmt: skip


def _prompts(spec: Any, options: Options) -> list[int]:
    longest = spec.max_position_embeddings
    if options.prompts is None:
        return [prompt for prompt in PROMPTS if prompt <= longest]
    if options.prompts and max(options.prompts) > longest:
        raise InputError(f"--prefill {max(options.prompts)}: the model's longest is {longest}")
    return sorted(set(options.prompts))


def _contexts(spec: Any, options: Options) -> list[int]:
    longest = spec.max_position_embeddings - _decoded(options.tokens, options.repeats)
    if options.contexts is None:
        return [context for context in CONTEXTS if context == 0 or context <= longest]
    if max(options.contexts) > max(longest, 0):
        raise InputError(
            f"--context {max(options.contexts)}: the model's longest is {spec.max_position_embeddings}, the measured"
            f" tokens included; give at most {max(longest, 0)}"
        )
    return sorted(set(options.contexts))


def _decoded(tokens: int, repeats: int) -> int:
    """The most tokens that come behind a context: a round may end a part of a step later, and begins with one more."""
    return (tokens + 2 * STEP) * repeats + _WARM_UP


def _engines(subject: Subject, spec: Any, options: Options, threads: int, plan: Plan) -> list[Engine]:
    found = [engines.ours(subject, spec, sys.executable, threads, options.load)]
    if engines.LLAMA_CPP in options.peers:
        room = max(plan.contexts[-1] + _decoded(options.tokens, options.repeats), *plan.prompts, 0)
        python = options.llama_python or sys.executable
        found.append(engines.llama(subject, spec, python, threads, -(-room // 256) * 256))
    if engines.TRANSFORMERS in options.peers:
        found.append(engines.transformers(subject, spec, sys.executable, threads))
    return found


def _caches(spec: Any, plan: Plan) -> int:
    """Bytes of the most that is in the caches at once, and of what a pass needs."""
    cache = family.cache_bytes(spec, "bfloat16")
    longest = max(plan.contexts[-1], *plan.prompts, 0)
    passes = _PASS_BYTES if plan.prompts else 0
    return (1 + max(plan.sequences, default=0)) * cache.fixed + longest * cache.per_token + passes


def _fitting(found: list[Engine], spec: Any, plan: Plan) -> tuple[list[Engine], list[EngineFacts]]:
    """(engines that memory has room for, the peers that it has not). Raises InputError where our model has none."""
    free, caches = limits.available_memory() - limits.SET_BYTES, _caches(spec, plan)
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


def _groups(found: list[Engine], spec: Any, plan: Plan) -> list[list[Engine]]:
    """Engines that run side by side: all, or else one at a time."""
    room = limits.available_memory() - limits.SET_BYTES
    return [found] if engines.fits_together(found, _caches(spec, plan), room) else [[engine] for engine in found]


@contextmanager
def _meters(machine: Machine, progress: Progress) -> Iterator[Callable[[], None]]:
    """A function that measures the machine's limits once more."""
    meter = limits.ReadBandwidth(machine.threads, limits.SET_BYTES)

    def measure() -> None:
        machine.bandwidth.append(meter.measure())
        for name, found in limits.peaks(machine.threads).items():
            machine.peaks.setdefault(name, []).append(found)

    try:
        progress(f"read bandwidth: {meter.measure() / 1e9:.3g} GB/s")
        for name, found in limits.peaks(machine.threads).items():
            progress(f"peak of {name}: {found / 1e12:.3g} TFLOP/s")
        yield measure
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
