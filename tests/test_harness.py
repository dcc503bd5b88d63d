"""lm-evaluation-harness offline, on local tasks and tiny models: with thoughts, and without them as lm-eval's own model."""

import json
import math
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml


pytest.importorskip("lm_eval", reason="needs `pip install trl-quietstar[eval]`")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.cli import main
from trl_quietstar.evaluation.harness import Outcome, QuietStarLM, _tasks, evaluate_tasks, paired_test, ratio_error
from trl_quietstar.thinking.likelihood import log_likelihoods
from trl_quietstar.thinking.when import Thinking

from .tiny import byte_tokenizer
from .training import saved_model


EXAMPLES = Path(__file__).parent.parent / "examples"
DOCUMENTS = [
    {"question": f"{a} plus {b} is", "right": str(a + b), "wrong": str(a + b + 3)}
    for a, b in zip(range(8), range(3, 11), strict=True)
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> str:
    """A folder with a multiple-choice task, a generation task and a perplexity task, their documents, and the tasks of the
    repository; one for all tests, since lm-eval takes seconds to read its own beside it."""
    folder = tmp_path_factory.mktemp("tasks")
    shutil.copytree(EXAMPLES / "tasks", folder, dirs_exist_ok=True)
    data = folder / "documents.jsonl"
    data.write_text("\n".join(json.dumps(document) for document in DOCUMENTS))
    common = dict(dataset_path="json", dataset_kwargs={"data_files": {"test": str(data)}}, test_split="test")
    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    match = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    choice = dict(
        task="choose_sum",
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{[right, wrong]}}",
        doc_to_target=0,
        metric_list=[accuracy],
    )
    writing = dict(
        task="write_sum",
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target=" {{right}}",
        generation_kwargs={"until": ["."], "max_gen_toks": 4},
        metric_list=[match],
    )
    rolling = dict(
        task="read_sum",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{question}} {{right}} .",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    for task in (choice, writing, rolling):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return str(folder)


def saved_thinker(folder: Path, **changes) -> str:
    """A saved thinking model whose thoughts change what it says."""
    model = QuietStarForCausalLM.from_pretrained(saved_model(folder / "plain", **changes), QuietStarSettings(3))
    with torch.no_grad():
        model.quietstar.mixing_head.bias.fill_(1)
    model.save_pretrained(folder / "thinker")
    byte_tokenizer().save_pretrained(folder / "thinker")
    return str(folder / "thinker")


@pytest.fixture
def thinker(tmp_path) -> str:
    """A saved thinking model of few positions."""
    return saved_thinker(tmp_path)


NAMES = ["choose_sum", "write_sum", "read_sum"]


def values(outcomes: list[Outcome]) -> dict:
    """By task and metric."""
    return {(outcome.task, outcome.metric): outcome.value for outcome in outcomes}


def test_without_thoughts_it_is_lm_evals_own_model(thinker, tasks):
    """Every task's numbers are those of stock `HFLM` on the plain base."""
    ours = values(evaluate_tasks(QuietStarLM(thinker, think="never"), NAMES, tasks))
    plain = HFLM(AutoModelForCausalLM.from_pretrained(thinker), tokenizer=AutoTokenizer.from_pretrained(thinker))
    theirs = simple_evaluate(plain, tasks=NAMES, task_manager=_tasks(tasks), bootstrap_iters=0)
    for (task, metric), value in ours.items():
        assert value == pytest.approx(theirs["results"][task][f"{metric},none"], rel=1e-6), task
    assert {task for task, _ in ours} == set(NAMES)


