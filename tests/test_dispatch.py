"""Which implementation an op picks, what it says about it, and what the environment variables do.

The op under test is a stand-in whose kernel is a Python function, so that the extension makes no difference here.
"""

import importlib
import logging
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from nemotron_h.errors import KernelError
from nemotron_h.ops import _native, dispatch, settings
from nemotron_h.ops.norm import rms_norm

SetEnvironment = Callable[..., None]


def double_reference(x: Tensor) -> Tensor:
    return x * 2


def double_native(x: Tensor) -> Tensor:
    return x + x


def big(x: Tensor) -> str | None:
    return "x is big" if x.numel() > 100 else None


@pytest.fixture
def op(environment: SetEnvironment) -> dispatch.Op:
    return dispatch.Op("double", double_reference, double_native, big, slack=1.0)


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(_native, "_load", _native._load.__wrapped__)
    monkeypatch.setattr(_native, "levels", _native.levels.__wrapped__)
    monkeypatch.setattr(importlib, "import_module", import_module)


def test_the_automatic_choice(op: dispatch.Op) -> None:
    assert op.why_reference((torch.ones(3),), None) is None
    assert op.why_reference((torch.ones(200),), None) == "x is big"


def test_an_explicit_request_never_falls_back(op: dispatch.Op) -> None:
    assert op(torch.ones(3), impl="native").tolist() == [2.0] * 3
    assert op(torch.ones(200), impl="reference").shape == (200,)
    with pytest.raises(KernelError, match="double: impl='native' was asked for, but x is big"):
        op(torch.ones(200), impl="native")
    with pytest.raises(KernelError, match="'fast' is not known: use 'reference', 'native' or None"):
        op(torch.ones(3), impl="fast")
    with pytest.raises(KernelError, match="it has no C\\+\\+ kernel"):
        dispatch.Op("plain", double_reference, double_reference, dispatch._no_kernel, 1.0)(torch.ones(3), impl="native")


def test_impl_reference_wins_over_the_kernel(op: dispatch.Op, environment: SetEnvironment) -> None:
    environment(NEMOTRON_H_IMPL="reference")
    assert op.why_reference((torch.ones(3),), None) == "NEMOTRON_H_IMPL=reference"
    assert op.why_reference((torch.ones(3),), "native") is None


@pytest.mark.usefixtures("without_extension")
def test_impl_native_needs_the_extension(op: dispatch.Op, environment: SetEnvironment) -> None:
    environment(NEMOTRON_H_IMPL="native")
    with pytest.raises(KernelError, match=r"NEMOTRON_H_IMPL=native, but .*apt-get install g\+\+"):
        op(torch.ones(3))
    plain = dispatch.Op("plain", double_reference, double_reference, dispatch._no_kernel, 1.0)
    assert plain(torch.ones(3)).tolist() == [2.0] * 3  # an op without a kernel has nothing to miss


def test_impl_native_leaves_uncovered_inputs_to_the_reference(
    op: dispatch.Op, environment: SetEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "load", lambda: object())
    environment(NEMOTRON_H_IMPL="native")
    assert op.why_reference((torch.ones(200),), None) == "x is big"
    assert op.why_reference((torch.ones(3),), None) is None


@pytest.mark.usefixtures("without_extension")
def test_without_the_extension_everything_runs_and_says_why(environment: SetEnvironment) -> None:
    assert rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).tolist() == [[1.0] * 4]
    assert _native.levels() == ()
    assert "apt-get install g++ python3-dev" in _native.why_missing()
    rows = {row.op: row for row in dispatch.table()}
    assert rows["rms_norm"] == ("rms_norm", ("reference", "native"), "reference", _native.why_missing())
    for call in (_native.level, lambda: rms_norm(torch.ones(1, 4), torch.ones(4), 0.0, impl="native")):
        with pytest.raises(KernelError, match="without its C\\+\\+ kernels"):
            call()


