"""Adapters in `LLM` and on the command line: chosen per request, side by side or merged, and none means none."""

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_cases import adapted, build, draw_adapter, logits, plain_model, saved

from helpers import assert_close
from nemotron_h import (
    LLM,
    CheckpointError,
    InputError,
    ModelNotFoundError,
    NemotronHForCausalLM,
    SamplingParams,
    UnsupportedError,
    cli,
    demo_model,
    load_adapter,
    peft_compat,
)
from nemotron_h.cli import _options

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
KINDS: dict[str, dict[str, Any]] = {"a": {}, "b": {"r": 2, "use_dora": True}, "c": {"lora_dropout": 0.5}}


def greedy(adapter: str | None = None, **more: Any) -> SamplingParams:
    settings = {"max_tokens": 8, "temperature": 0, "logprobs": 5, "prompt_logprobs": 2, "ignore_eos": True} | more
    return SamplingParams(adapter=adapter, **settings)


def answer(llm: LLM, params: SamplingParams) -> Any:
    (result,) = llm.generate(PROMPT, params)
    return result.outputs, result.prompt_logprobs


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("adapters"), {}
    for seed, (name, settings) in enumerate(KINDS.items()):
        targets = {"target_modules": ["in_proj", "out_proj", "q_proj", "lm_head"]} if name == "c" else None
        found[name] = saved(adapted(build(), seed, targets, **settings), root / name)
    return found


@pytest.fixture(scope="module")
def alone(paths: dict[str, Path]) -> dict[str | None, LLM]:
    """An engine for each adapter, on a model that has no other, and one without."""
    wrapped = {name: load_adapter(build(), path).get_base_model() for name, path in paths.items()}
    return {None: LLM(build())} | {name: LLM(model) for name, model in wrapped.items()}


@pytest.fixture(scope="module")
def llm(paths: dict[str, Path]) -> LLM:
    return LLM(build(), adapters=dict(paths))


def test_each_request_has_its_adapter_to_the_bit(llm: LLM, alone: dict[str | None, LLM]) -> None:
    assert llm.adapters == ("a", "b", "c")
    names = [None, "a", "b", "c", None, "c", "a", None]
    results = llm.generate([PROMPT] * len(names), [greedy(name) for name in names])
    for name, result in zip(names, results, strict=True):
        assert (result.outputs, result.prompt_logprobs) == answer(alone[name], greedy())
    distinct = {json.dumps(r.prompt_logprobs[-1]) for r in results if r.prompt_logprobs}
    assert len(distinct) == 4


def test_none_is_the_model_without_adapters_also_when_sampling(llm: LLM, alone: dict[str | None, LLM]) -> None:
    params = {"temperature": 1.0, "seed": 5, "n": 3}
    assert answer(llm, greedy("b", **params)) == answer(alone["b"], greedy(**params))
    assert answer(llm, greedy(**params)) == answer(alone[None], greedy(**params))
    assert llm.score(PROMPT) == alone[None].score(PROMPT)


def test_streams_may_be_read_in_turns(llm: LLM, alone: dict[str | None, LLM]) -> None:
    names = ["a", None, "b"]
    streams = [llm.stream(PROMPT, greedy(name)) for name in names]
    events = list(zip(*streams, strict=True))
    for index, name in enumerate(names):
        assert [step[index] for step in events] == list(alone[name].stream(PROMPT, greedy()))


def test_threads_do_not_get_each_others_adapter(llm: LLM, alone: dict[str | None, LLM]) -> None:
    names = [None, "a", "b", "c"]
    found: dict[str | None, list[Any]] = {name: [] for name in names}

    def work(name: str | None) -> None:
        found[name].extend(answer(llm, greedy(name)) for _ in range(4))

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert found[name] == [answer(alone[name], greedy())] * 4


