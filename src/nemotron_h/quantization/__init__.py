"""Packed weights: what their bytes mean, and the way to them and back, in PyTorch.

`csrc/formats.h` describes the layout; `layout.py` has its sizes, `own.py` the package's bf16, int8 and int4,
`grouped.py` the int8 and int4 of other tools with their scales kept exactly.
"""

from nemotron_h.quantization.layout import BF16, INT4, INT8, OWN, Packing, grouped_packing
from nemotron_h.quantization.scheme import Arithmetic, Scheme, is_packed, scheme
from nemotron_h.quantization.tensors import pack, unpack

__all__ = [
    "BF16",
    "INT4",
    "INT8",
    "OWN",
    "Arithmetic",
    "Packing",
    "Scheme",
    "grouped_packing",
    "is_packed",
    "pack",
    "scheme",
    "unpack",
]
