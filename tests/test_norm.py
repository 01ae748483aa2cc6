"""RMSNorm, plain and gated: the references against numerics.md's formulas written out, on any kind of tensor."""

import pytest
import torch
from torch import nn

from nemotron_h.errors import InputError
from nemotron_h.ops.norm import gated_rms_norm, rms_norm

EPS = 1e-5


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_rms_norm_is_the_formula() -> None:
    x, weight = draw(3, 4, 10), draw(10, seed=1)
    for row, out in zip(x.reshape(-1, 10).tolist(), rms_norm(x, weight, EPS).reshape(-1, 10).tolist(), strict=True):
        scale = (sum(v * v for v in row) / 10 + EPS) ** -0.5
        assert out == pytest.approx([w * v * scale for w, v in zip(weight.tolist(), row, strict=True)], rel=1e-13)


def test_eps_is_inside_the_root() -> None:
    assert rms_norm(torch.zeros(1, 4), torch.ones(4), 0.25).tolist() == [[0.0] * 4]
    assert rms_norm(torch.ones(1, 4), torch.ones(4), 3.0).tolist() == [[0.5] * 4]


def test_gated_rms_norm_gates_first_and_norms_each_group() -> None:
    y, z, weight = draw(2, 6), draw(2, 6, seed=1), draw(6, seed=2)
    out = gated_rms_norm(y, z, weight, EPS, n_groups=2)
    for r in range(2):
        u = [y[r, c].item() * z[r, c].item() / (1 + torch.exp(-z[r, c]).item()) for c in range(6)]
        for c in range(6):
            group = u[3 * (c // 3) : 3 * (c // 3) + 3]
            expected = weight[c].item() * u[c] * (sum(v * v for v in group) / 3 + EPS) ** -0.5
            assert out[r, c].item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_device_are_the_inputs(dtype: torch.dtype) -> None:
    x, weight = draw(2, 8, dtype=dtype), draw(8, dtype=torch.float32)
    assert rms_norm(x, weight, EPS).dtype == dtype
    assert gated_rms_norm(x.float(), x, weight, EPS, 2).dtype == dtype
    meta = rms_norm(x.to("meta"), weight.to("meta"), EPS)
    assert (meta.device.type, meta.shape, meta.dtype) == ("meta", x.shape, dtype)


def test_the_arithmetic_is_float32() -> None:
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # x² is beyond float16
    assert rms_norm(x, torch.ones(4096), EPS).tolist() == [[1.0] * 4096]
    assert gated_rms_norm(x, x, torch.ones(4096), EPS, 1).tolist() == [[1.0] * 4096]


def test_gradients() -> None:
    x, z, weight = (draw(*s, seed=i).requires_grad_() for i, s in enumerate([(2, 6), (2, 6), (6,)]))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, z, w: gated_rms_norm(x, z, w, EPS, 3), (x, z, weight))


@torch.no_grad()
def test_compile_and_vmap_see_the_reference() -> None:
    x, weight = draw(3, 5, 8, dtype=torch.float32), nn.Parameter(draw(8, dtype=torch.float32))
    expected = rms_norm(x, weight, EPS, impl="reference")
    compiled = torch.compile(lambda x: rms_norm(x, weight, EPS), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)
    assert torch.equal(torch.vmap(lambda x: rms_norm(x, weight, EPS))(x), expected)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"x \[2, 8\] needs a weight \[8\], got \[1\]"):
        rms_norm(torch.ones(2, 8), torch.ones(1), EPS)
    with pytest.raises(InputError, match=r"\[2, 8\], \[2, 4\] and \[8\]"):
        gated_rms_norm(torch.ones(2, 8), torch.ones(2, 4), torch.ones(8), EPS, 2)
    for groups in (3, 0, -2):
        with pytest.raises(InputError, match=f"8 channels do not split into {groups} equal groups"):
            gated_rms_norm(torch.ones(2, 8), torch.ones(2, 8), torch.ones(8), EPS, groups)
