"""A long pass is read in pieces: the bits of one pass, in memory that does not grow with the tokens."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import assert_close, draw_ids, tiny_model
from nemotron_h import LLM, NemotronHForCausalLM, NemotronHHybridDynamicCache, SamplingParams, pieces
from nemotron_h.cache import NemotronHHybridStaticCache
from nemotron_h.modeling import NemotronHAttention, NemotronHBlock
from nemotron_h.ops import _native
from nemotron_h.pieces import GRAIN, PIECE

LENGTHS = (PIECE + GRAIN, 2 * PIECE, 2 * PIECE + 4, 2 * PIECE + GRAIN - 1, 2 * PIECE + 900)
FORMATS = (None, "bf16", "int8", "int4")


@pytest.fixture
def one_pass(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Calls a function with passes that are never cut."""

    def call(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(pieces, "plan", lambda *_: None)
            return function()

    return call


def same(cut: Tensor, whole: Tensor) -> None:
    """Equal bits where kernels promise them; without, PyTorch's products round by the number of their rows, and a value
    near the middle of two bfloat16 or int8 numbers goes to the other one."""
    if _native.levels():
        assert torch.equal(cut, whole)
    else:
        apart = (cut.double() - whole.double()).norm() / whole.double().norm()
        assert apart < 0.02


def model_of(quantization: str | None, **config: Any) -> NemotronHForCausalLM:
    model = tiny_model(**config)
    if quantization:
        model.to(torch.bfloat16).quantize(quantization)
    return model


def lengths_seen(model: NemotronHForCausalLM, function: Callable[[], Any]) -> list[int]:
    """Tokens of each call of the first block, by a patch that is no hook."""
    seen: list[int] = []
    forward = NemotronHBlock.forward

    def noting(self: NemotronHBlock, x_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self is model.model.layers[0]:
            seen.append(x_BTD.shape[1])
        return forward(self, x_BTD, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(NemotronHBlock, "forward", noting)
        function()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("quantization", FORMATS)
def test_the_bits_are_those_of_one_pass(quantization: str | None, one_pass: Any) -> None:
    model = model_of(quantization)
    for tokens in LENGTHS:
        ids_1T, behind = draw_ids(model, 1, tokens), draw_ids(model, 1, 3, seed=1)
        cut = model(ids_1T)
        whole = one_pass(lambda ids=ids_1T: model(ids))
        same(cut.logits, whole.logits)
        for mine, theirs in zip(cut.past_key_values.layers, whole.past_key_values.layers, strict=True):
            for name, tensor in theirs.tensors().items():
                same(mine.tensors()[name], tensor)
        after = [model(behind, past_key_values=out.past_key_values).logits for out in (cut, whole)]
        same(*after)
        assert cut.past_key_values.get_seq_length() == tokens + 3


@pytest.mark.parametrize("tokens", [*LENGTHS, 70, PIECE, PIECE + GRAIN - 1, 5 * PIECE + 1])
def test_the_pieces(tokens: int) -> None:
    model = tiny_model(hybrid_override_pattern="M")
    seen = lengths_seen(model, lambda: model(draw_ids(model, 1, tokens), logits_to_keep=1))
    assert sum(seen) == tokens
    assert all(n == PIECE for n in seen[:-1])
    assert min(GRAIN, tokens) <= seen[-1] < PIECE + GRAIN


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("quantization", ["int4", "bf16"])
def test_padding_anywhere_has_the_bits_of_one_pass(quantization: str, use_cache: bool, one_pass: Any) -> None:
    model, tokens = model_of(quantization), 2 * PIECE + 900
    ids_1T, mask_1T = draw_ids(model, 1, tokens), torch.ones(1, tokens, dtype=torch.long)
    for padding in (slice(0, 77), slice(3000, 3033), slice(1990, 2100), slice(tokens - 5, tokens)):
        mask_1T[:, padding] = 0
        cut, whole = (
            how(lambda: model(ids_1T, attention_mask=mask_1T, use_cache=use_cache).logits)
            for how in (lambda call: call(), one_pass)
        )
        same(cut, whole)
    seen = lengths_seen(model, lambda: model(ids_1T, attention_mask=mask_1T, logits_to_keep=1))
    assert sum(seen) == tokens
    assert len(seen) > 2
    assert max(seen) < PIECE + GRAIN


@torch.no_grad()
def test_rows_of_different_padding(one_pass: Any) -> None:
    """No cut fits both rows: the scan's rounding moves, nothing else."""
    model, tokens = tiny_model(), 2 * PIECE + 100
    ids_BT, mask_BT = draw_ids(model, 2, tokens), torch.ones(2, tokens, dtype=torch.long)
    mask_BT[0, :301] = 0
    cut = model(ids_BT, attention_mask=mask_BT).logits
    whole = one_pass(lambda: model(ids_BT, attention_mask=mask_BT).logits)
    assert_close(cut[mask_BT.bool()], whole[mask_BT.bool()], bound=1e-5)
    seen = lengths_seen(model, lambda: model(ids_BT, attention_mask=mask_BT, logits_to_keep=1))
    assert sum(seen) == tokens
    assert max(seen) == PIECE


def packed_rows(tokens: int, *starts: tuple[int, ...]) -> Tensor:
    seq_idx_BT = torch.zeros(len(starts), tokens, dtype=torch.long)
    for row, own in enumerate(starts):
        for start in own:
            seq_idx_BT[row, start:] += 1
    return seq_idx_BT


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["int4", "bf16"])
def test_packed_documents_have_the_bits_of_one_pass(quantization: str, one_pass: Any) -> None:
    model, tokens = model_of(quantization), 2 * PIECE + 904
    rows = ((100, 333, 2000, 4777), (1000, 1001, 2000, 2500, 4000, 4100), (2500,), (), (77, PIECE + 77, PIECE + 78))
    seq_idx_BT, ids_BT = packed_rows(tokens, *rows), draw_ids(model, len(rows), tokens, seed=2)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 1990:2010] = mask_BT[2, 1000:1100] = mask_BT[3, :5] = 0
    for mask in (None, mask_BT):
        cut = model(ids_BT, seq_idx=seq_idx_BT, attention_mask=mask).logits
        whole = one_pass(lambda mask=mask: model(ids_BT, seq_idx=seq_idx_BT, attention_mask=mask).logits)
        real_BT = mask_BT.bool() if mask is not None else torch.ones_like(ids_BT).bool()
        same(cut[real_BT], whole[real_BT])
    seen = lengths_seen(model, lambda: model(ids_BT, seq_idx=seq_idx_BT, logits_to_keep=1))
    assert max(seen) < PIECE + GRAIN + pieces.KEYS


@torch.no_grad()
@pytest.mark.parametrize(
    "keep", [1, 7, 0, PIECE + 200, torch.tensor([0, -1, PIECE - 1, PIECE, 3]), torch.tensor([[5, PIECE], [3000, 2]])]
)
def test_logits_to_keep(keep: Any, one_pass: Any) -> None:
    model = model_of("int4")
    ids_BT = draw_ids(model, 2, PIECE + 1000)
    cut = model(ids_BT, logits_to_keep=keep).logits
    same(cut, one_pass(lambda: model(ids_BT, logits_to_keep=keep).logits))


@torch.no_grad()
def test_embeddings_and_the_trunk(one_pass: Any) -> None:
    model = model_of("int4")
    ids_BT = draw_ids(model, 2, PIECE + 1000)
    embeds_BTD = model.model.embeddings(ids_BT)
    expected = one_pass(lambda: model.model(ids_BT).last_hidden_state)
    same(model.model(inputs_embeds=embeds_BTD).last_hidden_state, expected)
    last = model(ids_BT, output_hidden_states=-1, logits_to_keep=1)
    same(last.hidden_states[0], expected)
    assert last.logits.shape[1] == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recording", [False, True])
def test_behind_a_filled_cache(dtype: str, recording: bool, one_pass: Any) -> None:
    """States of a narrow cache are rounded where the pass ends, not between its pieces."""
    model = model_of("int4", mamba_ssm_cache_dtype=dtype)
    first, long = draw_ids(model, 1, 77), draw_ids(model, 1, 2 * PIECE + 30, seed=1)

    def run() -> list[Tensor]:
        cache = NemotronHHybridDynamicCache(model.config)
        if recording:
            cache.activate_past_recording()
        model(first, past_key_values=cache)
        logits = model(long, past_key_values=cache).logits
        assert all(state.dtype == getattr(torch, dtype) for state in cache.ssm_states if state.numel())
        if recording:
            cache.crop(-40)
        return [logits, model(first, past_key_values=cache).logits]

    for cut, whole in zip(run(), one_pass(run), strict=True):
        same(cut, whole)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "static"])
