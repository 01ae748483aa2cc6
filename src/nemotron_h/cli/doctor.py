"""`nemotron-h doctor`: what this machine offers and what runs on it."""

from __future__ import annotations

import os
import platform
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Annotated, Any

import typer

from nemotron_h import __version__, demo
from nemotron_h.cli import _options, _pages
from nemotron_h.cli._output import columns, note, print_json, size

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy")
OPTIONAL = ("prompt-toolkit", "peft", "accelerate", "mamba-ssm", "causal-conv1d")

_MEASURED_BYTES = 256 << 20
_ABOUT_AMX = ("amx_permission", "amx_works")  # among the features, but no instruction sets


def command(
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure the memory bandwidth, map a file of 64 MiB.")
    ] = True,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Map the files of this packed checkpoint instead.")
    ] = None,
    json: _options.Json = False,
) -> None:
    """CPU features, threads, the implementation chosen for every op, versions, and what is missing."""
    note("importing torch")
    facts = {
        "versions": _versions(),
        "cpu": _cpu(),
        "threads": _threads(),
        "memory": _memory(measure),
        "pages": _huge_pages(measure, model),
        "kernels": _kernels(),
        "ops": _ops(),
        "cuda": _cuda(),
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith("NEMOTRON_H_")},
        "shipped_model": {
            "path": str(demo.demo_model()),
            "present": (demo.demo_model() / "model.safetensors").exists(),
        },
    }
    if json:
        print_json(facts)
    else:
        print("\n".join(_text(facts)))


