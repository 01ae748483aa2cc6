"""lm-eval with our model in its HFLM, and with our LLM as a model of its own: the same answers."""

import math
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import fresh
from nemotron_h import LLM, InputError, MissingDependencyError, UnsupportedError, demo_model
from nemotron_h.evaluation.harness import NemotronHLM
from nemotron_h.evaluation.tasks import run_tasks

TASKS = Path(__file__).parent.parent / "data" / "tasks"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(demo_model(), dtype=torch.float32)


@pytest.fixture(scope="module")
def ours(llm: LLM) -> NemotronHLM:
    return NemotronHLM(llm)


@pytest.fixture(scope="module")
def theirs(llm: LLM) -> HFLM:
    return HFLM(pretrained=llm.model, tokenizer=llm.tokenizer, batch_size=2)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


PAIRS = [
    ("The weather was", " good"), ("The weather was", " a very long answer"), ("", "Elizabeth"), ("A horse is ", "a"),
    ("The weather was", " not at all fine"), ("The weather was", " good"), ("word " * 30, "and the end"),
]  # fmt: skip


def test_loglikelihoods(ours: NemotronHLM, theirs: HFLM) -> None:
    asked = requests("loglikelihood", PAIRS)
    found, expected = ours.loglikelihood(asked, disable_tqdm=True), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    for (mine, _), (yours, _) in zip(found, expected, strict=True):
        assert mine == pytest.approx(yours, abs=2e-4 * max(1, abs(yours)))
    best = ours.llm.generate("The weather was", lm_greedy(3))[0].text
    assert ours.loglikelihood(requests("loglikelihood", [("The weather was", best)]), disable_tqdm=True)[0][1] is True


def lm_greedy(tokens: int) -> Any:
    from nemotron_h import SamplingParams

    return SamplingParams(max_tokens=tokens, temperature=0)


def test_rolling(ours: NemotronHLM, theirs: HFLM, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [("It is a truth universally acknowledged that a man " * 4,), ("Short.",)]
    asked = requests("loglikelihood_rolling", texts)
    for length in (2048, 20):  # in one window, and in several
        monkeypatch.setattr(ours.llm, "max_model_len", length)
        monkeypatch.setattr(theirs, "_max_length", length)
        expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
        found = ours.loglikelihood_rolling(asked, disable_tqdm=True)
        assert found == pytest.approx(expected, rel=2e-4)


def test_texts(ours: NemotronHLM, theirs: HFLM) -> None:
    asked = requests(
        "generate_until",
        [
            ("The weather was", {"until": ["\n"], "max_gen_toks": 10}),
            ("Elizabeth was", {"until": [" the", "."], "max_gen_toks": 20, "do_sample": False}),
            ("A horse is", {"until": "\n", "max_gen_toks": 5, "temperature": 0.0}),
        ],
    )
    found = ours.generate_until(asked, disable_tqdm=True)
    assert found == theirs.generate_until(asked, disable_tqdm=True)
    assert all(found)
    with pytest.raises(UnsupportedError, match="max_gen_toks"):
        ours.generate_until(requests("generate_until", [("a", {"max_gen_toks": 10**7})]), disable_tqdm=True)


def test_sampled_texts_follow_the_seed(ours: NemotronHLM) -> None:
    def write(**options: Any) -> str:
        options = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0, **options}
        return ours.generate_until(requests("generate_until", [("The", options)]), disable_tqdm=True)[0]

    assert write(seed=1) == write(seed=1) != write(seed=2)


def test_a_shared_context_is_read_once(ours: NemotronHLM) -> None:
    widths: list[int] = []
    handle = ours.llm.model.model.register_forward_hook(lambda *args: widths.append(args[2][0].shape[1]))
    text = "The weather in the morning was, as it often is in the country,"
    asked = [(text, " good"), (text, " a very long answer"), (text, " bad")]
    ours.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    handle.remove()
    assert widths[0] == len(ours.tok_encode(text))
    assert max(widths[1:]) < 6


