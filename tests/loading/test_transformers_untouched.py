"""Importing this package changes nothing in transformers; `register()` does, as far as it says; nothing of
transformers' own nemotron_h is needed.

The scripts run in a fresh process, where nothing of this package has been imported before.
"""

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import textwrap
from pathlib import Path
from subprocess import CompletedProcess

import fresh
import nemotron_h
from helpers import tiny_model

SNAPSHOT = """
    import copy, importlib, json, logging, pkgutil, sys
    import torch, transformers
    from transformers import cache_utils, conversion_mapping, masking_utils, modeling_utils, pytorch_utils
    from transformers.models.auto import auto_factory, configuration_auto, modeling_auto
    from transformers.quantizers import auto as quantizers

    def as_list(value):
        return value.items() if hasattr(value, "items") else value

    def snapshot():
        maps = {
            "configs": configuration_auto.CONFIG_MAPPING._extra_content,
            "config names": configuration_auto.CONFIG_MAPPING_NAMES,
            "models": modeling_auto.MODEL_MAPPING._extra_content,
            "causal models": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content,
            "dynamic layers": cache_utils.DYNAMIC_LAYER_TYPE_MAPPING,
            "static layers": cache_utils.STATIC_LAYER_TYPE_MAPPING,
            "conversions": conversion_mapping.get_checkpoint_conversion_mapping("nemotron_h"),
            "own conversions": conversion_mapping.USER_REGISTERED_MAPPINGS,
            "quantizers": quantizers.AUTO_QUANTIZER_MAPPING,
            "quantization configs": quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING,
            "attention": modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping,
            "masks": masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping,
            "mask patterns": masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
            "layer norms": pytorch_utils.ALL_LAYERNORM_LAYERS,
        }
        classes = (
            transformers.PreTrainedModel, transformers.PreTrainedConfig, transformers.GenerationMixin,
            transformers.GenerationConfig, transformers.Cache, transformers.DynamicCache, cache_utils.CacheLayerMixin,
            torch.nn.Module, torch.Tensor,
        )
        state = {name: str(value if value is None or isinstance(value, list) else sorted(map(str, as_list(value))))
                 for name, value in maps.items()}
        ignored = ("_abc_impl", "__doc__")
        state |= {c.__name__: {k: id(v) for k, v in vars(c).items() if k not in ignored} for c in classes}
        state["torch"] = [
            str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed(),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        ]
        state["logging"] = [logging.getLogger(n).level for n in (None, "transformers", "torch")]
        state["handlers"] = [len(logging.getLogger(n).handlers) for n in (None, "transformers", "torch")]
        return state
"""


