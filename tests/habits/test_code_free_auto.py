"""Auto classes, tokenizers, pipelines and LLM of a hostile directory: an audit hook sees nothing of it run."""

import json
import shutil
from pathlib import Path

import fresh
from helpers import tiny_model
from nemotron_h import demo_model

SCRIPT = """
import json, os, sys, warnings
from pathlib import Path
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
import nemotron_h
from nemotron_h import LLM, SamplingParams
transformers.logging.set_verbosity_error()
hostile, benign = sys.argv[1:3]
nemotron_h.register()
seen, watching = [], False
def hook(event, arguments):
    if not watching:
        return
    text = " ".join(str(getattr(a, "co_filename", a)) for a in arguments)
    if event.startswith(("socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.system", "os.fork", "pickle.")):
        seen.append(f"{event} {text[:200]}")
    elif event in ("import", "exec", "compile") and ("evil" in text or hostile in text):
        seen.append(f"{event} {text[:200]}")
sys.addaudithook(hook)
def use(path):
    for trust in (False, True):
        kwargs = {"trust_remote_code": trust}
        AutoConfig.from_pretrained(path, **kwargs)
        AutoModel.from_pretrained(path, **kwargs)
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
        tokenizer = LLM(path).tokenizer if trust else AutoTokenizer.from_pretrained(path)
        model.generate(**tokenizer("A horse", return_tensors="pt"), max_new_tokens=2)
        pipeline("text-generation", model=model, tokenizer=tokenizer)("A horse", max_new_tokens=2)
    llm = LLM(path)
    llm.generate("A horse", SamplingParams(max_tokens=2))
    llm.chat([{"role": "user", "content": "A horse"}], SamplingParams(max_tokens=2))
use(benign)  # what loads lazily is loaded now
watching = True
use(hostile)
watching, found = False, list(seen)
seen.clear(); watching = True
sys.path.insert(0, hostile); __import__("evil")
watching = False
print(json.dumps({"found": found, "control": len(seen)}))
"""


def test_a_hostile_directory_runs_nothing(tmp_path: Path) -> None:
    hostile, benign, marker = tmp_path / "hostile", tmp_path / "benign", tmp_path / "marker"
    for directory in (hostile, benign):
        tiny_model(vocab_size=2048, hybrid_override_pattern="ME*-").save_pretrained(directory)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(demo_model() / name, directory)
    for name in ("evil", "tokenization_evil", "modeling_evil", "configuration_evil", "__init__"):
        (hostile / f"{name}.py").write_text(f"open({str(marker)!r}, 'a').write(__name__)\n")
    (hostile / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch evil'\ntR.")
    auto_map = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForCausalLM": "evil.M"}
    config = {"auto_map": auto_map, "custom_pipelines": {"text-generation": {"impl": "evil.P"}}}
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_evil.T", None]}}
    for file, extra in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        values = json.loads((hostile / file).read_text())
        (hostile / file).write_text(json.dumps(values | extra))
    done = fresh.python(SCRIPT, str(hostile), str(benign))
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["found"] == []
    assert report["control"] > 0
    assert marker.read_text() == "evil", "only the control ran"
