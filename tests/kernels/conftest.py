"""Tests of the C++ kernels; without the extension there is nothing to hold. test_native_build.py makes sure
that a machine with a compiler has it."""

from collections.abc import Iterator
from typing import Any

import pytest

from nemotron_h.ops import _native, settings
from nemotron_h.steps import BlockStep

collect_ignore_glob = [] if _native.levels() else ["test_*.py"]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks step as a whole only where nobody asked for a check of every op."""
    monkeypatch.delenv("NEMOTRON_H_CHECK", raising=False)
    settings.refresh()
    yield
    monkeypatch.undo()
    settings.refresh()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The types of the blocks whose step ran."""
    seen: list[str] = []
    right = BlockStep.__call__

    def spy(self: BlockStep, block: Any, *args: Any) -> Any:
        result = right(self, block, *args)
        if result is not None:
            seen.append(block.block_type)
        return result

    monkeypatch.setattr(BlockStep, "__call__", spy)
    return seen