def test_an_extension_from_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        interface_version = -1

    monkeypatch.setattr(_native, "_load", _native._load.__wrapped__)
    monkeypatch.setattr(importlib, "import_module", lambda name: Old)
    assert _native.load() is None
    assert "other sources" in _native.why_missing()


def test_a_broken_extension_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> None:
        raise ImportError("undefined symbol: frobnicate")

    monkeypatch.setattr(_native, "_load", _native._load.__wrapped__)
    monkeypatch.setattr(importlib, "import_module", import_module)
    assert "undefined symbol: frobnicate" in _native.why_missing()


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("NEMOTRON_H_IMPL", "reference, native"),
        ("NEMOTRON_H_ISA", "generic, avx2, avx512, amx"),
        ("NEMOTRON_H_CHECK", "0, 1"),
        ("NEMOTRON_H_TRACE", "0, 1"),
    ],
)
def test_a_bad_value_raises(environment: SetEnvironment, name: str, legal: str) -> None:
    with pytest.raises(KernelError, match=f"{name}='bad' is not known: use {legal}, or unset it"):
        environment(**{name: "bad"})
    with pytest.raises(KernelError, match=name):  # and again at every op, until it is mended
        rms_norm(torch.ones(1, 4), torch.ones(4), 0.0)


def test_settings_are_read_once(environment: SetEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMOTRON_H_CHECK", "1")
    assert not settings.current().check
    assert settings.refresh() == settings.Settings(impl=None, isa=None, check=True, trace=False)


def test_a_level_that_this_cpu_lacks(environment: SetEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "levels", lambda: ("generic", "avx2"))
    assert _native.level() == "avx2"
    environment(NEMOTRON_H_ISA="generic")
    assert _native.level() == "generic"
    environment(NEMOTRON_H_ISA="amx")
    with pytest.raises(KernelError, match="NEMOTRON_H_ISA='amx': this CPU has generic, avx2; use one or unset it"):
        _native.level()


def test_check_catches_a_wrong_kernel(
    op: dispatch.Op, environment: SetEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "level", lambda: "avx2")
    x = torch.linspace(-3, 3, 90).view(9, 10)
    environment(NEMOTRON_H_CHECK="1")
    assert torch.equal(op(x), 2 * x)
    op.native = lambda x: x * 2.00001
    with pytest.raises(KernelError, match=r"double: native avx2 is off by .* is allowed, for float32\[9, 10\]"):
        op(x)
    environment(NEMOTRON_H_CHECK="0")
    assert torch.equal(op(x), x * 2.00001)


def test_check_forgives_rounding_where_terms_cancel_and_nothing_else(environment: SetEnvironment) -> None:
    """The result is a thousandth of its terms, and the reference is exact by luck."""
    op = dispatch.Op("sum", lambda x: x.sum(-1, keepdim=True), torch.neg, lambda x: None, slack=1.0, fast_name="fast")
    environment(NEMOTRON_H_CHECK="1")
    x = torch.tensor([[512.0, -511.0]])
    rounding = 1.5e-5  # a quarter of float32's eps times 512
    for error in (0.0, rounding, -rounding, 4 * rounding):
        op.native = lambda x, error=error: x.sum(-1, keepdim=True) + error
        op(x)
    for error in (0.001, float("inf"), float("nan")):
        op.native = lambda x, error=error: x.sum(-1, keepdim=True) + error
        with pytest.raises(KernelError, match=r"sum: .* is off by"):
            op(x)


def test_sensitivity_is_one_rounding_of_every_input() -> None:
    eps = torch.finfo(torch.float32).eps
    x, w = torch.tensor([3.0, 4.0, float("nan")]), torch.tensor([1, 1, 1])
    assert dispatch.sensitivity(lambda x, w: x * w, (x, w)) == pytest.approx(5 * eps, rel=1e-6)
    assert dispatch.sensitivity(lambda x: x[:2].double() ** 2, (x,)) == pytest.approx(2 * eps * 337**0.5, rel=1e-6)


def test_the_budget_counts_what_is_not_finite() -> None:
    low = torch.tensor([1.0, float("nan"), float("inf"), 2.0])
    assert dispatch.budget(low.clone(), low, low.double(), 1.0)[0] == 0.0
    for index, value in ((1, 5.0), (2, float("-inf")), (3, float("nan"))):
        fast = low.clone()
        fast[index] = value
        error, allowed = dispatch.budget(fast, low, low.double(), 1.0)
        assert error > allowed


def test_the_budget_is_the_formula() -> None:
    high = torch.tensor([3.0, 4.0], dtype=torch.float64)
    low, fast = torch.tensor([3.0, 4.5]), torch.tensor([3.25, 4.0])
    eps = torch.finfo(torch.float32).eps
    assert dispatch.budget(fast, low, high, 8.0) == pytest.approx((0.25, 2 * 0.5 + 8 * eps * 5.0), rel=1e-12)


def test_trace(op: dispatch.Op, environment: SetEnvironment, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    op(torch.ones(3))
    assert not caplog.messages
    environment(NEMOTRON_H_TRACE="1")
    op(torch.ones(200, dtype=torch.bfloat16))
    assert caplog.messages == ["double: reference (x is big), bfloat16[200]"]


def test_trace_goes_to_stderr_alone() -> None:
    program = "import torch; from nemotron_h.ops.norm import rms_norm; rms_norm(torch.ones(2, 4), torch.ones(4), 0.0)"
    variables = {"NEMOTRON_H_TRACE": "1", "NEMOTRON_H_IMPL": "reference", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True)
    assert run.stdout == ""
    assert run.stderr.strip() == "rms_norm: reference (NEMOTRON_H_IMPL=reference), float32[2, 4] float32[4]"


class Marked(Tensor):
    """A subclass that changes nothing."""


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_not_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load", lambda: object())
    x = torch.ones(2, 4)
    assert dispatch.not_plain(x, nn.Parameter(x, requires_grad=False)) is None
    with torch.no_grad():
        assert dispatch.not_plain(nn.Parameter(x)) is None
    with torch.inference_mode():
        assert dispatch.not_plain(x + 1) is None
    assert dispatch.not_plain(x, nn.Parameter(x)) == "a tensor requires grad"
    assert dispatch.not_plain(x.to("meta")) == "a tensor is on meta, not on the CPU"
    assert dispatch.not_plain(x.as_subclass(Marked)) == "Marked is not a plain tensor"
    lazily_negated = torch.complex(x, x).conj().imag
    for odd in (x.to_sparse(), torch.nested.nested_tensor([x]), lazily_negated):
        assert dispatch.not_plain(odd) == "a tensor is sparse, nested or lazily negated"


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_modes_and_transforms_are_not_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load", lambda: object())
    x = torch.ones(2, 4)
    seen: list[str | None] = []

    def look(x: Tensor) -> Tensor:
        seen.append(dispatch.not_plain(x))
        return x * 2

    torch.vmap(look)(x)
    torch.func.grad(lambda x: look(x).sum())(x)
    torch.jit.trace(look, x, check_trace=False)
    with forward_ad.dual_level():
        look(x)
    with FlopCounterMode(display=False):
        look(x)
    with FakeTensorMode():
        look(torch.ones(2, 4))
    functorch, mode = "a functorch transform (vmap, grad, jvp) is active", "a TorchDispatchMode"
    expected = [functorch, functorch, "torch.jit.trace is recording", "forward-mode autograd is active", mode, mode]
    assert [str(reason)[: len(start)] for reason, start in zip(seen, expected, strict=True)] == expected


def test_compile_takes_the_reference_and_refuses_native(op: dispatch.Op) -> None:
    op.native = double_native
    compiled = torch.compile(lambda x: op(x) + 1, fullgraph=True, backend="eager")
    assert compiled(torch.ones(3)).tolist() == [3.0] * 3
    with pytest.raises(Unsupported, match="impl='native' was asked for, but torch"):  # dynamo wraps our KernelError
        torch.compile(lambda x: op(x, impl="native"), fullgraph=True, backend="eager")(torch.ones(3))
