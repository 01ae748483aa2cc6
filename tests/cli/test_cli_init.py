"""`init`: the right distributions, one tensor at a time, all or nothing; and the rule it shares with the model."""

import errno
import json
import math
import shutil
import weakref

import pytest
import torch
from transformers import AutoConfig

from helpers import tiny_config
from nemotron_h import NemotronHForCausalLM, family, initialization
from nemotron_h.checkpoint.directory import open_directory
from nemotron_h.checkpoint.safetensors import read_tensor
from nemotron_h.initialization import initialize
from nemotron_h.linears import packed_parameters
from nemotron_h.quantization import unpack

SMALL = {
    "vocab_size": 300, "hidden_size": 64, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16,
    "mamba_n_groups": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48,
    "moe_latent_size": 24, "intermediate_size": 64,
}  # fmt: skip
SETS = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
PRESET = "nemotron-3-super-120b-a12b"  # all of M, E and *, latent experts, an MTP head


@pytest.fixture
def init(run):
    """Write a small checkpoint; returns the outcome."""
    return lambda directory, *more: run("init", PRESET, directory, "--layers", "ME*-", *SETS, *more)


def _tensors(directory):
    return {name: read_tensor(info) for name, info in open_directory(directory).tensors.items()}


def test_the_checkpoint_loads_and_has_every_tensor(init, tmp_path):
    outcome = init(tmp_path / "new", "--json")
    assert outcome.status == 0
    assert outcome.json["parameters"] == outcome.json["bytes"] / 2 - 2 * 8  # two routers, whose 8 biases are float32
    model = NemotronHForCausalLM.from_pretrained(tmp_path / "new")
    assert model.dtype == torch.bfloat16
    assert model.config.hybrid_override_pattern == "ME*-"
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == outcome.json["parameters"]
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert model.generation_config.eos_token_id == 2


def test_packed_bfloat16_has_the_plain_ones_values(init, tmp_path):
    assert init(tmp_path / "plain").status == 0
    assert init(tmp_path / "packed", "--quantization", "bf16").status == 0
    plain, packed = (NemotronHForCausalLM.from_pretrained(tmp_path / name) for name in ("plain", "packed"))
    wanted, seen = plain.state_dict(), 0
    for name, packing, shape in packed_parameters(packed):
        assert packing.name == "bf16"
        values = unpack(packed.state_dict()[name], packing, *shape[-2:])
        assert torch.equal(values, wanted[name].float())
        seen += 1
    assert seen > 8
    with torch.no_grad():
        assert torch.equal(plain(torch.tensor([[1, 2, 3]])).logits, packed(torch.tensor([[1, 2, 3]])).logits)


def test_the_config_has_both_spellings_and_transformers_reads_it(init, tmp_path):
    init(tmp_path / "new", "--dtype", "float32")
    saved = json.loads((tmp_path / "new" / "config.json").read_text())
    assert saved["architectures"] == ["NemotronHForCausalLM"]
    assert saved["dtype"] == "float32"
    assert saved["n_groups"] == saved["mamba_n_groups"] == 2
    assert saved["hybrid_override_pattern"] == "ME*-"
    assert AutoConfig.from_pretrained(tmp_path / "new").num_hidden_layers == 4


def test_distributions(init, tmp_path):
    init(tmp_path / "new", "--dtype", "float32")
    tensors = _tensors(tmp_path / "new")
    mixer = {name.split("mixer.")[1]: tensor for name, tensor in tensors.items() if ".layers.0.mixer." in name}
    assert torch.equal(mixer["A_log"], torch.arange(1, 9).float().log())
    assert torch.equal(mixer["D"], torch.ones(8))
    steps = torch.nn.functional.softplus(mixer["dt_bias"])
    assert ((steps > 0.00099) & (steps < 0.101)).all()
    assert steps.unique().numel() == 8
    assert mixer["conv1d.weight"].abs().max() <= 0.5 < 2.1 * mixer["conv1d.weight"].abs().max()
    bound = 1 / math.sqrt(128) / math.sqrt(4)
    assert 0.95 * bound < mixer["out_proj.weight"].abs().max() <= bound
    for name, tensor in tensors.items():
        if name.endswith("bias") and "dt_bias" not in name:
            assert not tensor.any(), name
        elif "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif tensor.dim() == 2 and "out_proj" not in name:
            assert tensor.std() == pytest.approx(0.02, rel=0.1), name
            assert tensor.mean().abs() < 0.003, name


def test_router_biases_stay_float32(init, tmp_path):
    init(tmp_path / "new")
    infos = open_directory(tmp_path / "new").tensors
    assert {info.dtype for name, info in infos.items() if name.endswith("correction_bias")} == {"F32"}
    assert {info.dtype for name, info in infos.items() if not name.endswith("correction_bias")} == {"BF16"}


@pytest.mark.parametrize(
    "changes",
    [
        ["num_nextn_predict_layers=0"],
        ["num_nextn_predict_layers=2"],
        ["num_nextn_predict_layers=2", 'mtp_block_configs=[{"block_type": "moe", "n_routed_experts": 12}]'],
        ['block_configs=[{"block_type": "moe", "n_routed_experts": 10}, {"block_type": "mamba"}]'],
    ],
)
def test_info_knows_the_bytes_beforehand(run, tmp_path, changes):
    options = [*SETS, *(word for change in changes for word in ("--set", change))]
    options += [] if "block_configs" in changes[0] else ["--layers", "ME*-E"]
    assert run("init", PRESET, tmp_path / "new", *options).status == 0
    alone = run("info", tmp_path / "new" / "config.json", "--json").json
    whole = run("info", tmp_path / "new", "--json").json
    assert alone["bytes_by_part"] == whole["bytes_by_part"]
    assert alone["parameters"] == whole["files"]["parameters"]


