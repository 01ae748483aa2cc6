"""What packing costs: error per tensor, divergence and bits per byte of the shipped model, beside llama.cpp's formats.

    pip install gguf
    python tools/quantization_quality.py TEXT

Q8_0 and Q4_0 come from the `gguf` package, llama.cpp's own. "ideal" is the best step of every group of 32 columns,
found by search and kept in float32, which no format stores. Errors are relative, ‖approximation − exact‖ / ‖exact‖.

Letters: M rows · N outputs · K columns.
"""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from nemotron_h import LLM, NemotronHForCausalLM, demo_model
from nemotron_h.evaluation.perplexity import score_text
from nemotron_h.linears import packed_parameters
from nemotron_h.ops.linear import packed_linear
from nemotron_h.quantization import INT4, INT8, Packing, pack, unpack

Approximate = Callable[[Tensor], Tensor]


def ours(packing: Packing) -> Approximate:
    return lambda w: unpack(pack(w, packing), packing, *w.shape)


def llama(kind: str) -> Approximate:
    code = GGMLQuantizationType[kind]
    return lambda w: torch.from_numpy(dequantize(quantize(w.numpy(), code), code).copy())


def ideal(bits: int) -> Approximate:
    high, low = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))

    def approximate(w_NK: Tensor) -> Tensor:
        groups = w_NK.unflatten(1, (-1, 32))
        top = groups.abs().amax(-1, keepdim=True)
        best, least = torch.zeros_like(groups), torch.full_like(top, torch.inf)
        for share in torch.linspace(0.6, 1.1, 100):
            step = (top * share / high).clamp(min=1e-30)
            values = (groups / step).round().clamp(low, high) * step
            error = (groups - values).square().sum(-1, keepdim=True)
            best, least = torch.where(error < least, values, best), torch.minimum(error, least)
        return best.flatten(1)

    return approximate


FORMATS: dict[str, tuple[float, Approximate]] = {
    "int8": (8.07, ours(INT8)), "Q8_0": (8.5, llama("Q8_0")), "ideal 8": (9.0, ideal(8)),
    "int4": (4.24, ours(INT4)), "Q4_0": (4.5, llama("Q4_0")), "ideal 4": (5.0, ideal(4)),
}  # fmt: skip


def error(exact: Tensor, approximation: Tensor) -> float:
    return float((approximation.double() - exact.double()).norm() / exact.double().norm())


def draws() -> dict[str, Tensor]:
    """Random weights of a Nemotron 3 Nano projection's width."""
    torch.manual_seed(0)
    normal = torch.randn(256, 2688)
    found = {"normal": normal, "normal, 0.2 % x 20": torch.where(torch.rand(normal.shape) < 0.002, 20 * normal, normal)}
    found |= {f"Student t, {n} degrees": torch.distributions.StudentT(float(n)).sample(normal.shape) for n in (5, 3)}
    return found


def weights_table(tensors: dict[str, Tensor]) -> list[str]:
    lines = ["| weights | " + " | ".join(FORMATS) + " |", "|---" * (1 + len(FORMATS)) + "|"]
    lines.append("| bits per weight | " + " | ".join(f"{bits:.2f}" for bits, _ in FORMATS.values()) + " |")
    for name, w in tensors.items():
        lines.append(f"| {name} | " + " | ".join(f"{error(w, f(w)):.4f}" for _, f in FORMATS.values()) + " |")
    return lines


def activations_table() -> list[str]:
    """Output error of int8 blocks of 128 against float activations on the same packed weights, and with theirs."""
    torch.manual_seed(1)
    w, x = torch.randn(512, 2688), torch.randn(64, 2688)
    channel = x.clone()
    channel[:, 700] *= 1000
    eight = x * torch.where(torch.arange(2688) % 336 == 0, 40.0, 1.0)
    heavy = torch.distributions.StudentT(4.0).sample((64, 2688)).relu().square()
    cases = {"normal": x, "one channel x 1000": channel, "8 channels x 40": eight, "relu² of t4": heavy}
    lines = [
        "| activations | rounding alone | int8 weights, float / int8 | int4 weights, float / int8 |",
        "|---|---|---|---|",
    ]
    for name, x in cases.items():
        exact, cells = x.double() @ w.double().T, []
        for packing in (INT8, INT4):
            panels = pack(w, packing)
            floating, rounded = (packed_linear(x, panels, packing, 512, None, kind) for kind in ("float32", "int8"))
            if packing is INT8:
                cells.append(f"{error(floating, rounded):.4f}")
            cells.append(f"{error(exact, floating):.4f} / {error(exact, rounded):.4f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


@torch.no_grad()
def model_table(text: str) -> list[str]:
    plain = NemotronHForCausalLM.from_pretrained(demo_model())
    reader = LLM(demo_model())
    ids = torch.tensor([reader.tokenizer(text)["input_ids"]])
    expected = plain(ids).logits.double().log_softmax(-1)
    models: dict[str, NemotronHForCausalLM] = {"bfloat16": plain}
    for name in ("int8", "int4"):
        for activations in ("int8", "float32"):
            models[f"{name}, activations {activations}"] = copy.deepcopy(plain)
            scheme = {"quant_method": "nemotron_h", "format": name, "activations": activations}
            models[f"{name}, activations {activations}"].quantize(scheme)
    packed = [(name, shape) for name, _, shape in packed_parameters(models["int8, activations int8"])]
    for kind in ("Q8_0", "Q4_0"):
        models[f"{kind}, its weights in bfloat16's place"] = replaced(plain, packed, FORMATS[kind][1])
    lines = ["| model | KL to bfloat16, nats | same best token | bits per byte |", "|---|---|---|---|"]
    for name, model in models.items():
        logprobs = model(ids).logits.double().log_softmax(-1)
        kl = float((expected.exp() * (expected - logprobs)).sum(-1).mean())
        same = float((expected.argmax(-1) == logprobs.argmax(-1)).double().mean())
        reader.model = model
        score = score_text(reader, text)
        lines.append(f"| {name} | {kl:.5f} | {100 * same:.1f} % | {score.bits_per_byte.value:.4f} |")
    return lines


def replaced(
    plain: NemotronHForCausalLM, packed: list[tuple[str, tuple[int, ...]]], approximate: Approximate
) -> NemotronHForCausalLM:
    """The model in float32 with these weights approximated, in float32."""
    model = copy.deepcopy(plain).float()
    state = model.state_dict()
    for name, shape in packed:
        tensor = state[name]
        for matrix in tensor if len(shape) == 3 else tensor[None]:
            matrix.copy_(approximate(matrix.contiguous()))
    return model


def trained() -> dict[str, Tensor]:
    plain = NemotronHForCausalLM.from_pretrained(demo_model())
    state = {name: tensor.float() for name, tensor in plain.state_dict().items()}
    plain.quantize("int8")
    names = [(name, shape) for name, _, shape in packed_parameters(plain)]
    return {name.removeprefix("model."): state[name].flatten(0, -2).detach() for name, _ in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    print(f"{platform.machine()}, torch {torch.__version__}; text: {arguments.text.name}, {len(text)} characters.\n")
    for title, table in (
        ("Random weights", weights_table(draws())),
        ("The shipped model's tensors", weights_table(trained())),
        ("Activations", activations_table()),
        ("The shipped model", model_table(text)),
    ):
        print(f"### {title}\n\n" + "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
