"""llama.cpp as a peer, by llama-cpp-python: is it there, and a file of random weights in its layout.

Names, shapes and metadata are those of llama.cpp's src/models/nemotron-h.cpp and of its converter. Every matrix,
embedding and output head included, has the chosen type; routers, norms, convolutions and Mamba's A, D and dt bias are
float32, as llama.cpp's own quantizer leaves them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemotron_h import family
from nemotron_h.benchmark.peers.gguf_file import BF16, F32, Q4_0, Q8_0, Encoding, Entry, write
from nemotron_h.benchmark.process import run_python
from nemotron_h.errors import MissingDependencyError, UnsupportedError

NAME, PROGRAM = "llama.cpp", "llama_cpp_worker"
ENCODINGS: dict[str | None, Encoding] = {"int4": Q4_0, "int8": Q8_0, "bf16": BF16, None: BF16}

_STD = 0.02
_CHUNK = 1 << 20  # blocks of random data, drawn once and used again and again
_DENSE, _SPARSE = "nemotron_h", "nemotron_h_moe"


def check_installed(python: str) -> None:
    """Raises MissingDependencyError, with the way to install it, where `python` cannot import llama_cpp."""
    status, text = run_python(python, "import llama_cpp")
    if status != 0:
        reason = text.splitlines()[-1] if text else "it does not start"
        raise MissingDependencyError(
            f"--peers llama.cpp: {python} cannot import llama_cpp ({reason}). Build it with clang: apt-get install"
            " clang-19, then CC=clang-19 CXX=clang++-19 CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary"
            " llama-cpp-python llama-cpp-python; where another Python has it, give --llama-python PATH"
        )


def check_shape(config: Any, quantization: str | None) -> None:
    """Raises UnsupportedError for a shape that llama.cpp does not run, or not in this format."""
    types = set(config.layers_block_type)
    reason = None
    if not types <= {"mamba", "attention", "mlp", "moe"}:
        reason = f"it does not know {', '.join(sorted(types - {'mamba', 'attention', 'mlp', 'moe'}))} layers"
    elif {"mlp", "moe"} <= types:
        reason = "it has no models with both mlp and moe layers"
    elif config.block_configs is not None:
        reason = "block_configs are not written by this benchmark"
    elif "moe" in types and not config.moe_shared_expert_intermediate_size * config.n_shared_experts:
        reason = "its experts need a shared one"
    if reason is not None:
        raise UnsupportedError(f"--peers llama.cpp: {reason}; leave this peer out for this shape")
    for entry in entries(config, ENCODINGS[quantization]):
        entry.nbytes  # noqa: B018 (raises)


def file_bytes(config: Any, quantization: str | None) -> int:
    """Bytes of the weights in the file."""
    return sum(entry.nbytes for entry in entries(config, ENCODINGS[quantization]))


def write_random(path: Path, config: Any, quantization: str | None, context: int) -> int:
    """Write a model with random weights that takes `context` tokens; returns the file's bytes."""
    encoding = ENCODINGS[quantization]
    return write(path, metadata(config, context), list(entries(config, encoding)), _Random(encoding).produce)


def metadata(config: Any, context: int) -> dict[str, Any]:
    """The key-value pairs, without a tokenizer: tokens are given as ids."""
    arch = _SPARSE if "moe" in config.layers_block_type else _DENSE
    layers = [family.layer(config, i) for i in range(len(config.layers_block_type))]
    width = {"mlp": "intermediate_size", "moe": "moe_intermediate_size"}
    keys = config.num_key_value_heads
    found: dict[str, Any] = {
        "block_count": len(layers),
        "context_length": context,
        "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size,
        "feed_forward_length": [getattr(x, width[x.block_type]) if x.block_type in width else 0 for x in layers],
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [keys if x.block_type == "attention" else 0 for x in layers],
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        "attention.layer_norm_rms_epsilon": float(config.layer_norm_epsilon),
        "rope.dimension_count": config.head_dim,
        "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.state_size": config.ssm_state_size,
        "ssm.group_count": config.mamba_n_groups,
        "ssm.inner_size": config.mamba_num_heads * config.mamba_head_dim,
        "ssm.time_step_rank": config.mamba_num_heads,
    }
    if arch == _SPARSE:
        found |= _expert_metadata(config)
    general = {"general.architecture": arch, "general.name": "random", "tokenizer.ggml.model": "no_vocab"}
    return general | {f"{arch}.{key}": value for key, value in found.items()}


def _expert_metadata(config: Any) -> dict[str, Any]:
    found = {
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size * config.n_shared_experts,
        "expert_shared_count": config.n_shared_experts,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_weights_scale": float(config.routed_scaling_factor),
    }
    return found | ({"moe_latent_size": config.moe_latent_size} if config.moe_latent_size else {})