def printed(result: CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_changes_nothing() -> None:
    script = """
        before = snapshot()
        import nemotron_h
        names = [m.name for m in pkgutil.walk_packages(nemotron_h.__path__, "nemotron_h.") if "__main__" not in m.name]
        for name in names:
            importlib.import_module(name)
        after = snapshot()
        for key in before:
            assert after[key] == before[key], key
        assert {"nemotron_h.modeling", "nemotron_h.registration", "nemotron_h.generation.llm"} <= set(names)
        assert "transformers.models.nemotron_h.modeling_nemotron_h" not in sys.modules

        nemotron_h.register()
        changed = {key for key in before if snapshot()[key] != before[key]}
        print(sorted(changed))
    """
    changed = printed(fresh.python(textwrap.dedent(SNAPSHOT) + textwrap.dedent(script)))
    assert changed.strip() == "['causal models', 'configs', 'models', 'own conversions']", (
        "the snapshot sees what register() does, no more"
    )


def test_register(tmp_path: Path) -> None:
    tiny_model(hybrid_override_pattern="M*").save_pretrained(tmp_path)
    script = """
        import json, pathlib, sys
        import torch, transformers
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
        import nemotron_h
        path = sys.argv[1]

        assert AutoConfig.from_pretrained(path).__class__.__module__.startswith("transformers."), "before"
        theirs = transformers.NemotronHForCausalLM
        for _ in range(2):
            nemotron_h.register()
            for kwargs in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
                config = AutoConfig.from_pretrained(path, **kwargs)
                assert type(config) is nemotron_h.NemotronHConfig
                assert type(AutoModel.from_pretrained(path, **kwargs)) is nemotron_h.NemotronHModel
                model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
                assert type(model) is nemotron_h.NemotronHForCausalLM
            assert type(AutoConfig.for_model("nemotron_h", hybrid_override_pattern="M")) is nemotron_h.NemotronHConfig
            assert type(AutoModel.from_config(config)) is nemotron_h.NemotronHModel
            assert type(AutoModelForCausalLM.from_config(config)) is nemotron_h.NemotronHForCausalLM
            config_file = pathlib.Path(path, "config.json")
            mapped = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
            config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"auto_map": mapped}))
        ids = torch.tensor([[3, 4, 5]])
        ours = nemotron_h.NemotronHForCausalLM.from_pretrained(path)
        torch.testing.assert_close(model(ids).logits, ours(ids).logits)

        from transformers import NemotronHForCausalLM
        assert NemotronHForCausalLM is theirs and theirs.__module__.startswith("transformers.")
        assert type(NemotronHForCausalLM.from_pretrained(path)) is theirs
        assert transformers.NemotronHConfig.__module__.startswith("transformers.")
        small = transformers.NemotronHConfig(hidden_size=8, vocab_size=8, layers_block_type=["mlp"])
        assert type(NemotronHForCausalLM(small)) is theirs
    """
    printed(fresh.python(script, str(tmp_path)))


def test_without_transformers_own_nemotron_h(tmp_path: Path) -> None:
    script = """
        import sys
        own = "transformers.models.nemotron_h"
        for name in ("", ".modeling_nemotron_h", ".configuration_nemotron_h", ".modular_nemotron_h"):
            sys.modules[own + name] = None
        import torch
        from transformers import AutoModelForCausalLM
        import nemotron_h
        from nemotron_h import NemotronHConfig, NemotronHForCausalLM, NemotronHModel
        config = NemotronHConfig(
            hidden_size=16, vocab_size=30, hybrid_override_pattern="ME*-", mamba_num_heads=4, mamba_head_dim=8,
            mamba_n_groups=2, ssm_state_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            intermediate_size=8, n_routed_experts=4, moe_intermediate_size=8, moe_shared_expert_intermediate_size=8,
            moe_latent_size=8, num_nextn_predict_layers=1, mtp_loss_coef=0.3,
        )
        model = NemotronHForCausalLM(config)
        ids = torch.arange(12).view(2, 6)
        model(ids, labels=ids).loss.backward()
        model.save_pretrained(sys.argv[1])
        loaded = NemotronHForCausalLM.from_pretrained(sys.argv[1])
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)
        NemotronHModel.from_pretrained(sys.argv[1])(ids)
        assert loaded.generate(ids, max_new_tokens=3, num_beams=2, eos_token_id=None).shape == (2, 9)
        nemotron_h.register()
        assert type(AutoModelForCausalLM.from_pretrained(sys.argv[1])) is NemotronHForCausalLM
        assert not [name for name, module in sys.modules.items() if f"{name}.".startswith(own + ".") and module]
        try:
            import transformers.models.nemotron_h.modeling_nemotron_h
        except ImportError:
            print("blocked")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert printed(result).strip() == "blocked"


def test_no_class_inherits_from_a_model_of_transformers() -> None:
    names = [m.name for m in pkgutil.walk_packages(nemotron_h.__path__, "nemotron_h.") if "__main__" not in m.name]
    seen = 0
    for module in map(importlib.import_module, names):
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__.startswith("nemotron_h"):
                seen += 1
                assert not [base for base in cls.__mro__ if base.__module__.startswith("transformers.models.")], cls
    assert seen > 40