def _versions() -> dict[str, Any]:
    return {
        "nemotron-h": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "optional": {name: _version(name) for name in OPTIONAL},
        "tested_transformers": _tested("transformers"),
    }


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _tested(package: str) -> dict[str, Any] | None:
    """The range that this package declares for another one, and whether the installed version lies in it."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires("nemotron-h") or []]
    except metadata.PackageNotFoundError:
        return None  # run from its sources
    installed = _version(package)
    for requirement in requirements:
        if requirement.name == package:
            inside = installed is not None and requirement.specifier.contains(installed, prereleases=True)
            return {"range": str(requirement.specifier), "inside": inside}
    return None


def _cpu() -> dict[str, Any]:
    from nemotron_h.benchmark import limits
    from nemotron_h.ops import _native

    features = _native.cpu_features()
    amx = _amx(features, _native.tile_kernels())
    return {"model": limits.cpu_model(), "machine": platform.machine(), "features": features, "amx": amx}


def _threads() -> dict[str, Any]:
    import torch

    from nemotron_h.ops import threads

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "torch": torch.get_num_threads(),
        "kernels": min(torch.get_num_threads(), threads.allowed_cores()),
        "cpus": os.cpu_count(),
        "affinity": allowed,
        "cgroup_quota": threads.cgroup_quota(),
    }


def _memory(measure: bool) -> dict[str, Any]:
    from nemotron_h.benchmark import limits

    speed = None
    if measure:
        meter = limits.ReadBandwidth(limits.allowed_cores(), _MEASURED_BYTES)
        speed = max(meter.measure() for _ in range(5))
        meter.close()
    return {"bytes": limits.total_memory(), "read_bytes_per_second": speed}


def _huge_pages(measure: bool, model: Path | None) -> dict[str, Any] | None:
    if model is not None:
        return _pages.of_model(model)._asdict()
    return _pages.of_machine()._asdict() if measure else None


def _kernels() -> dict[str, Any]:
    from nemotron_h.ops import _native

    if _native.load() is None:
        return {"levels": [], "level": None, "missing": _native.why_missing()}
    return {"levels": list(_native.levels()), "level": _native.level(), "missing": None}


def _ops() -> list[dict[str, Any]]:
    from nemotron_h import ops
    from nemotron_h.ops import dispatch

    for found in iter_modules(ops.__path__):
        if found.ispkg:
            import_module(f"nemotron_h.ops.{found.name}")
    return [row._asdict() for row in dispatch.table()]


def _cuda() -> dict[str, Any]:
    import torch

    packages = {name: find_spec(name) is not None for name in ("mamba_ssm", "causal_conv1d")}
    return {"available": torch.cuda.is_available(), "packages": packages, "note": "CUDA paths: not run on hardware"}


def _text(facts: dict[str, Any]) -> list[str]:
    versions, cpu, threads, memory = facts["versions"], facts["cpu"], facts["threads"], facts["memory"]
    features = ", ".join(name for name, present in cpu["features"].items() if present and name not in _ABOUT_AMX)
    speed = memory["read_bytes_per_second"]
    quota = "no limit" if threads["cgroup_quota"] is None else f"{threads['cgroup_quota']:g}"
    tested = versions["tested_transformers"]
    lines = [
        f"nemotron-h    {versions['nemotron-h']}, Python {versions['python']} ({sys.executable})",
        f"platform      {versions['platform']}",
        f"packages      {_listed(versions['packages'])}",
        f"optional      {_listed(versions['optional'])}",
        f"CPU           {cpu['model']}",
        f"features      {features or 'unknown without the kernels'}",
        f"AMX           {cpu['amx']}",
        f"threads       torch {threads['torch']}, kernels {threads['kernels']}; CPUs {threads['cpus']},"
        f" allowed {threads['affinity']}, quota {quota}",
        f"memory        {size(memory['bytes'])}" + (f", read at {size(speed)}/s by all cores" if speed else ""),
        *_page_lines(facts["pages"]),
        f"CUDA          {'available' if facts['cuda']['available'] else 'not available'};"
        f" {_listed(facts['cuda']['packages'])}; {facts['cuda']['note']}",
        f"model         {facts['shipped_model']['path']}"
        + ("" if facts["shipped_model"]["present"] else " (no weights)"),
    ]
    if tested is not None:
        verdict = "" if tested["inside"] else ": the installed one is outside, expect differences"
        lines.insert(4, f"tested        transformers {tested['range']}{verdict}")
    if facts["settings"]:
        lines.append("settings      " + " ".join(f"{name}={value}" for name, value in facts["settings"].items()))
    kernels = facts["kernels"]
    level = f"level {kernels['level']} of {', '.join(kernels['levels'])}"
    lines.append(f"kernels       {kernels['missing'] or level}")
    rows = [["op", "runs", "because"]] + [[row["op"], row["chosen"], row["reason"]] for row in facts["ops"]]
    return [*lines, "", *columns(rows, numbers=False)]


def _page_lines(pages: dict[str, Any] | None) -> list[str]:
    if pages is None:
        return []
    shares = [
        f"{100 * share:.0f} % of {what}"
        for share, what in (
            (pages["mapped_share"], f"a mapped file ({pages['file_system']}, {pages['path']})"),
            (pages["anonymous_share"], "other memory"),
        )
        if share is not None
    ]
    why = pages["why"] and pages["why"] + (f": {pages['advice']}" if pages["advice"] else "")
    texts = [text for text in (", ".join(shares), why) if text]
    return [f"{name:<14}{text}" for name, text in zip(("huge pages", ""), texts, strict=False)]


def _listed(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {'missing' if value in (None, False) else 'found' if value is True else value}"
        for name, value in found.items()
    )


def _amx(features: dict[str, bool], kernels: str) -> str:
    """Whether the level "amx" is offered, else why not. `kernels`: see `_native.tile_kernels`."""
    if not features:
        return "unknown without the kernels"
    if kernels == "emulation":
        return "emulated: these kernels are a build for tests, and slow"
    if not any(present and name.startswith("amx") for name, present in features.items() if name not in _ABOUT_AMX):
        return "the CPU has none"
    if not features["amx_permission"]:
        return "present, but the system does not permit it"
    if kernels == "none":
        return "permitted, but the compiler of these kernels knows none: install again with gcc 11, clang 12 or later"
    missing = [name for name in ("amx_tile", "amx_int8", "amx_bf16", "avx512_bf16") if not features[name]]
    if missing:
        return f"permitted, but the kernels also need {', '.join(missing)}"
    return "permitted" if features["amx_works"] else "permitted, but its products differ from other CPUs': not used"
