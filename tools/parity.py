"""Prints how far the model is from the float64 reference over random configurations: README's first figures.

Letters: T tokens · V vocabulary.
"""

import argparse
import random
import sys
from pathlib import Path

import torch

from nemotron_h import NemotronHConfig, NemotronHForCausalLM
from nemotron_h.loading import hub_views

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reference64

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "mamba_n_groups": 2, "ssm_state_size": 16, "mamba_chunk_size": 8,
    "intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
    "routed_scaling_factor": 2.5, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40,
    "num_nextn_predict_layers": 1,
}  # fmt: skip
NEAR_TIE = 1e-4  # closer selection scores may choose another expert in float32


def draw(seed: int) -> NemotronHForCausalLM:
    """A model of random pattern, biases and window, with logits of about 5 and time steps down to 1e-4."""
    random.seed(seed)
    torch.manual_seed(seed)
    config = NemotronHConfig(
        **SIZES,
        hybrid_override_pattern="".join(random.choice("M*E-") for _ in range(random.randint(1, 8))),
        moe_latent_size=random.choice([None, 16]),
        use_bias=random.random() < 0.5,
        attention_bias=random.random() < 0.5,
        mlp_bias=random.random() < 0.5,
        sliding_window=random.choice([None, 5]),
    )
    model = NemotronHForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
        elif name.endswith("dt_bias"):
            parameter.data.uniform_(-9, 2)
    return model


@torch.no_grad()
def errors(seed: int, tokens: int) -> tuple[float, float]:
    """Largest difference of logits and MTP logits over max(1, largest value), in float32 and in float64."""
    model = draw(seed)
    tensors = {name: view.double().numpy() for name, view in hub_views(model.state_dict())}
    margin = 0.0
    while margin <= NEAR_TIE:
        ids = torch.randint(0, model.config.vocab_size, (1, tokens))
        reference = reference64.run(model.config, tensors, ids[0].numpy(), mtp_depths=2)
        margin = reference.selection_margin

    def error() -> float:
        out = model(ids, output_mtp_logits=2, use_cache=False)
        pairs = zip([out.logits, *out.mtp_logits], [reference.logits_TV, *reference.mtp_logits], strict=True)
        return max(abs(ours[0].double().numpy() - right).max() / max(1, abs(right).max()) for ours, right in pairs)

    single = error()
    model.double()
    return single, error()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configurations", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=37)
    options = parser.parse_args()
    singles, doubles = zip(*(errors(seed, options.tokens) for seed in range(options.configurations)), strict=True)
    print(f"float32 {max(singles):.2g}, float64 {max(doubles):.2g} of max(1, max |reference|)")


if __name__ == "__main__":
    main()