@pytest.mark.parametrize(("batch_size", "every"), [(1, 2), (3, 1)])
def test_tasks_are_scored_and_written_with_thoughts(batch_size, every, thinker, tasks):
    """As one computes by hand with `log_likelihoods` and `generate`, in batches or one by one."""
    lm = QuietStarLM(thinker, think_every=every, batch_size=batch_size)
    found = {outcome.task: outcome for outcome in evaluate_tasks(lm, NAMES, tasks)}
    model, tokenizer = QuietStarForCausalLM.from_pretrained(thinker).eval(), byte_tokenizer()
    thinking, bits, size = Thinking("always", every), 0.0, 0
    for index, document in enumerate(DOCUMENTS):
        context = tokenizer(document["question"])["input_ids"]
        totals = []
        for choice in (document["right"], document["wrong"]):
            ids = torch.tensor([tokenizer(f"{document['question']} {choice}")["input_ids"]])
            wanted = (torch.arange(ids.shape[1]) >= len(context)).long()[None]
            totals.append(float(log_likelihoods(model, ids, None, wanted, thinking)[0].sum()))
        assert found["choose_sum"].samples[index] == float(totals[0] > totals[1])
        out = model.generate(
            torch.tensor([context]), max_new_tokens=4, do_sample=False, think_every=every, pad_token_id=0
        )
        said = tokenizer.decode(out[0, len(context) :]).split(".")[0]
        assert found["write_sum"].samples[index] == float(said == f" {document['right']}")
        text = f"{document['question']} {document['right']} ."
        ids = torch.tensor([[lm.prefix_token_id, *tokenizer(text)["input_ids"]]])
        bits -= float(log_likelihoods(model, ids, thinking=thinking)[0].sum()) / math.log(2)
        size += len(text.encode())
    assert found["read_sum"].value == pytest.approx(bits / size, rel=1e-4)
    plain = values(evaluate_tasks(QuietStarLM(thinker, think="never"), ["read_sum"], tasks))
    assert abs(plain["read_sum", "bits_per_byte"] - found["read_sum"].value) > 1e-3


def test_compare_prints_both_with_errors_and_a_paired_test(thinker, tasks, tmp_path, capsys):
    """From the command line; the file holds what the table shows."""
    output = tmp_path / "outcomes.json"
    flags = [
        "--model",
        thinker,
        "--tasks",
        "choose_sum,write_sum",
        "--include_path",
        tasks,
        "--limit",
        "5",
        "--compare",
    ]
    assert main(["eval", *flags, "--output_file", str(output)]) == 0
    printed = capsys.readouterr().out
    outcomes = json.loads(output.read_text())
    assert (
        [x["task"] for x in outcomes["with"]]
        == [x["task"] for x in outcomes["without"]]
        == ["choose_sum", "write_sum"]
    )
    for with_thoughts, without, p in zip(*outcomes.values(), strict=True):
        assert len(with_thoughts["samples"]) == 5 and 0 < p <= 1
        for outcome in (with_thoughts, without):
            assert f"{outcome['value']:.4f} ± {outcome['stderr']:.4f}" in printed
        assert f"{p:.3f}" in printed


def test_thinking_alone_prints_one_column(thinker, tasks, capsys):
    """Without `--compare`, once."""
    main(["eval", "--model", thinker, "--tasks", "choose_sum", "--include_path", tasks, "--limit", "3"])
    printed = capsys.readouterr().out
    assert "value" in printed and "without" not in printed


def outcome(samples: list[float]) -> Outcome:
    """Of documents in order."""
    return Outcome("task", "acc", sum(samples) / max(len(samples), 1), 0.1, dict(enumerate(samples)))


def test_the_paired_test_is_mcnemars():
    """Exact binomial p-values, within the noise of the flips; symmetric; 1 where nothing differs."""
    for wins, losses in ((8, 1), (5, 5), (12, 3), (3, 0)):
        first, second = (
            outcome([1.0] * wins + [0.0] * losses + [1.0] * 9),
            outcome([0.0] * wins + [1.0] * losses + [1.0] * 9),
        )
        n = wins + losses
        tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
        assert paired_test(first, second) == pytest.approx(min(1, 2 * tail), abs=0.02)
        assert paired_test(second, first) == paired_test(first, second)
    assert paired_test(outcome([1.0, 0.0]), outcome([1.0, 0.0])) == 1
    assert math.isnan(paired_test(outcome([]), outcome([])))