def test_nothing_is_trained_and_grad_mode_is_the_callers(paths: dict[str, Path]) -> None:
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    llm = LLM(model.train(), adapters={"c": paths["c"]})
    answer(llm, greedy("c"))
    assert torch.is_grad_enabled()
    assert not any(module.training for module in llm.model.modules())
    assert not any(p.requires_grad for p in llm.model.parameters())
    kept = {name.replace(".base_layer", ""): t for name, t in llm.model.state_dict().items() if ".lora_" not in name}
    assert kept.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.items())


def test_wrong_names(llm: LLM, alone: dict[str | None, LLM], paths: dict[str, Path]) -> None:
    steps = llm.stats()["steps"]
    for call in (llm.generate, llm.stream):
        with pytest.raises(InputError, match="'nobody': this LLM has a, b, c"):
            call(PROMPT, greedy("nobody"))
    with pytest.raises(InputError, match="nobody"):
        llm.generate([PROMPT, PROMPT], [greedy("a"), greedy("nobody")])
    assert llm.stats()["steps"] == steps
    with pytest.raises(InputError, match="no adapters"):
        alone[None].generate(PROMPT, greedy("a"))
    with pytest.raises(InputError, match="a text or None"):
        SamplingParams(adapter=3)  # type: ignore[arg-type]
    wrong: list[Any] = [{1: paths["a"]}, {"a": 1}, {"x.y": paths["a"]}, {"": paths["a"]}]
    for adapters in wrong:
        with pytest.raises(InputError, match=r"adapter"):
            LLM(build(), adapters=adapters)
    assert LLM(build(), adapters={}).adapters == ()


def test_an_adapter_that_cannot_be_there_leaves_the_model_as_it_was(paths: dict[str, Path], tmp_path: Path) -> None:
    model = build()
    modules, base = [type(m) for m in model.modules()], logits(model)
    source = adapted(build(mlp_bias=True), targets={"target_modules": ["up_proj"]}, bias="all")
    with_bias = saved(source, tmp_path / "b")
    for path, error in {tmp_path / "none": ModelNotFoundError, tmp_path: CheckpointError}.items():
        with pytest.raises(error):
            LLM(model, adapters={"a": paths["a"], "x": path})
        assert [type(m) for m in model.modules()] == modules
        assert torch.equal(logits(model), base)
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(UnsupportedError, match="merge_and_unload"):
        LLM(build(mlp_bias=True), adapters={"x": with_bias})
    assert LLM(model, adapters={"a": paths["a"]}).adapters == ("a",)


# Merged


@pytest.mark.parametrize("name", KINDS)
def test_a_merged_adapter_is_in_every_answer(name: str, paths: dict[str, Path], alone: dict[str | None, LLM]) -> None:
    llm = LLM(build(), adapters=dict(paths))
    answer(llm, greedy("a"))
    llm.merge_adapter(name)
    assert llm.adapters == ()
    assert type(llm.model) is NemotronHForCausalLM
    assert [type(m) for m in llm.model.modules()] == [type(m) for m in build().modules()]
    assert_close(logits(llm.model), logits(alone[name].model), name)
    assert llm.generate(PROMPT, greedy())[0].token_ids == answer(alone[name], greedy())[0][0].token_ids
    with pytest.raises(InputError, match="no adapters"):
        llm.generate(PROMPT, greedy(name))
    with pytest.raises(InputError, match="no adapters"):
        llm.merge_adapter(name)


def test_an_unknown_adapter_is_not_merged(llm: LLM) -> None:
    with pytest.raises(InputError, match="a, b, c"):
        llm.merge_adapter("nobody")
    assert llm.adapters == ("a", "b", "c")