@pytest.mark.parametrize("task", ["choices", "writing", "rolling"])
def test_tasks(llm: LLM, theirs: HFLM, task: str) -> None:
    found = run_tasks(llm, [str(TASKS / f"{task}.yaml")])
    config = TaskManager(include_path=str(TASKS), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(TASKS)
        expected = lm_eval.simple_evaluate(
            model=theirs, tasks=[f"small_{task}"], task_manager=config, log_samples=False
        )["results"][f"small_{task}"]
    assert found
    for score in found:
        assert score.samples == 5
        assert score.value == pytest.approx(expected[f"{score.metric},none"], rel=2e-4)
        assert math.isfinite(score.value)
    if task == "choices":
        assert all(score.stderr is not None for score in found)
    assert {score.samples for score in run_tasks(llm, [str(TASKS / f"{task}.yaml")], limit=2)} == {2}


def test_the_chat_template(ours: NemotronHLM) -> None:
    text = ours.apply_chat_template([{"role": "user", "content": "What is a horse?"}])
    assert "What is a horse?" in text
    assert text.rstrip().endswith("assistant")
    assert ours.tokenizer_name


def test_by_name() -> None:
    model = get_model("nemotron_h").create_from_arg_obj({"llm": str(demo_model()), "batch_size": 1})
    assert isinstance(model, NemotronHLM)


def code(tmp_path: Path, line: str) -> Path:
    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\ndef f(doc): return 1\n")
    text = (TASKS / "choices.yaml").read_text().replace("documents.jsonl", str(TASKS / "documents.jsonl"))
    file = tmp_path / "task.yaml"
    file.write_text(text.replace('doc_to_text: "{{question}}"', line.format(mark=mark)))
    return file


TEMPLATE = "doc_to_text: \"{{{{cycler.__init__.__globals__.os.popen('touch {mark}').read()}}}}\""


@pytest.mark.parametrize("line", ["doc_to_text: !function evil.f", "include: other.yaml", TEMPLATE])
def test_code_in_a_task_file_never_runs(llm: LLM, tmp_path: Path, line: str) -> None:
    file = code(tmp_path, line)
    (tmp_path / "other.yaml").write_text("doc_to_text: !function evil.f")
    with pytest.raises(Exception, match=r"trust-task-code|unsafe|access to attribute") as caught:
        run_tasks(llm, [str(file)])
    assert not (tmp_path / "ran").exists()
    if line is not TEMPLATE:
        assert isinstance(caught.value, UnsupportedError)


def test_trusted_code_runs(llm: LLM, tmp_path: Path) -> None:
    file = code(tmp_path, "doc_to_text: !function evil.f\ndoc_to_decontamination_query: x")
    run_tasks(llm, [str(file)], limit=1, trust_code=True)
    assert (tmp_path / "ran").exists()


def test_what_is_no_task(llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    for text in (None, "- a list", "a: [", "no_task: 1"):
        if text is not None:
            file.write_text(text)
        with pytest.raises(InputError, match=r"task\.yaml"):
            run_tasks(llm, [str(file)])
    with pytest.raises(InputError, match="no task that lm-eval"):
        run_tasks(llm, ["no_such_task"])


def test_without_lm_eval() -> None:
    script = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from nemotron_h import LLM, MissingDependencyError, demo_model\n"
        "from nemotron_h.evaluation import score_text\n"
        "from nemotron_h.evaluation.tasks import run_tasks\n"
        "llm = LLM(demo_model()); assert score_text(llm, 'A horse.').tokens > 1\n"
        "try: run_tasks(llm, ['x'])\n"
        "except MissingDependencyError as error: print(error)\n"
    )
    done = fresh.python(script)
    assert "pip install 'nemotron-h[eval]'" in done.stdout, done.stderr
    assert issubclass(MissingDependencyError, ImportError)
