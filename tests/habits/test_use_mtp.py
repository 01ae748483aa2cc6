"""`generate(use_mtp=True)`: what the head drafts, and that it never changes the answer."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import BIASED, assert_close, draw_ids, tiny_model
from nemotron_h import InputError, NemotronHForCausalLM, UnsupportedError, demo_model
from nemotron_h.cache import JOURNAL
from nemotron_h.drafting import DRAFTS, MTPCandidateGenerator, MTPDrafter

GREEDY = {"max_new_tokens": 20, "eos_token_id": None, "do_sample": False}
HEADS = [(1, ["attention", "moe"]), (2, ["mamba", "mlp"]), (3, ["attention", "moe"]), (1, ["mamba", "attention"])]


def with_head(heads: int = 1, blocks: list[str] | None = None, **config: Any) -> NemotronHForCausalLM:
    blocks = blocks or ["attention", "moe"]
    return tiny_model(num_nextn_predict_layers=heads, mtp_layers_block_type=blocks, **config).double()


class Passes:
    """Widths of the model's forward passes."""

    def __init__(self, model: NemotronHForCausalLM) -> None:
        self.tokens: list[int] = []
        model.model.register_forward_hook(lambda _, args, output: self.tokens.append(output[0].shape[1]))


@pytest.mark.parametrize(("heads", "blocks"), HEADS)
@pytest.mark.parametrize("pattern", ["ME*-M", "MM", "**"])
def test_same_tokens_as_plain_decoding(heads: int, blocks: list[str], pattern: str) -> None:
    model = with_head(heads, blocks, hybrid_override_pattern=pattern, vocab_size=7)
    for tokens, drafts in ((1, 1), (2, 4), (9, 2), (JOURNAL + 9, 3)):
        ids = draw_ids(model, 1, tokens, seed=drafts)
        options = {**GREEDY, "attention_mask": torch.ones_like(ids)}
        drafted = model.generate(ids, **options, use_mtp=True, num_assistant_tokens=drafts)
        assert torch.equal(drafted, model.generate(ids, **options)), (tokens, drafts)


@pytest.mark.parametrize(("heads", "blocks"), HEADS)
@torch.no_grad()
def test_drafts_are_what_the_forward_pass_predicts(heads: int, blocks: list[str]) -> None:
    """Whatever part of earlier drafts was accepted: the same logits as `output_mtp_logits` on the drafted text."""
    model, depths = with_head(heads, blocks), 4
    ids = draw_ids(model, 1, 40)
    hidden = model.model(ids).last_hidden_state
    drafter, read = MTPDrafter(model, depths), 0
    for accepted in (1, 1, 5, 2, 1, 9, 3):
        scores: list[Tensor] = []

        def choose(_: Tensor, logits_BV: Tensor, scores: list[Tensor] = scores) -> Tensor:
            scores.append(logits_BV)
            return logits_BV.argmax(-1, keepdim=True)

        new = ids[:, read + 1 : read + 1 + accepted] if read else ids[:, : accepted + 1]
        drafts = drafter.draft(new, hidden[:, read : read + accepted], choose)
        read += accepted
        text = torch.cat([ids[:, : read + 1], drafts], dim=1)
        expected = model(text, output_mtp_logits=depths).mtp_logits
        for depth in range(depths):
            assert_close(scores[depth], expected[depth][:, read - 1], f"depth {depth + 1} after {read}")


@torch.no_grad()
def test_few_passes_on_a_trained_model() -> None:
    """Each pass reads one certain token and the drafts; the shipped head is right often enough to save passes."""
    model = NemotronHForCausalLM.from_pretrained(demo_model(), dtype=torch.float64)
    ids = torch.tensor([[1, *range(300, 320)]])
    plain = model.generate(ids, max_new_tokens=60, eos_token_id=None, do_sample=False)
    passes = Passes(model)
    drafted = model.generate(ids, max_new_tokens=60, eos_token_id=None, do_sample=False, use_mtp=True)
    assert torch.equal(drafted, plain)
    assert passes.tokens[:2] == [21, 1 + DRAFTS]
    assert len(passes.tokens) < 50
    assert max(passes.tokens[1:]) == 1 + DRAFTS


def test_draft_lengths() -> None:
    for heads, asked, expected in ((1, None, DRAFTS), (2, None, 2), (1, 5, 5), (2, 1, 1)):
        model = with_head(heads)
        passes = Passes(model)
        model.generate(draw_ids(model, 1, 5), **GREEDY, use_mtp=True, num_assistant_tokens=asked)
        assert max(passes.tokens[1:]) == 1 + expected
    for bad in (0, -1, JOURNAL + 1, 2.5):
        with pytest.raises(InputError, match="num_assistant_tokens"):
            model.generate(draw_ids(model, 1, 5), **GREEDY, use_mtp=True, num_assistant_tokens=bad)


