"""What a model remembers between passes: `NemotronHHybridDynamicCache` and the layers it is made of."""

from nemotron_h.cache.hybrid import NemotronHHybridDynamicCache
from nemotron_h.cache.layers import BLOCK, JOURNAL, LAYERS, AttentionLayer, CacheLayer, MambaLayer, Step

__all__ = [
    "BLOCK",
    "JOURNAL",
    "LAYERS",
    "AttentionLayer",
    "CacheLayer",
    "MambaLayer",
    "NemotronHHybridDynamicCache",
    "Step",
]