def test_what_is_missing_is_named(thinker, tasks):
    """An unknown task, no model, an unknown way to think."""
    for name in ("--model", "--model_name_or_path"):
        with pytest.raises(ValueError, match="knows no task no_such_task.*--include_path"):
            main(["eval", name, thinker, "--tasks=choose_sum,no_such_task", "--include_path", tasks])
    with pytest.raises(ValueError, match="`model` is missing; give `--model`"):
        main(["eval", "--tasks", "choose_sum"])
    with pytest.raises(ValueError, match="`think` is 'hard'"):
        main(["eval", "--model", thinker, "--tasks", "choose_sum", "--think", "hard"])


def test_code_from_the_hub_is_not_run(thinker, tasks):
    """`trust_remote_code` is off unless it is given."""
    marker = Path(thinker) / "ran"
    (Path(thinker) / "custom_generate/generate.py").write_text(f"open({str(marker)!r}, 'w')\ndef generate(**k): ...\n")
    main(["eval", "--model", thinker, "--tasks", "write_sum", "--include_path", tasks, "--limit", "1"])
    assert not marker.exists()


def test_likelihoods_per_byte_have_errors_and_are_compared(thinker, tasks, capsys, tmp_path):
    """Rolling tasks, to whose metrics lm-eval gives no error: the paired test is of each document's log-likelihood."""
    output = tmp_path / "outcomes.json"
    main(
        [
            "eval",
            "--model",
            thinker,
            "--tasks",
            "read_sum",
            "--include_path",
            tasks,
            "--compare",
            "--output_file",
            str(output),
        ]
    )
    found = json.loads(output.read_text())
    with_thoughts, without, p = found["with"][0], found["without"][0], found["p"][0]
    assert len(with_thoughts["samples"]) == len(DOCUMENTS) and 0 < p < 1
    assert (
        with_thoughts["stderr"] > 0 and f"{without['value']:.4f} ± {without['stderr']:.4f}" in capsys.readouterr().out
    )


@pytest.mark.parametrize("metric", ["bits_per_byte", "byte_perplexity"])
def test_the_error_of_a_ratio_is_that_of_its_repetitions(metric):
    """Over many draws of the documents, the metric spreads by as much as one draw's error says."""
    rng = np.random.default_rng(0)

    def value(pairs):
        ratio = -pairs[:, 0].sum() / pairs[:, 1].sum()
        return ratio / math.log(2) if metric == "bits_per_byte" else math.exp(ratio)

    def draw():
        size = rng.integers(20, 200, 100).astype(float)
        return np.stack([-size * rng.normal(0.8, 0.2, 100), size], axis=1)

    samples = [draw() for _ in range(400)]
    spread = np.std([value(pairs) for pairs in samples])
    assert np.mean([ratio_error(metric, pairs) for pairs in samples]) == pytest.approx(spread, rel=0.1)
    assert math.isnan(ratio_error(metric, samples[0][:1]))


# The tasks in the repository

PREPARED = {
    "chain_sum": [
        {"question": f"{a} + {a + 4} =", "choices": [str(2 * a), str(2 * a + 4), str(2 * a + 5)], "label": 1}
        for a in range(12)
    ],
    "gsm8k": [
        {
            "question": f"Ann has {a} pens and buys {a}. How many?",
            "answer": f"{a}+{a}=<<{a}+{a}={2 * a}>>\n#### {2 * a}",
        }
        for a in range(12)
    ],
}
PREPARED["gsm_symbolic"] = PREPARED["gsm8k"]
SHIPPED = ("chain_sum", "chain_sum_choice", "gsm_symbolic_solution", "gsm8k_solution", "gsm8k_written")


@pytest.fixture
def prepared(tasks, tmp_path, monkeypatch) -> str:
    """A working directory with documents as `prepare_tasks.py` writes them; the folder of the tasks."""
    for name, documents in PREPARED.items():
        folder = tmp_path / ".demo/tasks" / name
        folder.mkdir(parents=True)
        for split, part in (("train", documents[:8]), ("test", documents[8:])):
            (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(document) for document in part))
    monkeypatch.chdir(tmp_path)
    return tasks


