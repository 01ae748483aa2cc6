"""What a model remembers between passes: `NemotronHHybridDynamicCache` and the layers it is made of."""

from nemotron_h.cache.batch import BatchCache, RowsLayer
from nemotron_h.cache.depth import DepthCache
from nemotron_h.cache.hybrid import NemotronHHybridDynamicCache
from nemotron_h.cache.journal import JOURNAL, Step
from nemotron_h.cache.layers import BLOCK, LAYERS, AttentionLayer, CacheLayer, MambaLayer
from nemotron_h.cache.static import NemotronHHybridStaticCache

__all__ = [
    "BLOCK",
    "JOURNAL",
    "LAYERS",
    "AttentionLayer",
    "BatchCache",
    "CacheLayer",
    "DepthCache",
    "MambaLayer",
    "NemotronHHybridDynamicCache",
    "NemotronHHybridStaticCache",
    "RowsLayer",
    "Step",
]