def test_padded_row_and_continued_cache() -> None:
    model = with_head(**BIASED)
    ids = draw_ids(model, 1, 9)
    expected = model.generate(ids, **GREEDY)
    width = torch.nn.functional.pad(ids, (3, 0)), torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    padded = model.generate(width[0], attention_mask=width[1], **GREEDY, use_mtp=True)
    assert torch.equal(padded[:, 3:], expected)

    first = model.generate(ids, **{**GREEDY, "max_new_tokens": 5}, use_mtp=True, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 13
    rest = {**GREEDY, "max_new_tokens": 15, "use_mtp": True}
    for ids_given in (first.sequences, first.sequences[:, 13:]):
        for mask in (None, torch.ones(1, 14, dtype=torch.long)):
            cache = copy.deepcopy(first.past_key_values)
            second = model.generate(ids_given, attention_mask=mask, past_key_values=cache, **rest)
            assert torch.equal(second[:, -15:], expected[:, -15:])
    behind_padding = model.generate(
        width[0], attention_mask=width[1], **{**GREEDY, "max_new_tokens": 5}, return_dict_in_generate=True
    )
    whole = torch.nn.functional.pad(width[1], (0, 5), value=1)
    third = model.generate(
        behind_padding.sequences[:, -1:], attention_mask=whole, past_key_values=behind_padding.past_key_values, **rest
    )
    assert torch.equal(third[:, -15:], expected[:, -15:])

    mask = torch.tensor([[1] * 13 + [0, 1]])
    with pytest.raises(UnsupportedError, match="without padding"):
        model.generate(ids_given.repeat(1, 2), past_key_values=cache, attention_mask=mask, **rest)


def test_penalties_stops_scores_and_streams() -> None:
    model = with_head(vocab_size=11)
    ids = draw_ids(model, 1, 6)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}
    options |= {
        "output_scores": True,
        "output_hidden_states": True,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
    }
    plain = model.generate(ids, **options, eos_token_id=None)
    drafted = model.generate(ids, **options, eos_token_id=None, use_mtp=True)
    assert torch.equal(drafted.sequences, plain.sequences)
    for ours, theirs in zip(drafted.scores, plain.scores, strict=True):
        assert_close(ours.exp(), theirs.exp())  # forbidden tokens have -inf
    assert len(drafted.hidden_states[0]) == len(plain.hidden_states[0]) == model.config.num_hidden_layers + 1
    eos = int(plain.sequences[0, 16])
    assert torch.equal(
        model.generate(ids, **options, eos_token_id=eos, use_mtp=True).sequences,
        model.generate(ids, **options, eos_token_id=eos).sequences,
    )


def test_processors_choose_the_drafts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, forbidden, drafts = with_head(vocab_size=11), [0, 1, 2, 3, 4, 5, 6], []
    plain = MTPCandidateGenerator.get_candidates

    def spied(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        candidates, scores = plain(self, input_ids, *args, **kwargs)
        drafts.extend(candidates[0, input_ids.shape[1] :].tolist())
        return candidates, scores

    monkeypatch.setattr(MTPCandidateGenerator, "get_candidates", spied)
    ids = draw_ids(model, 1, 6)
    model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, use_mtp=True, suppress_tokens=forbidden)
    assert drafts
    assert not set(drafts) & set(forbidden)


def test_streamed_in_pieces() -> None:
    class Tokens:
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, value: Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ids.append(-1)

    model, stream = with_head(), Tokens()
    result = model.generate(draw_ids(model, 1, 4), **GREEDY, use_mtp=True, streamer=stream)
    assert stream.ids == [*result[0].tolist(), -1]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_distribution_is_the_models(temperature: float) -> None:
    """1500 texts over 5 words: frequencies of the pair behind the first token against the model's own probabilities."""
    model = with_head(vocab_size=5, hybrid_override_pattern="M*")
    ids, runs, counts = torch.tensor([[1, 3]]), 1500, torch.zeros(5, 5)
    torch.manual_seed(0)
    for _ in range(runs):
        text = model.generate(
            ids, max_new_tokens=3, do_sample=True, temperature=temperature, top_k=0, eos_token_id=None, use_mtp=True,
            num_assistant_tokens=2,
        )[0]  # fmt: skip
        counts[text[3], text[4]] += 1
    with torch.no_grad():
        texts = torch.cartesian_prod(torch.arange(5), torch.arange(5), torch.arange(5))
        logits = model(torch.cat([ids.expand(125, -1), texts], dim=1)).logits[:, 1:4] / temperature
        chosen = logits.log_softmax(-1).gather(-1, texts[..., None])[..., 0].sum(-1).exp()
    expected = chosen.view(5, 5, 5).sum(0) * runs
    assert float(((counts - expected) ** 2 / expected).sum()) < 60  # 24 degrees of freedom: 99.99 % lie below 56


def test_refusals() -> None:
    plain, model = tiny_model(), with_head()
    with pytest.raises(UnsupportedError, match="num_nextn_predict_layers=0"):
        plain.generate(draw_ids(plain, 1, 4), **GREEDY, use_mtp=True)
    embeds = model.model.embeddings(draw_ids(model, 1, 4))
    with pytest.raises(UnsupportedError, match="input_ids"):
        model.generate(inputs_embeds=embeds, **GREEDY, use_mtp=True)
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(draw_ids(model, 2, 4), **GREEDY, use_mtp=True)
    assert torch.equal(
        model.generate(draw_ids(model, 1, 4), **GREEDY, use_mtp=True, prompt_lookup_num_tokens=2),
        model.generate(draw_ids(model, 1, 4), **GREEDY),
    )
