"""Hold checkpoints that we save against llama.cpp: its converter reads them, and its logits are ours.

    pip install sentencepiece protobuf diskcache
    python tools/llama_cpp.py WORK [--version 0.3.36]

WORK gets the source distribution of llama-cpp-python, which holds llama.cpp and its converter, and a build of the
library (some ten minutes on two cores; both are kept and used again). Needs cmake, ninja and a compiler.

The converter asks for transformers 4.57, which does not know the family, and then reads config.json itself. With
transformers 5 it reads transformers' own configuration instead, whose defaults make every dense model a mixture of
experts; so that look-up is switched off here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import torch

from nemotron_h import NemotronHConfig, NemotronHForCausalLM, demo_model

BOUND = 2e-4  # of max(1, largest logit), as in the tests
SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "mamba_num_heads": 8, "mamba_head_dim": 64, "mamba_n_groups": 2, "ssm_state_size": 128, "intermediate_size": 512,
}  # fmt: skip
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "n_shared_experts": 1}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"hybrid_override_pattern": "M-M*-M-"},
    "moe": {"hybrid_override_pattern": "MEM*EME", "moe_shared_expert_intermediate_size": 128, **EXPERTS},
    "latent moe": {"hybrid_override_pattern": "MEM*EME", "moe_latent_size": 64, **EXPERTS},
}


def sources(work: Path, version: str) -> Path:
    """The unpacked source distribution."""
    root = work / f"llama_cpp_python-{version}"
    if not root.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(work)]
        subprocess.run([*command, f"llama-cpp-python=={version}"], check=True)
        with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
    return root


def build(root: Path, target: Path) -> None:
    """libllama, in `target`/bin."""
    if not (target / "bin" / "libllama.so").exists():
        options = ["-DBUILD_SHARED_LIBS=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_TOOLS=OFF"]
        configure = ["cmake", "-G", "Ninja", "-S", str(root / "vendor" / "llama.cpp"), "-B", str(target), *options]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(target), "--target", "llama", "-j", "2"], check=True)


def random_model(shape: dict[str, Any]) -> NemotronHForCausalLM:
    """No weight, norm or bias is neutral; logits reach about 8."""
    torch.manual_seed(0)
    model = NemotronHForCausalLM(NemotronHConfig(**SIZES, **shape)).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(tensor.shape)
            if name.endswith("dt_bias"):
                tensor.copy_(noise - 2)
            elif name.endswith(("A_log", "correction_bias", "bias")):
                tensor.copy_(0.3 * noise)
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.3 * noise)
            else:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
    return model


def convert(converter: Any, directory: Path, file: Path) -> None:
    sys.argv = ["convert_hf_to_gguf.py", str(directory), "--outtype", "f32", "--outfile", str(file)]
    converter.main()


def import_converter(root: Path) -> Any:
    """The converter; the pre-tokenizer's name is given by hand, since it does not know the shipped tokenizer."""
    sys.path[:0] = [str(root / "vendor" / "llama.cpp"), str(root / "vendor" / "llama.cpp" / "gguf-py"), str(root)]
    from conversion import base  # type: ignore[import-not-found]

    def unknown(*_: Any, **__: Any) -> Any:
        raise ValueError("as in transformers 4.57: no such model type")

    base.AutoConfig.from_pretrained = unknown
    base.TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    import convert_hf_to_gguf  # type: ignore[import-not-found]

    return convert_hf_to_gguf


def difference(model: NemotronHForCausalLM, file: Path) -> tuple[float, float, float]:
    """Largest difference of logits, largest logit, share of positions with the same best token."""
    import llama_cpp  # type: ignore[import-not-found]

    ids = torch.randint(20, 2000, (64,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours_TV = model(ids[None]).logits[0]
    theirs = llama_cpp.Llama(str(file), n_ctx=256, logits_all=True, verbose=False, type_k=0, type_v=0)  # 0: float32
    theirs.eval(ids.tolist())
    theirs_TV = torch.tensor(theirs.scores[: len(ids), : ours_TV.shape[1]])
    same = (ours_TV.argmax(-1) == theirs_TV.argmax(-1)).float().mean()
    return float((ours_TV - theirs_TV).abs().max()), float(ours_TV.abs().max()), float(same)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--version", default="0.3.36")
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    root = sources(work, arguments.version)
    build(root, work / "build")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(work / "build" / "bin")
    from transformers import AutoTokenizer

    tokenizer, converter, status = AutoTokenizer.from_pretrained(demo_model()), import_converter(root), 0
    for name, shape in SHAPES.items():
        model, directory = random_model(shape), work / name.replace(" ", "-")
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        convert(converter, directory, directory / "model.gguf")
        off, largest, same = difference(model, directory / "model.gguf")
        print(
            f"{name}: logits differ by {off:.1e} at most, largest {largest:.1f}, same best token {same:.0%}", flush=True
        )
        status |= off > BOUND * max(1.0, largest) or same < 1
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