def entries(config: Any, encoding: Encoding) -> Iterator[Entry]:
    """The tensors of the trunk; MTP heads are left out."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield Entry("token_embd.weight", (vocab, hidden), encoding)
    yield Entry("output_norm.weight", (hidden,), F32)
    yield Entry("output.weight", (vocab, hidden), encoding)
    make = {"mamba": _mamba, "attention": _attention, "mlp": _mlp, "moe": _moe}
    for index, block_type in enumerate(config.layers_block_type):
        yield Entry(f"blk.{index}.attn_norm.weight", (hidden,), F32)
        for entry in make[block_type](config, family.layer(config, index), encoding):
            yield Entry(f"blk.{index}.{entry.name}", entry.shape, entry.encoding)


def _mamba(config: Any, sizes: family.Layer, encoding: Encoding) -> Iterator[Entry]:
    heads, groups, hidden = config.mamba_num_heads, config.mamba_n_groups, config.hidden_size
    inner = heads * config.mamba_head_dim
    channels = inner + 2 * groups * config.ssm_state_size
    yield Entry("ssm_in.weight", (inner + channels + heads, hidden), encoding)
    yield Entry("ssm_conv1d.weight", (channels, config.mamba_d_conv), F32)
    yield Entry("ssm_conv1d.bias", (channels,), F32)
    yield Entry("ssm_dt.bias", (heads,), F32)
    yield Entry("ssm_a", (heads, 1), F32)
    yield Entry("ssm_d", (heads, 1), F32)
    yield Entry("ssm_norm.weight", (groups, inner // groups), F32)
    yield Entry("ssm_out.weight", (hidden, inner), encoding)


def _attention(config: Any, sizes: family.Layer, encoding: Encoding) -> Iterator[Entry]:
    hidden, query = config.hidden_size, config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    yield Entry("attn_q.weight", (query, hidden), encoding)
    yield Entry("attn_k.weight", (key, hidden), encoding)
    yield Entry("attn_v.weight", (key, hidden), encoding)
    yield Entry("attn_output.weight", (hidden, query), encoding)


def _mlp(config: Any, sizes: family.Layer, encoding: Encoding) -> Iterator[Entry]:
    yield Entry("ffn_up.weight", (sizes.intermediate_size, config.hidden_size), encoding)
    yield Entry("ffn_down.weight", (config.hidden_size, sizes.intermediate_size), encoding)


def _moe(config: Any, sizes: family.Layer, encoding: Encoding) -> Iterator[Entry]:
    hidden, experts, width = config.hidden_size, sizes.n_routed_experts, sizes.moe_intermediate_size
    latent = sizes.moe_latent_size or hidden
    shared = sizes.moe_shared_expert_intermediate_size * config.n_shared_experts
    yield Entry("ffn_gate_inp.weight", (experts, hidden), F32)
    yield Entry("exp_probs_b.bias", (experts,), F32)
    yield Entry("ffn_up_exps.weight", (experts, width, latent), encoding)
    yield Entry("ffn_down_exps.weight", (experts, latent, width), encoding)
    yield Entry("ffn_up_shexp.weight", (shared, hidden), encoding)
    yield Entry("ffn_down_shexp.weight", (hidden, shared), encoding)
    if sizes.moe_latent_size:
        yield Entry("ffn_latent_down.weight", (latent, hidden), encoding)
        yield Entry("ffn_latent_up.weight", (hidden, latent), encoding)


class _Random:
    """Data of tensors: for a matrix, pieces of one chunk of random blocks, each matrix from another place on."""

    def __init__(self, encoding: Encoding) -> None:
        self._random = np.random.default_rng(0)
        self._chunk, self._at, self._block = _blocks(encoding, self._random), 0, encoding.block_bytes

    def produce(self, entry: Entry) -> Iterator[memoryview]:
        if entry.encoding is F32:
            yield _plain(entry, self._random).data.cast("B")
            return
        left, chunk = entry.nbytes, self._chunk.data.cast("B")
        while left:
            piece = chunk[self._at : self._at + left]
            yield piece
            left -= len(piece)
            self._at = (self._at + len(piece)) % len(chunk)


def _blocks(encoding: Encoding, random: np.random.Generator) -> NDArray[np.uint8]:
    """A chunk of random weights with a standard deviation of about `_STD`."""
    if encoding is BF16:
        wide = (_STD * random.standard_normal(_CHUNK, dtype=np.float32)).view(np.uint32)
        return (wide >> 16).astype("<u2").view(np.uint8)
    blocks = random.integers(0, 256, (_CHUNK, encoding.block_bytes), dtype=np.uint8)
    levels = 16 if encoding is Q4_0 else 256  # uniform, so of deviation levels / sqrt(12)
    blocks[:, :2] = np.array([_STD * 12**0.5 / levels], "<f2").view(np.uint8)
    return blocks


def _plain(entry: Entry, random: np.random.Generator) -> NDArray[np.float32]:
    leaf = entry.name.partition("blk.")[2].partition(".")[2]
    if leaf == "ssm_a":
        drawn = -random.uniform(1, 16, entry.shape)
    elif leaf == "ssm_dt.bias":
        drawn = random.uniform(-6, -2, entry.shape)  # softplus: time steps of 0.002 to 0.13
    elif leaf == "ffn_gate_inp.weight":
        drawn = _STD * random.standard_normal(entry.shape)
    elif leaf == "ssm_conv1d.weight":
        drawn = random.uniform(-0.5, 0.5, entry.shape)
    elif leaf.endswith(".bias"):
        drawn = np.zeros(entry.shape)
    else:  # norms, D
        drawn = np.ones(entry.shape)
    return drawn.astype("<f4")
