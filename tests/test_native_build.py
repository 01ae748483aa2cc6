"""The C++ RMSNorm kernel: one set of bits at every level, within its budget, on every layout it accepts.

Without the extension there are no levels to loop over; test_dispatch.py holds what must happen then.
"""

import ctypes
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn

from nemotron_h.errors import KernelError
from nemotron_h.ops import _native, dispatch, norm, settings
from nemotron_h.ops.norm import native, reference, rms_norm

EPS = 1e-5
LEVELS = _native.levels()
DTYPES = (torch.float32, torch.bfloat16)
SLACK = norm._RMS_NORM.slack


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def compiler_works(folder: Path) -> bool:
    """Whether CXX (else c++) makes an extension module here, Python's headers included."""
    source = folder / "probe.cpp"
    source.write_text("#include <Python.h>\n")
    command = [os.environ.get("CXX") or "c++", "-I", sysconfig.get_paths()["include"], "-c", str(source)]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0
    except OSError:
        return False


def test_the_levels_are_this_cpus() -> None:
    assert settings.LEVELS[: len(LEVELS)] == LEVELS
    features = _native.cpu_features()
    assert ("avx2" in LEVELS) == bool(features.get("avx2") and features["fma"])
    assert ("amx" in LEVELS) == features.get("amx_works", False)
    if _native.tile_kernels() == "instructions":  # a CPU whose products are wrong would also be a finding
        usable = all(features[f"amx_{name}"] for name in ("tile", "int8", "bf16", "permission")) and "avx512" in LEVELS
        assert features["amx_works"] == usable
    else:
        assert features.get("amx_works", False) == (_native.tile_kernels() == "emulation" and "avx512" in LEVELS)
    if Path("/proc/cpuinfo").exists() and LEVELS:
        flags = set(Path("/proc/cpuinfo").read_text().split("\n\n")[0].replace("\n", " ").split())
        for name in sorted(features.keys() - {"amx_permission", "amx_works"}):
            assert features[name] == (name in flags), name


def test_the_tile_permission_is_asked_for() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        assert not _native.cpu_features().get("amx_permission", False)
        return
    features = (
        _native.cpu_features()
    )  # before this test's own request, which would also serve a kernel that forgot to ask
    arch_prctl, request_xcomp_perm, tile_data = 158, 0x1023, 18
    granted = ctypes.CDLL(None).syscall(arch_prctl, request_xcomp_perm, tile_data) == 0
    if LEVELS:
        assert features["amx_permission"] == (features["amx_tile"] and granted)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_all_levels_give_the_same_bits(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    for cols in (*range(1, 131), 1000, 2688, 4095, 4096, 4097):
        weight = draw(cols, seed=1, dtype=weight_dtype)
        for scale in (1.0, 3e-20, 1e-39, 1e18):
            x = draw(3, cols, seed=cols, dtype=x_dtype, scale=scale)
            outs = [bits(native.rms_norm(x, weight, EPS, level)) for level in LEVELS]
            assert all(torch.equal(out, outs[0]) for out in outs), (cols, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours_or_its_address(dtype: torch.dtype) -> None:
    for level in LEVELS:
        for cols in (5, 16, 77, 640):
            storage = draw(20 * (cols + 3), seed=cols, dtype=dtype)
            weight = draw(cols + 1, seed=1, dtype=dtype)[1:]
            rows = storage[1:].as_strided((7, cols), (cols + 3, 1))
            together = bits(native.rms_norm(rows, weight, EPS, level))
            apart = [bits(native.rms_norm(row.clone(), weight.clone(), EPS, level)) for row in rows]
            assert torch.equal(together, torch.stack(apart)), (level, cols)


@examples(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 4), max_size=2),
    cols=st.integers(1, 4097),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    exponent=st.integers(-12, 12),
    eps=st.sampled_from([1e-5, 1e-6, 1e-3]),
    seed=st.integers(0, 999),
)
def test_every_row_is_within_the_budget(
    shape: list[int], cols: int, dtypes: tuple[torch.dtype, torch.dtype], exponent: int, eps: float, seed: int
) -> None:
    x = draw(*shape, cols, seed=seed, dtype=dtypes[0], scale=10.0**exponent)
    weight = draw(cols, seed=seed + 1, dtype=dtypes[1])
    low = reference.rms_norm(x, weight, eps).view(-1, cols)
    high = reference.rms_norm(x.double(), weight.double(), eps).view(-1, cols)
    for level in LEVELS:
        out = native.rms_norm(x, weight, eps, level)
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
        for row in range(low.shape[0]):
            error, allowed = dispatch.budget(out.view(-1, cols)[row], low[row], high[row], SLACK)
            assert error <= allowed, (level, row)


