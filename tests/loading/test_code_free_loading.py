"""Loading and using a model runs nothing that its directory holds: an audit hook sees no code, socket or process.

The same goes for a hub id that is not there, offline.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from loading_cases import read_config

from helpers import tiny_model

CODE_KEYS = {
    "auto_map": {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModel": "modeling_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
    },
    "trust_remote_code": True,
    "custom_generate": "custom_generate/generate.py",
    "transformers_weights": "../evil.safetensors",
    "configuration_files": ["config.4.0.0.json", "evil.json"],
    "_attn_implementation_internal": "evil/kernel",
    "_attn_implementation": "evil/kernel",
    "experts_implementation": "evil/kernel",
    "_experts_implementation": "evil/kernel",
    "fusion_config": {"patch_embeddings": True},
    "kernel_config": "evil",
    "use_kernels": True,
    "custom_pipelines": {"text-generation": {"impl": "evil.Evil"}},
}


def test_a_hostile_directory_runs_nothing(tmp_path: Path) -> None:
    hostile, benign, marker = tmp_path / "hostile", tmp_path / "benign", tmp_path / "marker"
    for directory in (hostile, benign):
        tiny_model(hybrid_override_pattern="ME*-").save_pretrained(directory, max_shard_size="20KB")
    code = f"open({str(marker)!r}, 'a').write(__name__)\ndef generate(model, **_): open({str(marker)!r}, 'a')\n"
    (hostile / "custom_generate").mkdir()
    for name in ("modeling_evil", "configuration_evil", "evil", "__init__", "conftest", "custom_generate/generate"):
        (hostile / f"{name}.py").write_text(code)
    (hostile / "custom_generate" / "requirements.txt").write_text("evil-package\n")
    for name in ("config.4.0.0.json", "evil.json"):
        (hostile / name).write_text('{"hidden_size": 1}')
    (hostile / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch evil'\ntR.")
    (tmp_path / "evil.safetensors").write_bytes(b"")
    (hostile / "config.json").write_text(json.dumps(read_config(hostile) | CODE_KEYS))

    script = Path(__file__).parent / "audited_model_load.py"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    run = [sys.executable, str(script), str(hostile), str(benign)]
    result = subprocess.run(run, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    events = json.loads(result.stdout)
    seen = events["seen"]
    assert seen["code"] == []
    assert seen["processes"] == []
    assert seen["outside"] == []
    assert {Path(name).suffix for name in seen["inside"]} <= {".json", ".safetensors", ""}
    assert {Path(name).name for name in seen["inside"]} <= set(os.listdir(benign)) | {""}
    assert "config.json" in seen["inside"]
    assert any(name.endswith(".safetensors") for name in seen["inside"])
    assert events["unknown"].startswith("nobody/unknown: ")
    assert "\n" not in events["unknown"]

    assert any("modeling_evil.py" in event for event in events["control"]["code"]), "the hook would have seen nothing"
    assert marker.read_text() == "modeling_evil"
