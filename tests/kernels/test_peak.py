"""The peaks of arithmetic: what the kernel says it did, on how many threads, and that it really did."""

import ctypes
import math

import pytest

from nemotron_h.benchmark import limits
from nemotron_h.ops import _native

LANES = 16


@pytest.fixture
def sinks():
    return (ctypes.c_float * _native.extension().peak_sinks)(*[math.nan] * _native.extension().peak_sinks)


@pytest.fixture
def threads():
    extension = _native.extension()
    before = extension.threads()
    yield extension.set_threads
    extension.set_threads(before)


def written(sinks):
    return [value for value in sinks if not math.isnan(value)]


@pytest.mark.parametrize("level", _native.levels())
@pytest.mark.parametrize("kind", range(len(limits.PEAKS)))
def test_what_is_done(level, kind, sinks, threads):
    """Twice the rounds, or the threads, are twice the operations; every thread leaves a sum, and they are equal."""
    peak = _native.kernels(level).peak
    threads(1)
    one, two = (peak(kind, rounds, ctypes.addressof(sinks)) for rounds in (3, 6))
    assert one > 0
    assert two == 2 * one
    assert one % (2 * LANES) == 0
    assert len(written(sinks)) == 1
    threads(2)
    assert peak(kind, 3, ctypes.addressof(sinks)) == 2 * one
    assert len(written(sinks)) == 2
    assert sinks[0] == sinks[1]
    assert math.isfinite(sinks[0])


@pytest.mark.parametrize("level", [level for level in _native.levels() if level != "amx"])
def test_the_work_is_really_done(level, sinks, threads):
    """The sums are those of the recurrences, so no compiler has left them out."""
    peak = _native.kernels(level).peak
    threads(1)
    rounds = 5
    operations = peak(0, rounds, ctypes.addressof(sinks))
    steps = 16 * rounds
    chains = operations / (2 * LANES * steps)
    assert chains in (6, 12)
    # sum = sum / 2 + 1 tends to 2, from c on: after so many steps it is there.
    assert sinks[0] == 2 * LANES * chains
    operations = peak(2, rounds, ctypes.addressof(sinks))
    assert operations == 2 * 4 * LANES * steps * chains
    # Each step adds one product of 3 and 1 to every lane; the chains begin at 0, 1, 2 ...
    assert sinks[0] == LANES * (chains * (chains - 1) / 2 + 3 * steps * chains)


def test_more_instructions_are_faster():
    """Eight times over, but for levels that are not there: one of the best of several runs must show it."""
    if len(_native.levels()) < 2:
        return
    sinks = (ctypes.c_float * _native.extension().peak_sinks)()
    lowest, highest = (
        max(limits._peak(_native.kernels(level), sinks, 0) for _ in range(3))
        for level in (_native.levels()[0], _native.levels()[-1])
    )
    assert highest > lowest
