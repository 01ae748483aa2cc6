"""Packed formats: what the bytes mean, that nothing foreign is lost, and how well our own formats keep weights.

Letters: N rows · K columns · g groups of 32.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_cases import GROUPED, PACKINGS, draw
from torch import Tensor

from nemotron_h.errors import CheckpointError, ConfigError, InputError
from nemotron_h.ops import _native
from nemotron_h.ops.pack import pack_into
from nemotron_h.quantization import BF16, INT4, INT8, Packing, grouped, grouped_packing, own, pack, scheme, unpack

OURS = [BF16, INT8, INT4]
SIZES = (1, 15, 16, 17, 64, 80, 96, 129, 300)


@given(
    packing=st.sampled_from([BF16, *GROUPED]), n=st.sampled_from(SIZES), k=st.sampled_from(SIZES),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_foreign_weights_and_bfloat16_are_exact(packing: Packing, n: int, k: int, seed: int) -> None:
    packed, values = draw(packing, n, k, torch.Generator().manual_seed(seed))
    assert values is not None
    unpacked = unpack(packed.panels, packing, n, k).double()
    # A product of an integer and a scale is exact in float32; adding a minimum rounds once.
    tolerance = 2.0**-24 * values.abs().max() if packing.has_min else 0.0
    assert float((unpacked - values).abs().max()) <= tolerance


@given(
    packing=st.sampled_from(OURS), n=st.sampled_from(SIZES), k=st.sampled_from(SIZES), seed=st.integers(0, 2**31),
    kind=st.sampled_from(("normal", "heavy", "rows", "zeros")),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_kernel_and_pytorch_pack_the_same_bytes(packing: Packing, n: int, k: int, seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    if kind == "heavy":
        w = w / torch.rand(n, k, generator=generator)
    if kind == "rows":
        w = w * torch.exp(8 * torch.randn(n, 1, generator=generator))
    if kind == "zeros":
        w = w * (torch.rand(n, k, generator=generator) < 0.1)
    expected = own.pack(w, packing)
    assert expected.shape == packing.shape(n, k)
    for level in _native.levels():
        panels = torch.full_like(expected, 0x55)
        assert _native.kernels(level).pack(w.data_ptr(), n, k, packing.code, panels.data_ptr())
        assert torch.equal(panels, expected)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_sizes_are_the_kernels(packing: Packing) -> None:
    for cols in SIZES:
        assert packing.panel_bytes(cols) == _native.extension().panel_bytes(packing.code, cols, packing.group)
        assert packing.panel_bytes(cols) % 64 == 0


def test_bits_per_weight() -> None:
    """Of the shapes of Nemotron 3 Nano: 4.25 bits or less, 8.1 and 16."""
    for rows, cols in ((10304, 2688), (2688, 4096), (1856, 2688), (2688, 1856), (131072, 2688)):
        for packing, most in ((INT4, 4.25), (INT8, 8.1), (BF16, 16)):
            panels, size = packing.shape(rows, cols)
            assert panels * size * 8 / (rows * cols) <= most


def relative(w: Tensor, approximation: Tensor) -> float:
    return float((approximation.double() - w.double()).norm() / w.double().norm())


def ideal_groups(w_NK: Tensor, bits: int) -> Tensor:
    """The best step of every group of 32 by search over 100 candidates, kept in float32: more than any format has."""
    groups = w_NK.unflatten(1, (-1, 32))
    high, low = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    top = groups.abs().amax(-1, keepdim=True)
    best, least = torch.zeros_like(groups), torch.full_like(top, torch.inf)
    for share in torch.linspace(0.6, 1.1, 100):
        step = top * share / high
        values = (groups / step).round().clamp(low, high) * step
        error = (groups - values).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, values, best), torch.minimum(error, least)
    return best.flatten(1)


@pytest.mark.parametrize("kind", ["normal", "t5", "t3", "outliers", "trained"])
def test_int4_is_as_good_as_ideal_groups_of_32(kind: str) -> None:
    w = weights(kind)
    assert relative(w, unpack(pack(w, INT4), INT4, *w.shape)) <= 1.0 * relative(w, ideal_groups(w, 4))


@pytest.mark.parametrize(("kind", "factor"), [("normal", 1.4), ("t5", 1.7), ("t3", 2.2), ("trained", 1.4)])
def test_int8_against_ideal_groups_of_32(kind: str, factor: float) -> None:
    """Blocks of 128 have larger steps than groups of 32, for 0.44 bits less; activations round at the same block."""
    w = weights(kind)
    assert relative(w, unpack(pack(w, INT8), INT8, *w.shape)) <= factor * relative(w, ideal_groups(w, 8))


def weights(kind: str) -> Tensor:
    torch.manual_seed(0)
    if kind == "trained":
        from nemotron_h import NemotronHForCausalLM, demo_model

        return NemotronHForCausalLM.from_pretrained(demo_model()).model.embeddings.weight.float()[:512, :160].detach()
    if kind in ("t5", "t3"):
        return torch.distributions.StudentT(float(kind[1])).sample((64, 1344))
    w = torch.randn(64, 1344)
    return torch.where(torch.rand(64, 1344) < 0.002, 20 * w, w) if kind == "outliers" else w


def test_zero_rows_and_columns_behind_the_last_are_zero() -> None:
    for packing in OURS:
        w = torch.randn(17, 70)
        w[3] = 0
        unpacked = unpack(pack(w, packing), packing, 32, 96 if packing.floating else 128)
        assert not unpacked[17:].any()
        assert not unpacked[:, 70:].any()
        assert not unpacked[3].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.ones(20, 200)
    w[18, 150] = bad
    panels = torch.zeros(INT4.shape(20, 200), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="here holds infinities or NaNs"):
        pack_into(panels, w, INT4, "here")
    with pytest.raises(InputError, match="infinities or NaNs"):
        pack(w, INT4)


@given(n=st.sampled_from(SIZES), k=st.sampled_from(SIZES), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_every_bfloat16_keeps_its_bits(n: int, k: int, seed: int) -> None:
    """Zeros with their signs, subnormal numbers and the greatest ones among them."""
    bits = torch.randint(-(2**15), 2**15, (n, k), generator=torch.Generator().manual_seed(seed)).short()
    bits = torch.where(bits & 0x7F80 == 0x7F80, bits & 0x807F, bits)  # subnormal instead of infinite or NaN
    w = bits.view(torch.bfloat16)
    for level in _native.levels():
        panels = torch.full(BF16.shape(n, k), 0x55, dtype=torch.uint8)
        assert _native.kernels(level).pack(w.float().data_ptr(), n, k, BF16.code, panels.data_ptr())
        assert torch.equal(panels, pack(w, BF16))
        assert torch.equal(unpack(panels, BF16, n, k).view(torch.int32), bits.int() << 16)


def test_float32_becomes_bfloat16_to_the_nearest_and_ties_to_even() -> None:
    """Halfway between 1 and the next, to even below; between that and the next but one, to even above."""
    step = 2.0**-7
    w = torch.tensor([[1 + step / 2, 1 + 1.5 * step, 1 + step / 2 + 2.0**-20, -1 - step / 2, 1 + 0.49 * step]])
    expected = torch.tensor([[1, 1 + 2 * step, 1 + step, -1, 1]])
    panels = torch.zeros(BF16.shape(1, 5), dtype=torch.uint8)
    pack_into(panels, w, BF16)
    assert torch.equal(unpack(panels, BF16, 1, 5), expected)
    assert torch.equal(unpack(pack(w, BF16), BF16, 1, 5), expected)


def test_where_bfloat16_lies() -> None:
    """Tiles of 32 columns; a line of a tile holds two columns of 16 rows, side by side."""
    w = torch.randn(40, 70).bfloat16()
    tiles = pack(w, BF16).view(torch.bfloat16).view(3, 3, 16, 16, 2)  # panel, tile, line, row, column of the pair
    for row, col in ((0, 0), (1, 0), (0, 1), (15, 31), (16, 32), (39, 69), (20, 45)):
        assert tiles[row // 16, col // 32, col % 32 // 2, row % 16, col % 2] == w[row, col]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3.4e38, -3.4e38])
@pytest.mark.parametrize("at", [(0, 0), (18, 150), (7, 1), (19, 199)])
def test_bfloat16_refuses_what_is_or_becomes_infinite(bad: float, at: tuple[int, int]) -> None:
    w = torch.ones(20, 200)
    w[at] = bad
    panels = torch.zeros(BF16.shape(20, 200), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="here holds infinities or NaNs, which bf16 has no values for"):
        pack_into(panels, w, BF16, "here")
    with pytest.raises(InputError, match="infinities or NaNs"):
        pack(w, BF16)


def test_pack_into_by_slices_is_one_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    import nemotron_h.ops.pack as op

    w = torch.randn(100, 96).bfloat16()
    monkeypatch.setattr(op, "SLICE", 3000)
    for packing in OURS:
        panels = torch.zeros(packing.shape(100, 96), dtype=torch.uint8)
        pack_into(panels, w, packing)
        assert torch.equal(panels, own.pack(w.float(), packing))


def test_packing_never_writes_beside_its_panels() -> None:
    w, panels = torch.ones(40, 70), torch.zeros(INT4.shape(40, 70), dtype=torch.uint8)
    for wrong in (panels[:2], panels[:, 1:].contiguous(), panels.view(torch.int8), panels[0], panels[:0]):
        with pytest.raises(InputError, match=r"here: int4 of \[40, 70\] needs panels \[3, \d+\] of uint8"):
            pack_into(wrong, w, INT4, "here")
    for empty in (w[0], w[:0], w[:, :0], w.long()):
        with pytest.raises(InputError, match=r"here: only float matrices \[N, K\] are packed"):
            pack_into(panels, empty, INT4, "here")


def test_misuse() -> None:
    with pytest.raises(InputError, match="groups of 32, 64 or 128"):
        grouped_packing(4, 48, torch.float16, False)
    with pytest.raises(InputError, match="only float matrices"):
        pack(torch.ones(3), INT4)
    with pytest.raises(InputError, match="other tools"):
        pack(torch.ones(3, 3), GROUPED[0])
    with pytest.raises(InputError, match=r"must be uint8 \[1, \d+\], got \[1, 3\]"):
        unpack(torch.zeros(1, 3, dtype=torch.uint8), INT4, 4, 4)
    symmetric, low = grouped_packing(4, 32, torch.float16, False), grouped_packing(4, 32, torch.float16, True)
    q, scales = torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 1)
    with pytest.raises(InputError, match="needs minimums"):
        grouped.pack(q, scales, low)
    with pytest.raises(InputError, match="has no minimums"):
        grouped.pack(q, scales, symmetric, scales)
    with pytest.raises(InputError, match=r"scales must be \[2, 1\], got \[2, 2\]"):
        grouped.pack(q, torch.ones(2, 2), symmetric)
    with pytest.raises(InputError, match=r"integers must lie in -8\.\.7"):
        grouped.pack(q + 8, scales, symmetric)
    with pytest.raises(InputError, match=r"not exact in torch\.float16"):
        grouped.pack(q, scales * 1.0001, symmetric)


def test_schemes() -> None:
    assert scheme("int4").to_dict() == {"quant_method": "nemotron_h", "format": "int4", "activations": "int8"}
    assert scheme("bf16").to_dict() == {"quant_method": "nemotron_h", "format": "bf16", "activations": "float32"}
    for name in ("bf16", "int8"):
        assert scheme(scheme(name).to_dict()) == scheme(name)
    for bad, message in (
        ("int5", "'int5' is not known: use bf16, int8, int4"),
        ({"quant_method": "nemotron_h", "format": "bf16", "activations": "int8"}, "take activations as they are"),
        ({"quant_method": "nemotron_h", "format": "int4", "activations": "int4"}, "activations='int4'"),
        ({"quant_method": "nemotron_h", "format": "int4", "group": 32}, "must have the fields"),
        ({"quant_method": "awq"}, "must have the fields"),
        ({"quant_method": "nemotron_h", "format": ["int4"]}, r"\['int4'\] is not known"),
        (True, "one of bf16, int8, int4 or a mapping, got True"),
    ):
        with pytest.raises(ConfigError, match=message):
            scheme(bad)