def test_every_task_in_the_repository_is_compared(prepared, tmp_path, capsys):
    """One command for all of them; each metric has an error and a paired test, and fits into the terminal."""
    model = saved_thinker(tmp_path, max_position_embeddings=2048)
    flags = [
        "--tasks",
        ",".join(SHIPPED),
        "--include_path",
        prepared,
        "--limit",
        "2",
        "--batch_size",
        "2",
        "--compare",
    ]
    main(["eval", "--model", model, *flags, "--output_file", "outcomes.json"])
    found = json.loads(Path("outcomes.json").read_text())
    assert {outcome["task"] for outcome in found["with"]} == set(SHIPPED)
    for outcome, p in zip(found["with"], found["p"], strict=True):
        assert len(outcome["samples"]) == 2 and outcome["stderr"] >= 0 and 0 < p <= 1, outcome["metric"]
    printed = capsys.readouterr().out
    for name in (*SHIPPED, "exact_match (last number)", "bits_per_byte"):
        assert name in printed
    assert max(map(len, printed.splitlines())) <= 80 and "…" not in printed


class Parrot(QuietStarLM):
    """Says what it is told to, and remembers what it was asked."""

    said, asked = "", []

    def generate_until(self, requests, disable_tqdm: bool = False):
        self.asked = [request.args for request in requests]
        return [self.said for _ in requests]


@pytest.mark.parametrize(
    "task, said, metric",
    [
        ("chain_sum", " 20", "exact_match (number)"),
        ("chain_sum", "20 and more", "exact_match (number)"),
        ("gsm8k_written", " 8+8=16\n#### 16", "exact_match (after ####)"),
        ("gsm8k_written", " 8 and 8 are 16.", "exact_match (last number)"),
    ],
)
def test_right_answers_are_recognised(task, said, metric, prepared, tmp_path):
    """The first document's answer in a model's words is right; prompts hold examples, and texts end where they should."""
    model = Parrot(saved_thinker(tmp_path, max_position_embeddings=2048), think="never")
    model.said = said
    found = {outcome.metric: outcome for outcome in evaluate_tasks(model, [task], prepared, limit=2)}
    assert found[metric].samples == {0: 1.0, 1: 0.0}
    (prompt, options), *_ = model.asked
    examples = {
        "chain_sum": "0 + 4 = 4\n\n1 + 5 = 6\n\n2 + 6 = 8\n\n8 + 12 =",
        "gsm8k_written": "#### 2\n\nQuestion: Ann has 8",
    }
    assert examples[task] in prompt and "  " not in prompt
    assert set(options["until"]) >= {"chain_sum": {"\n"}, "gsm8k_written": {"Question:", "\n\n"}}[task]


def test_documents_are_prepared(tmp_path, monkeypatch, capsys):
    """Sums are right and their choices differ; what is not there is skipped with the reason."""
    pytest.importorskip("reasoning_gym", reason="needs `pip install trl-quietstar[demo]`")
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(map(json.dumps, PREPARED["gsm8k"])))
    flags = [str(tmp_path / "documents"), "--size", "4"]
    for more in ([], ["--gsm8k", "nowhere.jsonl"], ["--gsm8k", str(problems)]):
        monkeypatch.setattr("sys.argv", ["prepare_tasks.py", *flags, *more])
        runpy.run_path(str(EXAMPLES / "prepare_tasks.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "no --gsm8k was given" in printed and "there is no file nowhere.jsonl" in printed
    for name, fields in PREPARED.items():
        lines = (tmp_path / "documents" / name / "test.jsonl").read_text().splitlines()
        documents = [json.loads(line) for line in lines]
        assert len(documents) == 4 and all(document.keys() == fields[0].keys() for document in documents)
        for document in documents:
            if name == "chain_sum":
                assert int(document["choices"][document["label"]]) == eval(document["question"].rstrip("="))
                assert len(set(document["choices"])) == 4
            else:
                assert "####" in document["answer"] and "final answer" not in document["question"]
