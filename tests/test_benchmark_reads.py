"""What a decode step reads, counted here once more, tensor by tensor."""

import math

import pytest

from helpers import BIASED, tiny_config
from nemotron_h import family
from nemotron_h.benchmark import SHAPES, shape_config


def counted(config, matrix_bits, other_bytes):
    """Bytes of the weights, from the names and shapes of a checkpoint."""
    bits = config.hidden_size * matrix_bits  # a row of the embedding
    tied = config.tie_word_embeddings
    for name, shape in family.tensors(config):
        if name.startswith("mtp."):
            continue
        if ".experts." in name and int(name.split(".experts.")[1].split(".")[0]) >= config.num_experts_per_tok:
            continue
        if name == "backbone.embeddings.weight" and not tied:
            continue
        matrix = len(shape) == 2 and ".gate." not in name
        bits += math.prod(shape) * (matrix_bits if matrix else 8 * other_bytes)
    return math.ceil(bits / 8)


@pytest.mark.parametrize("changes", [
    {}, BIASED, {"tie_word_embeddings": True}, {"moe_latent_size": None}, {"num_nextn_predict_layers": 1},
    {"hybrid_override_pattern": "MMEE*"}, {"hybrid_override_pattern": "--*", "intermediate_size": 40},
])  # fmt: skip
@pytest.mark.parametrize(("bits", "other"), [(4.25, 2), (4.5, 4), (16, 2)])
def test_weights(changes, bits, other):
    config = tiny_config(**changes)
    assert family.decode_reads(config, bits, other, 0).weights == counted(config, bits, other)


def test_a_head_of_its_own_format():
    config = tiny_config(tie_word_embeddings=True)
    one, other = (family.decode_reads(config, 4.25, 2, 0, head_bits=bits).weights for bits in (4.25, 16))
    assert one == family.decode_reads(config, 4.25, 2, 0).weights
    assert other - one == pytest.approx(config.vocab_size * config.hidden_size * (16 - 4.25) / 8, abs=1)


def test_all_weights_in_one_format_are_the_active_parameters():
    config = tiny_config(num_nextn_predict_layers=1)
    biases = config.n_routed_experts
    assert family.decode_reads(config, 16, 2, 0).weights == 2 * (family.count(config).active + config.hidden_size)
    assert biases > 0


def test_layers_of_different_sizes():
    config = tiny_config(hybrid_override_pattern="M-*-", intermediate_size=[40, 56])
    assert family.decode_reads(config, 8, 4, 0).weights == counted(config, 8, 4)


def test_states_and_keys():
    config = tiny_config(hybrid_override_pattern="MM*E*")
    inner, cells = config.mamba_num_heads * config.mamba_head_dim, config.ssm_state_size
    channels = inner + 2 * config.mamba_n_groups * cells
    none, some = (family.decode_reads(config, 4, 4, context) for context in (0, 1000))
    assert none.states == some.states == 2 * (4 * inner * cells + 2 * channels * (config.mamba_d_conv - 1))
    assert none.keys_values == 0
    assert some.keys_values == 1000 * 2 * 2 * 2 * config.num_key_value_heads * config.head_dim
    assert some.total == none.total + some.keys_values == none.weights + none.states + some.keys_values


def test_a_window_is_all_that_is_read():
    config = tiny_config(hybrid_override_pattern="M*", sliding_window=64)
    assert family.decode_reads(config, 4, 4, 64) == family.decode_reads(config, 4, 4, 5000)
    assert family.decode_reads(config, 4, 4, 63).keys_values < family.decode_reads(config, 4, 4, 64).keys_values


def test_shapes():
    for name, (preset, changes) in SHAPES.items():
        spec, whole = family.describe(shape_config(name)), family.describe(family.preset(preset))
        for field in family.FIELDS:
            if field not in changes and field not in ("layers_block_type", "hybrid_override_pattern"):
                assert getattr(spec, field) == getattr(whole, field), (name, field)
    pattern = {name: family.pattern(family.describe(shape_config(name)).layers_block_type) for name in SHAPES}
    assert pattern["nano-slice"] == "MEM*EMEM"
    assert pattern["dense-slice"] == "M-M-M*-M"
    assert shape_config("nemotron-h-4b") == family.preset("nemotron-h-4b")
    assert shape_config("nano") is None
