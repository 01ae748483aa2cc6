"""The rounds: every engine in its own process, in turn, on the same work; the machine's limits are measured between."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from nemotron_h import family
from nemotron_h.benchmark import engines
from nemotron_h.benchmark.engines import Engine, Subject
from nemotron_h.benchmark.measures import Bits, EngineFacts, LeftOut, Paths, Row
from nemotron_h.benchmark.process import Worker
from nemotron_h.errors import NemotronHError

Progress = Callable[[str], None]
STEP = 4  # tokens of one step as a drafted text is verified
_REST = 0.05  # seconds before a turn, in which the threads of the engine before stop spinning
_FIRST = 128  # tokens of the prompt that warms up, and tells how long longer ones will take
_BITS_TOKENS, _BITS_SEQUENCES = 150, 16  # a prompt that no piece divides


@dataclass(frozen=True)
class Plan:
    """What to measure: as in `Options`, with every default filled in, ascending."""

    contexts: Sequence[int]
    prompts: Sequence[int]
    sequences: Sequence[int]
    tokens: int
    repeats: int
    limit: float
    check_paths: bool = False


@dataclass(frozen=True)
class Work:
    """One row of a table for every engine.

    measure, size: As in `SIZES`.
    tokens, sequences, context: Of a step, for the arithmetic.
    prepare: Action of the workers before the first round, with arguments; None for none. action: The measured one.
    """

    measure: str
    size: int
    tokens: int
    sequences: int
    context: int
    prepare: tuple[str, Mapping[str, int]] | None
    action: tuple[str, Mapping[str, int]]
    words: str


def works(plan: Plan) -> list[Work]:
    """Everything that a plan measures, in its order."""
    found = [
        Work("decode", context, 1, 1, context, ("fill", {"context": context}), ("decode", {"tokens": plan.tokens}),
             f"behind {context:,} tokens")
        for context in plan.contexts
    ]  # fmt: skip
    first, steps = plan.contexts[0], -(-plan.tokens // STEP)
    found.append(
        Work("verify", STEP, STEP, 1, first, ("fill", {"context": first}), ("verify", {"steps": steps, "tokens": STEP}),
             f"in steps of {STEP} tokens")
    )  # fmt: skip
    found += [
        Work("prefill", prompt, prompt, 1, 0, None, ("prefill", {"tokens": prompt}), f"of a prompt of {prompt:,}")
        for prompt in plan.prompts
    ]
    every = (plan.tokens + 1) * plan.repeats  # each round begins with a step that is not timed
    found += [
        Work("batch", count, 1, count, 0, ("gather", {"sequences": count, "tokens": every}),
             ("together", {"tokens": plan.tokens}), f"by {count} sequences")
        for count in plan.sequences
    ]  # fmt: skip
    return found


class Rounds:
    """Measures groups of engines, and keeps what they found."""

    def __init__(
        self, subject: Subject, spec: Any, plan: Plan, measure: Callable[[], None], progress: Progress
    ) -> None:
        self.subject, self.spec, self.plan = subject, spec, plan
        self.measure, self.progress = measure, progress
        self.engines: list[EngineFacts] = []
        self.rows: list[Row] = []
        self.left_out: list[LeftOut] = []
        self.paths: Paths | None = None
        self.bits: Bits | None = None
        self._failed: set[Engine] = set()
        self._reading: dict[Engine, float] = {}  # tokens per second of the last prompt

    def run(self, group: Sequence[Engine]) -> None:
        """Load the engines of a group, let them work in turn, and end them. A peer that fails while it works takes no
        further part; what it measured before stays."""
        with ExitStack() as stack:
            workers: dict[Engine, Worker] = {}  # in the order of the group
            loaded: dict[Engine, dict[str, Any]] = {}
            for engine in group:
                worker = Worker(engine.name, engine.python, engine.program, engine.request["threads"])
                workers[engine] = stack.enter_context(worker)
                loaded[engine] = self._load(engine, worker)
            for work in works(self.plan):
                going = [engine for engine in workers if engine not in self._failed]
                ready = [engine for engine in going if self._may(engine, self._ready, workers[engine], work)]
                self._work({engine: workers[engine] for engine in ready}, work)
            ours = next((worker for engine, worker in workers.items() if engine.name == engines.OURS), None)
            if ours is not None:
                self._compare(ours)
            for engine, worker in workers.items():
                self._may(engine, self._end, worker, loaded[engine])

    def _may(self, engine: Engine, act: Callable[..., Any], *arguments: Any) -> Any:
        """act(engine, ...), or None where that fails a peer, now or before. An error of ours ends the run."""
        if engine not in self._failed:
            try:
                return act(engine, *arguments)
            except NemotronHError as error:
                if engine.name == engines.OURS:
                    raise
                self.progress(f"{error}; {engine.name} takes no further part")
                self._failed.add(engine)
                self.engines.append(EngineFacts(engine.name, engine.format, failed=str(error)))
        return None

    def _end(self, engine: Engine, worker: Worker, loaded: dict[str, Any]) -> None:
        peak = worker.ask("prefill", tokens=1)["peak_bytes"]  # from the start: contexts may be full
        self.engines.append(_facts(engine, loaded, peak))

    def _load(self, engine: Engine, worker: Worker) -> dict[str, Any]:
        self.progress(f"{engine.name}: {engine.weights} weights, {engine.format}, {engine.size / 1e9:.3g} GB")
        with engines.loading(engine, self.subject, self.spec, self.progress) as ready:
            return worker.ask("load", **ready.request)

    def _ready(self, engine: Engine, worker: Worker, work: Work) -> bool:
        """Prepare a worker; False where the work would take too long."""
        if work.prepare is not None:
            action, arguments = work.prepare
            if arguments.get("context"):
                self.progress(f"{engine.name}: reading {arguments['context']:,} tokens")
            worker.ask(action, **arguments)
        if work.measure != "prefill":
            return True
        if engine not in self._reading:
            tokens = min(_FIRST, work.size)
            self._reading[engine] = tokens / worker.ask("prefill", tokens=tokens)["seconds"]
        seconds = work.size / self._reading[engine]
        if seconds > self.plan.limit:
            self.progress(f"{engine.name}: {work.size:,} tokens left out: would take {seconds:,.0f} s")
            self.left_out.append(LeftOut(work.measure, engine.name, work.size, seconds))
        return seconds <= self.plan.limit

    def _work(self, workers: dict[Engine, Worker], work: Work) -> None:
        """Rounds of one kind of work. Only prompts take long enough to be limited: the rounds that fit are measured."""
        order = list(workers)
        rates: dict[Engine, list[float]] = {engine: [] for engine in order}
        spent, finite = dict.fromkeys(order, 0.0), dict.fromkeys(order, True)
        (action, arguments), limited = work.action, work.measure == "prefill"
        for number in range(self.plan.repeats if order else 0):
            time.sleep(_REST)
            self.measure()
            for engine in order if number % 2 == 0 else reversed(order):
                if limited and rates[engine] and _next(spent[engine], rates[engine]) > self.plan.limit:
                    continue
                time.sleep(_REST)
                answer = self._may(engine, lambda engine: workers[engine].ask(action, **arguments))
                if answer is None:
                    continue
                rates[engine].append(answer["tokens"] / answer["seconds"])
                spent[engine] += answer["seconds"]
                finite[engine] &= answer["finite"]
        for engine in [engine for engine in order if rates[engine]]:
            row = self._row(engine, work, rates[engine], finite[engine])
            self.progress(f"{engine.name}: {work.measure} {row.tokens_per_second:.4g} tok/s {work.words}")
            self.rows.append(row)
            if work.measure == "prefill":
                self._reading[engine] = row.tokens_per_second

    def _row(self, engine: Engine, work: Work, rates: list[float], finite: bool) -> Row:
        logits = STEP if work.measure == "verify" else 1
        done = family.operations(self.spec, work.tokens, work.sequences, work.context, logits).total
        return Row(
            work.measure, engine.name, engine.format, work.size, rates,
            engine.bytes_per_token(self.spec, work.tokens, work.sequences, work.context),
            done / (work.tokens * work.sequences), engine.arithmetic, finite,
        )  # fmt: skip

    def _compare(self, ours: Worker) -> None:
        """What is fast must also be right: the ways that were measured, against the slow ones."""
        self.progress("comparing bits with those of one row, one piece, one sequence at a time")
        longest = self.spec.max_position_embeddings
        answer = ours.ask("check_bits", tokens=min(_BITS_TOKENS, longest), sequences=_BITS_SEQUENCES)
        self.bits = Bits(*(answer[name] for name in ("compared", "differing", "rounding", "promised")))
        if self.plan.check_paths:
            self.progress("comparing model.generate, LLM.generate and the plain step")
            answer = ours.ask("compare_paths", tokens=self.plan.tokens, repeats=self.plan.repeats)
            self.paths = Paths(answer["tokens_per_second"])


def _next(spent: float, rates: list[float]) -> float:
    """Seconds spent after one more round that takes as long as those before."""
    return spent * (1 + 1 / len(rates))


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