def test_bfloat16_is_the_float32_result_rounded_once() -> None:
    x, weight = draw(9, 1000, dtype=torch.bfloat16, scale=4.0), draw(1000, seed=1)
    for level in LEVELS:
        exact = native.rms_norm(x.float(), weight, EPS, level)
        assert torch.equal(bits(native.rms_norm(x, weight, EPS, level)), bits(exact.bfloat16())), level


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nans_are_the_references(dtype: torch.dtype) -> None:
    x, weight = draw(5, 37, dtype=dtype), torch.ones(37)
    x[0, 3], x[1, 20], x[2, 36], x[3, 7] = float("inf"), float("nan"), float("-inf"), 3e38
    weight[9] = float("nan")
    expected = reference.rms_norm(x, weight, EPS)
    for level in LEVELS:
        out = native.rms_norm(x, weight, EPS, level)
        assert torch.allclose(out, expected, equal_nan=True, rtol=1e-2), level


def test_every_nan_is_stored_as_the_same_bfloat16() -> None:
    weight = torch.tensor([0x7FFFFFFF, -1, 0x7FC00001, 0x7F800001], dtype=torch.int32).view(torch.float32).repeat(5)
    for level in LEVELS:  # rounded like a number, the first would become -0
        out = native.rms_norm(torch.ones(1, 20, dtype=torch.bfloat16), weight, EPS, level)
        assert bits(out).tolist() == [[0x7FC0] * 20], level


def rows_at_equal_distance() -> list[Tensor]:
    x = draw(2, 3, 5, 24)
    return [
        x,
        x[:, :, -1],
        x[:1, 1],
        x[0],
        x[1, 2, 3],
        x[..., :16],
        x[:1, :, 2:3, 4:],
        x.expand(7, 2, 3, 5, 24)[:, 0, 0, 0],
    ]


def test_layouts_that_the_kernel_takes() -> None:
    for x in rows_at_equal_distance():
        weight = draw(x.shape[-1], seed=1)
        assert native._row_stride(x) is not None
        for level in LEVELS:
            out = native.rms_norm(x, weight, EPS, level)
            assert out.is_contiguous()
            torch.testing.assert_close(out, reference.rms_norm(x, weight, EPS), rtol=1e-5, atol=1e-6)


def refused() -> dict[str, tuple[Tensor, Tensor]]:
    x, weight = draw(2, 3, 8), draw(8, seed=1)
    return {
        "requires grad": (x, nn.Parameter(weight)),
        "meta": (x.to("meta"), weight.to("meta")),
        "not torch.float64": (x.double(), weight),
        "with torch.float16": (x, weight.half()),
        "at one distance": (x.transpose(0, 1), weight),
        r"\(360, 24, 1\)": (draw(2, 3, 5, 24)[:, 1], draw(24)),
        "are not contiguous": (draw(8, 2).t(), weight),
        "weight is not contiguous": (x, draw(8, 2)[:, 0]),
        "x is empty": (x[:0], weight),
        r"does not fit x \[2, 3, 8\]": (x, draw(7)),
        r"weight \[8, 8\] does not fit": (x, torch.ones(8, 8)),
        r"does not fit x \[\]": (torch.ones(()), torch.ones(())),
    }


@pytest.mark.parametrize("reason", refused())
def test_what_the_kernel_refuses(reason: str) -> None:
    x, weight = refused()[reason]
    with pytest.raises(KernelError, match=reason if LEVELS else "without its C"):
        rms_norm(x, weight, EPS, impl="native")


def test_the_automatic_choice_is_the_kernel_exactly_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    kernel: Callable[..., Tensor] = norm._RMS_NORM.native

    def spy(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        calls.append(x)
        return kernel(x, weight, eps)

    monkeypatch.setattr(norm._RMS_NORM, "native", spy)
    for reason, (x, weight) in refused().items():
        if "fit" not in reason:
            rms_norm(x, weight, EPS)
    assert not calls
    rms_norm(draw(2, 8), draw(8), EPS)
    with torch.no_grad():
        rms_norm(draw(2, 8), nn.Parameter(draw(8)), EPS)
    assert len(calls) == (2 if LEVELS else 0)


def test_check_accepts_the_kernel(environment: Callable[..., None]) -> None:
    environment(NEMOTRON_H_CHECK="1")
    for dtype in DTYPES:
        for cols in (1, 7, 64, 2688):
            out = rms_norm(draw(4, cols, dtype=dtype), draw(cols, seed=1), EPS)
            assert out.shape == (4, cols)


def test_the_environment_chooses_the_level(environment: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    for level in LEVELS:
        environment(NEMOTRON_H_ISA=level, NEMOTRON_H_TRACE="1")
        rms_norm(draw(2, 8), draw(8), EPS)
    assert caplog.messages == [f"rms_norm: native {level}, float32[2, 8] float32[8]" for level in LEVELS]


def test_the_extension_is_there_wherever_a_compiler_is(tmp_path: Path) -> None:
    if compiler_works(tmp_path):
        assert LEVELS, f"this machine has a compiler, yet {_native.why_missing()} (`make clean`, then `make test`)"
    else:
        assert LEVELS or "apt-get install g++" in _native.why_missing()


def test_importing_the_extension_module_asks_for_nothing() -> None:
    program = (
        "import sys, nemotron_h.ops._native as n; n.levels(); print(sorted({'torch', 'numpy'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