def test_other_caches(kind: str, one_pass: Any) -> None:
    model, tokens = model_of("int4"), PIECE + 500

    def run() -> list[Tensor]:
        cache: NemotronHHybridDynamicCache = NemotronHHybridStaticCache(model.config, tokens + 9)
        if kind == "int8":
            cache = NemotronHHybridDynamicCache(model.config, kv_dtype="int8")
        logits = model(draw_ids(model, 2, tokens), past_key_values=cache).logits
        return [logits, model(draw_ids(model, 2, 2, seed=1), past_key_values=cache).logits]

    for cut, whole in zip(run(), one_pass(run), strict=True):
        same(cut, whole)


class Stop(Exception):
    pass


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "recording", "static"])
def test_a_failing_piece_leaves_the_cache_as_it_was(kind: str) -> None:
    model, tokens = model_of("int4"), 2 * PIECE + 100
    long, next_ids = draw_ids(model, 1, tokens), draw_ids(model, 1, 5, seed=1)

    def filled() -> NemotronHHybridDynamicCache:
        cache = NemotronHHybridDynamicCache(model.config)
        if kind == "static":
            cache = NemotronHHybridStaticCache(model.config, tokens + 100)
        if kind == "recording":
            cache.activate_past_recording()
        mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
        model(draw_ids(model, 1, 6, seed=2), past_key_values=cache, attention_mask=mask)
        return cache

    cache, calls, forward = filled(), [0], NemotronHAttention.forward
    mask = torch.ones_like(long)
    mask[:, 10] = 0  # a journal of padded passes grows in place

    def failing(self: NemotronHAttention, *args: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise Stop
        return forward(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NemotronHAttention, "forward", failing)
        with pytest.raises(Stop):
            model(long, past_key_values=cache, attention_mask=mask)
    assert cache.get_seq_length() == 6
    if kind == "recording":
        cache.crop(-2)
    fresh = filled()
    if kind == "recording":
        fresh.crop(-2)
    same(model(next_ids, past_key_values=cache).logits, model(next_ids, past_key_values=fresh).logits)


def test_who_watches_sees_one_pass() -> None:
    model, tokens = tiny_model(), PIECE + GRAIN
    ids_1T = draw_ids(model, 1, tokens)
    whole, seen = [tokens], []
    note = lambda module, args: seen.append(args[0].shape[1])  # noqa: E731
    for module in (model.model.layers[0], model.model.norm_f, model.model.layers[0].mixer.hook_dt):
        handle = module.register_forward_pre_hook(note)
        with torch.no_grad():
            model(ids_1T, logits_to_keep=1)
        handle.remove()
    assert seen == 3 * whole
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    assert lengths_seen(model, lambda: model(ids_1T, logits_to_keep=1)) == whole
    handle.remove()
    for wanted in ("output_hidden_states", "output_router_logits", "output_ssm_states"):
        assert lengths_seen(model, lambda name=wanted: model(ids_1T, logits_to_keep=1, **{name: True})) == whole
    with torch.enable_grad():
        assert model.model.layers[0](model.model.embeddings(ids_1T), pieces.Layout(tokens)).requires_grad
    assert len(lengths_seen(model, lambda: model(ids_1T, logits_to_keep=1))) == 2


def test_a_mixer_of_somebody_else_is_not_cut() -> None:
    class Other(NemotronHAttention):
        pass

    model, tokens = tiny_model(), PIECE + GRAIN
    model.model.layers[2].mixer.__class__ = Other
    model.model.layers[2].block_type = "other"
    run = lambda: model(draw_ids(model, 1, tokens), logits_to_keep=1, use_cache=False)  # noqa: E731
    assert lengths_seen(model, run) == [tokens]


def test_gradients_and_training_are_not_cut() -> None:
    model = tiny_model(hybrid_override_pattern="M")
    ids_1T = draw_ids(model, 1, PIECE + GRAIN)
    model(ids_1T, logits_to_keep=1).logits.sum().backward()
    assert model.model.embeddings.weight.grad is not None
    model.train()
    assert lengths_seen(model, lambda: model(ids_1T, logits_to_keep=1)) == [PIECE + GRAIN]


@torch.no_grad()
def test_the_engine_scores_and_writes_behind_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("int4")
    llm, ids = LLM(model, max_model_len=5000), draw_ids(model, 3000)
    monkeypatch.setattr("nemotron_h.generation.batch._LOGITS", 200 * model.config.vocab_size)
    logprobs_TV = model(ids[None]).logits[0].log_softmax(-1)
    expected = logprobs_TV[:-1].gather(1, ids[1:, None])[:, 0]
    scored = llm.score([ids.tolist()])[0]
    assert scored[0] is None
    same(torch.tensor(scored[1:]), expected)
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, prompt_logprobs=0)
    result = llm.generate([ids.tolist()], params)[0]
    known = result.prompt_logprobs
    assert known is not None
    assert known[0] is None
    assert [found[int(i)] for found, i in zip(known[1:], ids[1:], strict=True)] == expected.tolist()
    plain = llm.generate([ids.tolist()], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))[0]
    greedy = model.generate(ids[None], max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert result.token_ids == plain.token_ids == greedy[0, 3000:].tolist()


MEASURE = """
import json, resource, sys
import torch
torch.set_num_threads(1)
from nemotron_h import LLM, NemotronHConfig, NemotronHForCausalLM, SamplingParams
config = NemotronHConfig(
    vocab_size=64, hidden_size=64, hybrid_override_pattern="M-*", num_attention_heads=2, num_key_value_heads=1,
    head_dim=64, mamba_num_heads=16, mamba_head_dim=64, mamba_n_groups=1, ssm_state_size=16, intermediate_size=4096,
    max_position_embeddings=1 << 20,
)
model = NemotronHForCausalLM(config).eval()
llm = LLM(model)

def padded(ids):
    mask = torch.ones_like(ids)
    mask[:, :100] = 0
    model(ids, attention_mask=mask, logits_to_keep=1)

ways = {
    "forward": lambda ids: model(ids, logits_to_keep=1),
    "generate": lambda ids: model.generate(ids, max_new_tokens=2, do_sample=False),
    "score": lambda ids: llm.score([ids[0].tolist()]),
    "llm": lambda ids: llm.generate([ids[0].tolist()], SamplingParams(max_tokens=2)),
    "padded": padded,
}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
ids = torch.arange(int(sys.argv[1]))[None] % 64
grown = {}
with torch.no_grad():
    for run in ways.values():
        run(ids[:, :4224])
    for way, run in ways.items():
        before = peak()
        run(ids)
        grown[way] = peak() - before
print(json.dumps(grown))
"""


def test_peak_memory_does_not_grow_with_the_prompt() -> None:
    """One pass over 16k tokens holds 270 MB in its MLP alone, 200 MB more than one over 4k. What may grow: keys and
    values of 512 B a token, ids, and for padding a mask of some bytes per token of a piece."""
    tokens = 16384
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tokens)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for way, grown in json.loads(done.stdout).items():
        allowed = 1024 + (4 * PIECE if way == "padded" else 0)
        assert grown < tokens * allowed + (16 << 20), (way, grown)
