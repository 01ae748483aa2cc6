"""`NemotronHHybridDynamicCache`: keys and values, convolution windows, SSM states, and which slots are padding.

A slot is a column of the batch: every forward pass appends its T tokens as T slots to all rows. A row's padding takes
slots too, is never seen by attention and never enters a convolution window or a state, so left, right and mixed padding
are exact and `get_seq_length()` is what transformers expects, the width of the attention mask.

A pass first hands its results to the layers (`update`) and commits them all at its end (`commit`): one that is
interrupted leaves the cache as it was.

Letters: B batch · S slots · K key/value heads · d head size · C conv channels · W = taps - 1 · H, P, N as in ops/ssd.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import Cache, DynamicCache

from nemotron_h.cache.int8 import Int8AttentionLayer
from nemotron_h.cache.layers import AttentionLayer, CacheLayer, MambaLayer, layers_of
from nemotron_h.configuration import NemotronHConfig
from nemotron_h.errors import CacheError, InputError

_SIZES = (
    "layers_block_type", "num_key_value_heads", "head_dim", "mamba_num_heads", "mamba_head_dim", "mamba_n_groups",
    "ssm_state_size", "mamba_d_conv",
)  # fmt: skip
KV_DTYPES = (None, "int8")


def _sizes(config: NemotronHConfig) -> dict[str, Any]:
    """What decides the shapes in a cache: two models with the same can exchange theirs."""
    return {name: getattr(config, name) for name in _SIZES}


def _difference(cache: dict[str, Any], model: dict[str, Any]) -> str:
    return ", ".join(f"{name}={cache.get(name)}, not {model[name]}" for name in model if cache.get(name) != model[name])


class NemotronHHybridDynamicCache(Cache):
    """The cache of a Nemotron-H model; grows with every pass, holds any batch of rows with any padding.

    Args:
        config: Decides the layers and the dtype of SSM states.
        batch_size, dtype, device: Accepted as in earlier versions of transformers; the first pass decides them.
        kv_dtype: None keeps keys and values in the model's dtype. "int8" rounds them as they enter, with one float32
            factor per position and key head: half the memory of bfloat16, and half of what a decoding step reads of
            them. Every query then sees the rounded ones, however the text was cut into passes. Inference only.

    Attributes:
        slots_valid_BS: False at padding slots; None while no row ever had padding.

    Raises:
        InputError: another `kv_dtype`.
    """

    def __init__(
        self,
        config: NemotronHConfig,
        batch_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        kv_dtype: str | None = None,
    ) -> None:
        if kv_dtype not in KV_DTYPES:
            raise InputError(f"kv_dtype={kv_dtype!r}: use 'int8', or None for the model's dtype")
        layers = layers_of(config.layers_block_type, config)
        if kv_dtype == "int8":
            layers = [Int8AttentionLayer() if type(layer) is AttentionLayer else layer for layer in layers]
        super().__init__(layers=layers)  # type: ignore[arg-type]
        self.kv_dtype = kv_dtype
        self.length = 0
        self.slots_valid_BS: Tensor | None = None
        self._batch: int | None = None
        self._sizes = _sizes(config)

    @classmethod
    def adopt(cls, cache: Any, config: NemotronHConfig) -> NemotronHHybridDynamicCache:
        """Ours as it is; an empty `DynamicCache` turned into ours in place, so that the caller's reference stays good.

        Raises:
            CacheError: any other cache.
        """
        if isinstance(cache, cls):
            if cache._sizes != _sizes(config):
                raise CacheError(f"the cache is of another model: {_difference(cache._sizes, _sizes(config))}")
            return cache
        filled = any(
            isinstance(leaf, Tensor) for layer in getattr(cache, "layers", []) for leaf in tree_leaves(vars(layer))
        )
        if type(cache) is not DynamicCache or filled or cache.offloading:
            raise CacheError(
                f"past_key_values must be a NemotronHHybridDynamicCache(config) or an empty DynamicCache; got"
                f" {'a filled ' if filled else ''}{type(cache).__name__}: it cannot hold this model's state"
            )
        cache.__class__ = cls  # type: ignore[assignment]  # both are plain Python subclasses of Cache
        cache.__dict__.clear()
        cache.__init__(config)  # type: ignore[misc]
        return cache  # type: ignore[return-value]

    @property
    def past(self) -> int | Tensor:
        """Slots before the next pass, as `Layout.past` takes them."""
        return self.length

    @property
    def capacity(self) -> int | None:
        """Slots for which there is room; None: it grows."""
        return None

    def begin(self, batch: int, tokens: int) -> None:
        """A pass of that size comes. Raises CacheError where it does not fit."""
        if self._batch not in (None, batch):
            raise CacheError(f"the cache holds {self._batch} rows, the input has {batch}")
        if self.kv_dtype is not None and torch.is_grad_enabled():
            raise CacheError(
                f"a cache with kv_dtype={self.kv_dtype!r} rounds what gradients would need: run under torch.no_grad(),"
                " or leave kv_dtype out"
            )

    def slots_valid(self, valid_BT: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor | None:
        """Validity of all slots once this pass's are appended, or None when all are real."""
        if valid_BT is None and self.slots_valid_BS is None:
            return None
        past_BS = self.slots_valid_BS
        if past_BS is None:
            past_BS = torch.ones(batch, self.length, dtype=torch.bool, device=device)
        if valid_BT is None:
            valid_BT = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        return torch.cat([past_BS, valid_BT], dim=1)

    def commit(self, batch: int, tokens: int, slots_valid_BS: Tensor | None) -> None:
        """End of a pass: its slots and states count from here on."""
        if tokens:  # without any no block ran, and what an interrupted pass handed over must not count
            for layer in self.layers:
                layer.commit(tokens)  # type: ignore[union-attr]
        self.length += tokens
        self.slots_valid_BS = slots_valid_BS
        self._batch = batch

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """For passes that count as one: when one fails, the cache is as it was before the first."""
        length, batch = self.length, self._batch
        slots_valid_BS = None if self.slots_valid_BS is None else self.slots_valid_BS.clone()
        put_back = [layer.remember() for layer in self.layers]  # type: ignore[union-attr]
        try:
            yield
        except BaseException:
            for layer_back in put_back:
                layer_back()
            self.length, self.slots_valid_BS, self._batch = length, slots_valid_BS, batch
            raise

    def expect(self, tokens: int) -> None:
        """So many tokens come in passes: keys and values then get their memory at once instead of moving each time."""
        for layer in self.layers:
            if isinstance(layer, AttentionLayer):
                layer.expected = self.length + tokens

    def round_states(self, rounds: bool) -> None:
        """Whether states are rounded to their dtype behind a pass; between the pieces of one they are not."""
        for layer in self.layers:
            if isinstance(layer, MambaLayer) and not layer.in_place:
                layer.rounds = rounds

    # What transformers asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots in the cache, padding included; also for stacks without attention."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.length > 0

    @property
    def row_lengths(self) -> list[int]:
        """Real tokens of each row."""
        if self.slots_valid_BS is None:
            return [self.length] * (self._batch or 0)
        return self.slots_valid_BS[:, : self.length].sum(-1).tolist()

    @property
    def batch_size(self) -> int:
        return -1 if self._batch is None else self._batch

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.length > 0

    def reset(self) -> None:
        super().reset()
        self.length, self.slots_valid_BS, self._batch = 0, None, None

    def _map_batch(self, change: Any) -> None:
        for layer in self.layers:
            layer.map_batch(change)  # type: ignore[union-attr]
        if self.slots_valid_BS is not None:
            self.slots_valid_BS = change(self.slots_valid_BS)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows `beam_idx` [B], as beam search wants."""
        self._map_batch(lambda t: t.index_select(0, beam_idx.to(t.device)))
        self._batch = None if self._batch is None else len(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`: ids or a boolean mask."""
        indices = torch.as_tensor(indices)
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times in a row."""
        self._map_batch(lambda t: t.repeat_interleave(repeats, dim=0))
        self._batch = None if self._batch is None else self._batch * repeats

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` slots (transformers' sign: zero or negative).

        Attention can return to any slot. Mamba states can return to zero, and, after `activate_past_recording()`, to
        any slot since the last crop, 64 slots at least; `crop(0)` ends that history.

        Raises:
            CacheError: a positive number, or a position that cannot be restored; the cache is then unchanged.
        """
        slots = -tokens_to_remove
        if slots < 0:
            raise CacheError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        slots = min(slots, self.length)
        for index, layer in enumerate(self.layers):
            if not layer.can_take_back(slots, self.length):  # type: ignore[union-attr]
                raise CacheError(
                    f"crop({tokens_to_remove}): the state of layer {index} cannot return to slot"
                    f" {self.length - slots}; call activate_past_recording() before the tokens to be taken back,"
                    " or compute the prefix again"
                )
        for layer in self.layers:
            layer.take_back(slots, self.length)  # type: ignore[union-attr]
        self.length -= slots
        if self.slots_valid_BS is not None:
            self._forget_slots(self.slots_valid_BS)

    def _forget_slots(self, slots_valid_BS: Tensor) -> None:
        self.slots_valid_BS = slots_valid_BS[:, : self.length]

    # Lists by layer, as earlier versions of transformers had them.

    def _list(self, kind: type[CacheLayer], name: str) -> list[Tensor]:
        empty = torch.empty(0)
        return [layer.tensors().get(name, empty) if isinstance(layer, kind) else empty for layer in self.layers]

    @property
    def conv_states(self) -> list[Tensor]:
        return self._list(MambaLayer, "conv_states")

    @property
    def ssm_states(self) -> list[Tensor]:
        return self._list(MambaLayer, "recurrent_states")

    @property
    def key_cache(self) -> list[Tensor]:
        return self._list(AttentionLayer, "keys")

    @property
    def value_cache(self) -> list[Tensor]:
        return self._list(AttentionLayer, "values")

    # Files.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to one safetensors file, atomically. The journal of a recording cache is not kept."""
        tensors = {
            f"{index}.{name}": tensor.detach().contiguous()
            for index, layer in enumerate(self.layers)
            for name, tensor in layer.tensors().items()  # type: ignore[union-attr]
        }
        if self.slots_valid_BS is not None:
            tensors["slots_valid"] = self.slots_valid_BS[:, : self.length].contiguous()
        metadata = {"format": "nemotron_h.cache", "length": str(self.length), "batch": str(self.batch_size)}
        metadata["sizes"] = json.dumps(self._sizes)
        if self.kv_dtype is not None:
            metadata["kv_dtype"] = self.kv_dtype
        temporary = Path(f"{os.fspath(path)}.tmp-{os.getpid()}")
        try:
            save_file(tensors, temporary, metadata=metadata)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config: NemotronHConfig, device: str | torch.device = "cpu"
    ) -> NemotronHHybridDynamicCache:
        """Read what `save` wrote, for a model of the same `config`.

        Raises:
            CacheError: not such a file, or of another model.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, ValueError, RuntimeError) as error:
            raise CacheError(f"{path}: not a readable cache file ({error})") from error
        except Exception as error:  # safetensors' own exception derives from Exception only
            raise CacheError(f"{path}: not a safetensors file ({error})") from error
        if metadata.get("format") != "nemotron_h.cache":
            raise CacheError(f"{path}: not a cache file of this package")
        try:
            sizes, length, batch = (json.loads(metadata[name]) for name in ("sizes", "length", "batch"))
        except (KeyError, ValueError) as error:
            raise CacheError(f"{path}: its metadata is damaged ({error!r})") from error
        kv_dtype = metadata.get("kv_dtype")
        if kv_dtype not in KV_DTYPES:
            raise CacheError(f"{path}: its metadata is damaged (kv_dtype={kv_dtype!r})")
        cache = cls(config, kv_dtype=kv_dtype)
        if not isinstance(sizes, dict) or sizes != cache._sizes:
            what = _difference(sizes, cache._sizes) if isinstance(sizes, dict) else "it has no sizes"
            raise CacheError(f"{path}: of another model: {what}")
        cache._fill(tensors, length, batch, os.fspath(path))
        return cache

    def _fill(self, tensors: dict[str, Tensor], length: int, batch: int, path: str) -> None:
        rows = {name: tensor.shape[0] for name, tensor in tensors.items() if tensor.shape[:1] != (batch,)}
        if rows:
            raise CacheError(f"{path}: damaged; {batch} rows were saved, but there are {rows}")
        self.slots_valid_BS = tensors.pop("slots_valid", None)
        for index, layer in enumerate(self.layers):
            for name in layer.names:  # type: ignore[union-attr]
                if (tensor := tensors.pop(f"{index}.{name}", None)) is not None:
                    setattr(layer, name, tensor)
            if isinstance(layer, AttentionLayer) and (length or layer.keys is not None):
                self._fill_slots(layer, index, length, path)
        if tensors:
            raise CacheError(f"{path}: of another model; {', '.join(sorted(tensors)[:5])} have no place in this one")
        self.length, self._batch = length, None if batch < 0 else batch

    def _fill_slots(self, layer: AttentionLayer, index: int, length: int, path: str) -> None:
        kept = [getattr(layer, name) for name in layer.names]
        if any(tensor is None for tensor in kept):
            raise CacheError(f"{path}: damaged; layer {index} lacks some of {', '.join(layer.names)}")
        if slots := [tensor.shape[2] for tensor in kept if tensor.shape[2] != length]:
            raise CacheError(f"{path}: damaged; {length} slots were saved, layer {index} has {slots[0]}")
        layer.length = length
