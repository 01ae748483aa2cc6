"""Shared by all tests: one thread per worker, deterministic hypothesis, the ops' environment variables."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings as hypothesis_settings

from nemotron_h.ops import _native, settings

torch.set_num_threads(1)  # pytest-xdist already uses the cores
hypothesis_settings.register_profile("repository", derandomize=True, deadline=None, max_examples=50)
hypothesis_settings.load_profile("repository")

SetEnvironment = Callable[..., None]


def pytest_report_header() -> str:
    return f"C++ kernels: {', '.join(_native.levels()) or _native.why_missing()}"


@pytest.fixture
def environment() -> Iterator[SetEnvironment]:
    """Call it with NEMOTRON_H_X=value to set the ops' variables: all unset at first, all restored afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IMPL", "ISA", "CHECK", "TRACE"):
            patch.delenv(f"NEMOTRON_H_{name}", raising=False)
        settings.refresh()

        def set_variables(**values: str) -> None:
            for name, value in values.items():
                patch.setenv(name, value)
            settings.refresh()

        yield set_variables
    settings.refresh()
