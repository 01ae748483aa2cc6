"""Run by test_auto_classes.py in a process of its own, since `register()` changes transformers' Auto classes.

`python auto_cases.py CASE DIRECTORY` prints what the case found, as JSON.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

import nemotron_h
from nemotron_h import NemotronHConfig, NemotronHForCausalLM, demo_model

IDS = torch.tensor([[3, 4, 5, 6, 7]])


def where(thing: object) -> str:
    return f"{type(thing).__module__.split('.')[0]}.{type(thing).__name__}"


def auto(directory: Path) -> Any:
    """Types before and after `register()`, however often, and with and without trust_remote_code."""
    before = where(AutoModelForCausalLM.from_pretrained(directory))
    found = []
    for trust in (None, False, True):
        nemotron_h.register()
        kwargs = {} if trust is None else {"trust_remote_code": trust}
        config = AutoConfig.from_pretrained(directory, **kwargs)
        made = (
            config,
            AutoModel.from_pretrained(directory, **kwargs),
            AutoModelForCausalLM.from_pretrained(directory, **kwargs),
            AutoModelForCausalLM.from_config(config),
            AutoConfig.for_model("nemotron_h", hidden_size=32),
        )
        found.append([where(thing) for thing in made])
    theirs = where(transformers.NemotronHForCausalLM.from_pretrained(directory))
    ours = NemotronHForCausalLM.from_pretrained(directory)
    same = torch.equal(AutoModelForCausalLM.from_pretrained(directory)(IDS).logits, ours(IDS).logits)
    ours.save_pretrained(directory / "again")
    names = [sorted(load_file(d / "model.safetensors")) for d in (directory, directory / "again")]
    return {"before": before, "found": found, "theirs": theirs, "same": same, "names": names[0] == names[1]}


def backbone(directory: Path) -> Any:
    """The effect of an adapter whose keys say `backbone.`, by plain PEFT: nothing, and after `register()` all of it."""
    model = NemotronHForCausalLM.from_pretrained(directory)
    peft_model = get_peft_model(model, LoraConfig(target_modules=["in_proj", "q_proj", "up_proj"], r=2))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    expected = peft_model(IDS).logits
    peft_model.save_pretrained(directory / "adapter")
    file = directory / "adapter" / "adapter_model.safetensors"
    save_file({name.replace(".model.model.", ".model.backbone.", 1): t for name, t in load_file(file).items()}, file)
    plain = NemotronHForCausalLM.from_pretrained(directory)(IDS).logits
    found = []
    for register in (False, True):
        if register:
            nemotron_h.register()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(NemotronHForCausalLM.from_pretrained(directory), directory / "adapter")
        logits = loaded(IDS).logits
        found.append({"effect": float((logits - plain).abs().max()), "off": float((logits - expected).abs().max())})
    return found


def adapters(directory: Path) -> Any:
    """All targets, experts too, saved and loaded by PEFT with the conversion registered: the largest difference."""
    nemotron_h.register()
    found = []
    for save_registered in (True, False):
        model = NemotronHForCausalLM.from_pretrained(directory)
        with nemotron_h.peft_compat(model):
            peft_model = get_peft_model(model, LoraConfig(**nemotron_h.lora_targets(model), r=2))
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3)
        peft_model.save_pretrained(directory / f"adapter-{save_registered}")
        base = NemotronHForCausalLM.from_pretrained(directory)
        with nemotron_h.peft_compat(base):
            loaded = PeftModel.from_pretrained(base, directory / f"adapter-{save_registered}")
        found.append(float((loaded(IDS).logits - peft_model(IDS).logits).abs().max()))
        again = nemotron_h.load_adapter(
            NemotronHForCausalLM.from_pretrained(directory), directory / f"adapter-{save_registered}"
        )
        found.append(float((again(IDS).logits - peft_model(IDS).logits).abs().max()))
    return found


def texts(directory: Path) -> Any:
    """pipeline("text-generation") by path after `register()`."""
    nemotron_h.register()
    path = str(demo_model())
    pipe = pipeline("text-generation", path, dtype=torch.float32)
    options = {"do_sample": False, "max_new_tokens": 12}
    prompts = ["Elizabeth", "The weather was fine and"]
    chat = [{"role": "user", "content": "What is a horse?"}]
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    batched = pipeline("text-generation", path, tokenizer=tokenizer, dtype=torch.float32, batch_size=2)
    template = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return {
        "model": where(pipe.model),
        "one": pipe(prompts[0], **options)[0]["generated_text"],
        "alone": [pipe(prompt, **options)[0]["generated_text"] for prompt in prompts],
        "batch": [outputs[0]["generated_text"] for outputs in batched(prompts, **options)],
        "new only": pipe(prompts[0], return_full_text=False, **options)[0]["generated_text"],
        "chat": pipe(chat, **options)[0]["generated_text"],
        "template": pipe(template, return_full_text=False, **options)[0]["generated_text"],
        "samples": len(pipe(prompts[0], do_sample=True, num_return_sequences=3, max_new_tokens=4)),
        "stopped": pipe(prompts[0], stop_sequence="a", **options)[0]["generated_text"],
    }


def objects(directory: Path) -> Any:
    """A pipeline around our object, without `register()`."""
    model = NemotronHForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    pipe = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(demo_model()))
    text = pipe("Elizabeth", do_sample=False, max_new_tokens=12)[0]["generated_text"]
    return {"text": text, "registered": AutoConfig.for_model("nemotron_h").__class__ is NemotronHConfig}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