def test_a_seed_decides_every_tensor_by_its_name_alone(run, init, tmp_path):
    for name, more in {"a": [], "b": [], "c": ["--seed", "1"]}.items():
        assert init(tmp_path / name, *more).status == 0
    assert run("init", PRESET, tmp_path / "d", "--layers", "M", *SETS).status == 0
    a, b, c, d = (_tensors(tmp_path / name) for name in "abcd")
    drawn = [name for name, tensor in a.items() if tensor.unique().numel() > 2 and "A_log" not in name]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in drawn)
    shared = [name for name in drawn if name in d and "out_proj" not in name]  # out_proj depends on the layers' number
    assert len(shared) > 3
    assert all(torch.equal(a[name], d[name]) for name in shared)
    assert not torch.equal(a["backbone.layers.2.mixer.k_proj.weight"], a["backbone.layers.2.mixer.v_proj.weight"])


def test_one_tensor_is_in_memory_at_a_time(init, tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), []

    def counted(name, tensor, config, generator):
        alive.add(tensor)
        most.append(len(alive))
        initialize(name, tensor, config, generator)

    monkeypatch.setattr(initialization, "initialize", counted)
    assert init(tmp_path / "new").status == 0
    assert len(most) > 50
    assert max(most) <= 2  # the one before may wait for the collector


def test_the_shape_of_a_checkpoint(run, tmp_path, talker):
    assert run("init", talker, tmp_path / "new").status == 0
    assert (
        run("info", tmp_path / "new", "--json").json["parameters"] == run("info", talker, "--json").json["parameters"]
    )


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "no space"), 1)])
def test_a_failed_run_leaves_nothing(init, tmp_path, monkeypatch, error, status, existed):
    count = 0

    def failing(*arguments):
        nonlocal count
        count += 1
        if count == 20:
            raise error

    monkeypatch.setattr(initialization, "initialize", failing)
    directory = tmp_path / "new"
    if existed:
        directory.mkdir()
    assert init(directory).status == status
    assert list(tmp_path.rglob("*")) == [directory] * existed


def test_places_that_are_refused(init, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    outcome = init(tmp_path)
    assert outcome.status == 2
    assert "not empty" in outcome.error
    assert "is a file" in init(tmp_path / "file").error
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    outcome = init(tmp_path / "new")
    assert outcome.status == 2
    assert "100 KB are free" in outcome.error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nemotron-9", "DIR"], "no preset"),
        ([PRESET, "DIR", "--layers", "MX"], "'X'"),
        ([PRESET, "DIR", "--dtype", "int8"], "--dtype int8"),
        ([PRESET, "DIR", "--seed", "-1"], "--seed -1"),
        ([PRESET, "DIR", "--set", "top_k=5"], "top_k"),
        ([PRESET, "DIR", "--set", "n_group=3"], "n_group=3"),
    ],
)
def test_wrong_shapes(run, tmp_path, arguments, words):
    outcome = run("init", *(tmp_path / "new" if word == "DIR" else word for word in arguments))
    assert outcome.status == 2
    assert words in outcome.error
    assert not (tmp_path / "new").exists()


# The rule that init and the model share.


def test_a_new_model_follows_the_same_rule():
    torch.manual_seed(0)
    model = NemotronHForCausalLM(tiny_config(num_nextn_predict_layers=1, use_bias=True, initializer_range=0.5))
    constant = ("A_log", ".D", "norm.weight", "norm_f.weight", "layernorm.weight", "bias")
    for name, tensor in model.state_dict().items():
        if not name.endswith(constant) or name.endswith("dt_bias"):
            continue
        expected = torch.full_like(tensor, 7.0)
        initialize(name, expected, model.config)
        assert torch.equal(tensor, expected), name
    mixer = model.model.layers[0].mixer
    bound = 1 / math.sqrt(mixer.intermediate_size) / math.sqrt(model.config.num_hidden_layers)
    assert 0.8 * bound < mixer.out_proj.weight.abs().max() <= bound
    assert mixer.conv1d.weight.abs().max() <= 0.5
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert model.model.layers[1].mixer.experts.up_proj.std().item() == pytest.approx(0.5, rel=0.1)


def test_without_rescaling_out_proj_is_a_matrix_like_others():
    weight = torch.empty(64, 64)
    initialize("x.out_proj.weight", weight, tiny_config(rescale_prenorm_residual=False))
    assert weight.std() == pytest.approx(0.02, rel=0.1)


def test_loaded_tensors_are_never_touched():
    for name, shape in family.tensors(tiny_config()):
        tensor = torch.full(shape, 3.0)
        tensor._is_hf_initialized = True
        initialize(name, tensor, tiny_config())
        assert bool((tensor == 3).all()), name


def test_the_floor_of_drawn_time_steps():
    config = tiny_config(time_step_min=1e-5, time_step_max=2e-5, time_step_floor=1e-3)
    bias = torch.empty(6)
    initialize("dt_bias", bias, config)
    torch.testing.assert_close(torch.nn.functional.softplus(bias), torch.full((6,), 1e-3))
