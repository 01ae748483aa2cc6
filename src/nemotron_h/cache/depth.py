"""The cache of one MTP depth while its head drafts."""

from __future__ import annotations

from nemotron_h.cache.layers import CacheLayer, MambaLayer, layers_of
from nemotron_h.configuration import NemotronHConfig


class DepthCache:
    """What the blocks of one MTP depth keep; a stand-in for the trunk's cache of which they see only `layers`."""

    def __init__(self, config: NemotronHConfig, head: int) -> None:
        types = config.mtp_layers_block_type
        first = config.num_hidden_layers + head * len(types)
        self.layers: dict[int, CacheLayer] = dict(enumerate(layers_of(types, config), start=first))
        for layer in self.layers.values():
            if isinstance(layer, MambaLayer):
                layer.activate_past_recording()
        self.length = 0

    def commit(self, tokens: int, kept: int) -> None:
        """A pass of `tokens` ended, of which the first `kept` are certain."""
        for layer in self.layers.values():
            layer.commit(tokens)
            layer.take_back(tokens - kept, self.length + tokens)
        self.length += kept
