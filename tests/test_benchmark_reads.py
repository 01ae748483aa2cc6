"""What a decode step reads, counted here once more, tensor by tensor."""

import math

import pytest

from helpers import BIASED, tiny_config
from nemotron_h import family
from nemotron_h.benchmark import SHAPES, shape_config
from nemotron_h.family import reads


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


@pytest.mark.parametrize("changes", [{}, {"hybrid_override_pattern": "M*-E", "intermediate_size": 40}])
def test_a_step_of_several_tokens(changes):
    """Weights are read once, whatever the rows, but for the experts; states and keys belong to a sequence."""
    config = tiny_config(**changes)
    one = family.decode_reads(config, 8, 4, 100)
    many = family.decode_reads(config, 8, 4, 100, tokens=3, sequences=5)
    assert many.states == 5 * one.states
    assert many.keys_values == 5 * one.keys_values
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    hit = experts * (1 - ((experts - chosen) / experts) ** 15)
    latent = config.moe_latent_size or config.hidden_size
    expert = 2 * config.moe_intermediate_size * latent * config.layers_block_type.count("moe")
    assert many.weights - one.weights == pytest.approx((hit - chosen) * expert + 14 * config.hidden_size, abs=1)


def test_all_experts_are_read_in_the_end():
    sizes = family.layer(tiny_config(hybrid_override_pattern="E"), 0)
    read = [reads.experts_read(sizes, rows) for rows in (1, 2, 10, 10_000)]
    assert read[0] == sizes.num_experts_per_tok
    assert read == sorted(read)
    assert read[1] == pytest.approx(2 * read[0] - read[0] ** 2 / sizes.n_routed_experts)
    assert read[3] == pytest.approx(sizes.n_routed_experts)


@pytest.mark.parametrize("changes", [
    {}, BIASED, {"tie_word_embeddings": True}, {"moe_latent_size": None}, {"num_nextn_predict_layers": 1},
    {"hybrid_override_pattern": "--*", "intermediate_size": [40, 56]},
])  # fmt: skip
def test_operations_of_matrices(changes):
    """Two for every weight that a token meets: counted here from the names and shapes of a checkpoint."""
    config = tiny_config(**changes)
    met = head = 0
    for name, shape in family.tensors(config):
        expert = int(name.split(".experts.")[1].split(".")[0]) if ".experts." in name else 0
        if name.startswith("mtp.") or len(shape) != 2 or expert >= config.num_experts_per_tok:
            continue
        if "embeddings" in name or "lm_head" in name:
            head = math.prod(shape)
        else:
            met += math.prod(shape)
    assert family.operations(config, 7).matrices == 2 * (7 * met + head)
    assert family.operations(config, 7, logits=7).matrices == 2 * 7 * (met + head)
    assert family.operations(config, 7, sequences=3).matrices == 3 * 2 * (7 * met + head)


@pytest.mark.parametrize("window", [None, 1, 5, 8, 100])
@pytest.mark.parametrize(("tokens", "context"), [(1, 0), (1, 9), (6, 0), (6, 3), (12, 20)])
def test_operations_of_attention(window, tokens, context):
    """Query by query: a product with each key that it sees, and one with each value."""
    config = tiny_config(hybrid_override_pattern="*M*", sliding_window=window)
    seen = sum(min(context + t + 1, window or 10**9) for t in range(tokens))
    expected = 2 * 2 * 2 * seen * config.num_attention_heads * config.head_dim
    found = family.operations(config, tokens, 2, context)
    assert found.attention == 2 * expected
    assert found.total == found.matrices + found.attention + found.scan


def test_operations_of_the_scan():
    config = tiny_config(hybrid_override_pattern="MEM")
    inner, cells = config.mamba_num_heads * config.mamba_head_dim, config.ssm_state_size
    channels = inner + 2 * config.mamba_n_groups * cells
    one = 2 * (5 * inner * cells + 2 * config.mamba_d_conv * channels)
    assert family.operations(config, 1).scan == one
    assert family.operations(config, 9, 4, 50).scan == 36 * one


def test_the_work_of_a_known_prompt():
    """512 tokens through nano-slice's matrices are 428 GFLOP."""
    done = family.operations(family.describe(shape_config("nano-slice")), 512)
    assert done.matrices == pytest.approx(428e9, rel=1e-3)
    assert 0 < done.attention + done.scan < 0.02 * done.total


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
