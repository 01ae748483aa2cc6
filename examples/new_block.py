"""A block type of your own: a moving average of what came before, letter `A` in patterns.

    python examples/new_block.py

A module, a cache layer and one call are all. Training, cached decoding, padding on any side, packed documents, beams,
saving and loading then work as they do for the family's own blocks.

Letters: B batch · T tokens · D hidden size.
"""

from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_h import NemotronHConfig, NemotronHForCausalLM, register_block
from nemotron_h.cache import CacheLayer
from nemotron_h.layout import Layout
from nemotron_h.ops.ssd import ssd


class AverageLayer(CacheLayer):
    """What the block remembers. Reordering, selecting, saving and loading need no more than the tensors' names."""

    names = ("average",)  # [B, D, 1, 1], float32
    average: Tensor | None


class Average(nn.Module):
    """`h_t = a·h_{t-1} + (1 - a)·x_t` with a learned a for each channel, between two projections."""

    def __init__(self, config: NemotronHConfig, sizes: Any, layer_idx: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.in_proj, self.out_proj = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
        self.decay_logit = nn.Parameter(4 * torch.rand(size))  # a from 0.5 to 0.98

    def forward(self, hidden_states: Tensor, layout: Layout | None = None, cache: AverageLayer | None = None) -> Tensor:
        layout = layout or Layout(hidden_states.shape[1])
        x_BTD, a_D = self.in_proj(hidden_states), self.decay_logit.sigmoid()
        # A moving average is a state space with one state per channel, so the package's scan computes it: in chunks for
        # many tokens, in one step for one. Steps of length 0 keep padding out of the average.
        step_BTD = layout.zero_padding(torch.ones_like(x_BTD))
        one_BT11, no_skip_D = torch.ones_like(x_BTD[..., :1, None]), torch.zeros_like(a_D)
        state = None if cache is None else cache.average
        input_BTD1 = ((1 - a_D) * x_BTD)[..., None]
        scan = ssd(input_BTD1, step_BTD, a_D.log(), one_BT11, one_BT11, no_skip_D, 64, state, layout.seq_idx_BT)
        if cache is not None:
            cache.update(scan.final_state)  # counts once the whole model has read these tokens
        return self.out_proj(scan.output[..., 0].to(hidden_states.dtype))


register_block("average", "A", Average, AverageLayer)


def main() -> None:
    torch.manual_seed(0)
    config = NemotronHConfig(
        hybrid_override_pattern="MA*E", vocab_size=128, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, mamba_num_heads=8, mamba_head_dim=16, mamba_n_groups=2, ssm_state_size=16, n_routed_experts=4,
        moe_intermediate_size=64, moe_shared_expert_intermediate_size=64,
    )  # fmt: skip
    model = NemotronHForCausalLM(config).train()
    print(f"blocks {', '.join(config.layers_block_type)}; {sum(p.numel() for p in model.parameters()):,} parameters")

    text = "A block type of your own takes a module, a cache layer and one call."
    ids_BT = torch.tensor([list(text.encode())])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(41):
        loss = model(ids_BT, labels=ids_BT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2}: loss {loss.item():.3f}")

    model.eval()
    written_BT = model.generate(ids_BT[:, :12], max_new_tokens=ids_BT.shape[1] - 12, do_sample=False)
    print(f"written with a cache: {bytes(written_BT[0].tolist()).decode()}")
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        loaded = NemotronHForCausalLM.from_pretrained(directory)
    same = torch.equal(loaded(ids_BT).logits, model(ids_BT).logits)
    print(f"saved and loaded: {'the same logits' if same else 'other logits'}")


if __name__ == "__main__":
    main()