@pytest.mark.parametrize("head", [True, False])
def test_merging_into_a_tied_head_leaves_the_embeddings_alone(head: bool, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True, "num_nextn_predict_layers": 0}
    targets = {"target_modules": ["in_proj", "lm_head"] if head else ["in_proj"]}
    source = adapted(build(**tied), targets=targets)
    expected = logits(source)
    llm = LLM(build(**tied), adapters={"a": saved(source, tmp_path / "a")})
    llm.merge_adapter("a")
    assert llm.config.tie_word_embeddings is not head
    assert_close(logits(llm.model), expected)
    assert torch.equal(llm.model.model.embeddings.weight, build(**tied).model.embeddings.weight)
    llm.model.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(NemotronHForCausalLM.from_pretrained(tmp_path / "merged")), logits(llm.model))


# The shipped model and the command line


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes what the shipped model writes."""
    model = NemotronHForCausalLM.from_pretrained(demo_model())
    with peft_compat(model):
        source = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, target_modules=["in_proj", "out_proj"]))
    draw_adapter(source)
    return saved(source, tmp_path_factory.mktemp("shipped"))


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_generate_with_an_adapter(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["Once upon a time", "--max-tokens", 12, "--temperature", 0]
    plain = run(capsys, "generate", *options)
    status, text, _ = run(capsys, "generate", *options, "--adapter", shipped)
    llm = LLM(demo_model(), adapters={"a": shipped})
    params = SamplingParams(max_tokens=12, temperature=0, adapter="a")
    assert (status, text) == (0, llm.generate("Once upon a time", params)[0].text + "\n")
    assert plain[1] != text
    merged = run(capsys, "generate", *options, "--adapter", shipped, "--merge-adapter")
    llm.merge_adapter("a")
    expected = llm.generate("Once upon a time", SamplingParams(max_tokens=12, temperature=0))[0].text + "\n"
    assert merged[:2] == (0, expected)
    assert merged[1] != plain[1]


def test_chat_with_an_adapter(shipped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    seen = []
    stream = LLM.stream

    def recorded(self: LLM, prompt: Any, params: Any = None) -> Any:
        seen.append((self.adapters, params.adapter))
        return stream(self, prompt, params)

    monkeypatch.setattr(LLM, "stream", recorded)
    monkeypatch.setattr("nemotron_h.cli.chat._lines", lambda interactive: iter(["Hi", "/set adapter=None", "Hi"]))
    options = ["--adapter", shipped, "--max-tokens", 6, "--temperature", 0, "--json"]
    status, out, _ = run(capsys, "chat", *options)
    assert status == 0
    assert seen == [(("adapter",), "adapter"), (("adapter",), None)]
    answers = [m["content"] for m in json.loads(out)["messages"] if m["role"] == "assistant"]
    assert len(answers) == 2
    seen.clear()
    assert run(capsys, "chat", *options, "--merge-adapter")[0] == 0
    assert seen == [((), None), ((), None)]


def test_wrong_use_of_the_options(shipped: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in (["generate", "a"], ["chat"]):
        status, _, err = run(capsys, *command, "--merge-adapter")
        assert status == 2
        assert "give --adapter PATH" in err
        status, _, err = run(capsys, *command, "--adapter", tmp_path / "nowhere")
        assert status == 2
        assert "no such directory" in err
    assert _options.adapter_name("x", True) is None
    assert _options.adapter_name(None, False) is None


def test_an_adapter_of_the_shipped_model_is_exact(shipped: Path) -> None:
    side, plain = LLM(demo_model(), adapters={"a": shipped}), LLM(demo_model())
    params = greedy(max_tokens=4)
    assert answer(side, params) == answer(plain, params)
    source = load_adapter(copy.deepcopy(plain.model), shipped)
    (bare,), (written,) = answer(LLM(source.get_base_model()), params)[0], answer(side, greedy("a", max_tokens=4))[0]
    assert (bare.token_ids, bare.logprobs) == (written.token_ids, written.logprobs)
    wide = load_adapter(NemotronHForCausalLM.from_pretrained(demo_model(), dtype="float32"), shipped)
    assert_close(logits(wide), logits(plain_model(wide)))
