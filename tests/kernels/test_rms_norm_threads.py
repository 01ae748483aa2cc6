"""The plain RMSNorm kernel on the pool; test_native_build.py holds the rest of it."""

import pytest
import torch
from mamba_cases import DTYPES, LEVELS, assert_bits, draw, kernel_threads, poisoned_memory

from nemotron_h.ops.norm import native


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "eps"), [(1.0, 1e-5), (1e-38, 1e-30)])
@pytest.mark.parametrize(("rows", "cols"), [(70, 1003), (3, 30001), (1, 70000), (9000, 9)])
def test_the_rows_of_a_prompt_have_the_bits_of_single_ones(
    rows: int, cols: int, dtype: torch.dtype, scale: float, eps: float
) -> None:
    """Of subnormal values too, though the pool's threads else count them as zero."""
    x, weight = draw(rows, cols + 7, dtype=dtype, scale=scale)[:, 3 : cols + 3], draw(cols, seed=1, dtype=dtype)
    some = range(0, rows, max(1, rows // 20))
    apart = torch.stack([native.rms_norm(x[row], weight, eps, LEVELS[0]) for row in some])
    assert apart.any()
    for level in LEVELS:
        for count in (1, 2, 5):
            with kernel_threads(count), poisoned_memory():
                together = native.rms_norm(x, weight, eps, level)
            assert together.isfinite().all()
            assert_bits((together[list(some)],), (apart,), (level, count))
