"""lm-eval's tasks on an `LLM`: built-in ones by name, and task files of one's own (extra `eval`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from nemotron_h.errors import InputError, MissingDependencyError, UnsupportedError
from nemotron_h.generation import LLM

_CODE = "is code of the task file: look at it, and allow it with --trust-task-code (trust_code=True)"


class TaskScore(NamedTuple):
    """One metric of one task over `samples` documents; `stderr` is lm-eval's standard error, None where it has none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int


def run_tasks(
    llm: LLM,
    tasks: Sequence[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    trust_code: bool = False,
) -> list[TaskScore]:
    """Run tasks and return every metric.

    Args:
        tasks: Paths of YAML files, or names that lm-eval knows (their data then comes from the hub).
        limit: Only the first documents of each task.
        trust_code: Let a task file run code: `!function`, `include`, and templates outside of Jinja's sandbox.

    Raises:
        MissingDependencyError: lm-eval is not installed. InputError: no such task, or a file that is none.
            UnsupportedError: a task file with code in it.
    """
    try:
        import lm_eval

        from nemotron_h.evaluation.harness import NemotronHLM
    except ImportError as error:
        raise MissingDependencyError("tasks need lm-eval: pip install 'nemotron-h[eval]'") from error
    from lm_eval.tasks import TaskManager

    specs: list[Any] = [_spec(task, trust_code) for task in tasks]
    names = [spec for spec in specs if isinstance(spec, str) and not Path(spec).exists()]
    manager: Any = TaskManager(include_defaults=bool(names))  # to index its own tasks takes it seconds
    for name in names:
        if not manager.match_tasks([name]):
            raise InputError(f"{name}: no YAML file, and no task that lm-eval {lm_eval.__version__} knows")
    evaluate, model_class = cast(Any, lm_eval.simple_evaluate), cast(Any, NemotronHLM)  # decorators hide their types
    with _sandboxed(not trust_code):
        found = evaluate(
            model=model_class(llm), tasks=specs, limit=limit, num_fewshot=num_fewshot, task_manager=manager,
            apply_chat_template=apply_chat_template, log_samples=False,
        )  # fmt: skip
    return [score for name, metrics in found["results"].items() for score in _scores(name, metrics, found)]


def _scores(task: str, metrics: dict[str, Any], found: Any) -> Iterator[TaskScore]:
    samples = found.get("n-samples", {}).get(task, {}).get("effective", 0)
    for key, value in metrics.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{metric}_stderr,{kind}")
        yield TaskScore(
            task, metric, float(value), float(error) if isinstance(error, int | float) else None, int(samples)
        )


def _spec(task: str, trust_code: bool) -> str | dict[str, Any]:
    """A name as it is; a local file as the configuration that it holds, with data files relative to it."""
    path = Path(task)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        return task
    if trust_code:
        return task
    config = _read(path)
    if "include" in config:
        raise UnsupportedError(f"{task}: include: {_CODE}")
    if "task" not in config or not isinstance(config["task"], str):
        raise InputError(f"{task}: not a task file: it needs a task: NAME and what lm-eval's task guide lists")
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if files is not None:
        config["dataset_kwargs"] = config["dataset_kwargs"] | {"data_files": _beside(files, path.parent)}
    return config


def _read(path: Path) -> dict[str, Any]:
    import yaml  # comes with lm-eval

    class Loader(yaml.SafeLoader):
        """Refuses `!function`, which would import a Python file beside the task."""

    def refuse(loader: Any, node: Any) -> None:
        raise UnsupportedError(f"{path}: !function {node.value} {_CODE}")

    Loader.add_constructor("!function", refuse)
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: not a YAML file: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: a task file holds a mapping, this one a {type(config).__name__}")
    return config


def _beside(files: Any, directory: Path) -> Any:
    if isinstance(files, dict):
        return {name: _beside(file, directory) for name, file in files.items()}
    if isinstance(files, list):
        return [_beside(file, directory) for file in files]
    local = directory / str(files)
    return str(local) if local.exists() else files


@contextmanager
def _sandboxed(wanted: bool) -> Iterator[None]:
    """While tasks run, render their templates in Jinja's sandbox; lm-eval's own environment lets a template reach any
    Python object."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if not wanted:
        yield
        return
    free = utils.env
    sandbox = SandboxedEnvironment(
        loader=free.loader, undefined=free.undefined, keep_trailing_newline=free.keep_trailing_newline
    )
    sandbox.filters.update(free.filters)
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = free
