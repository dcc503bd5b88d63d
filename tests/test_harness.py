"""lm-evaluation-harness offline, on local tasks and tiny models: with thoughts, and without them as lm-eval's own model."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml


pytest.importorskip("lm_eval", reason="needs `pip install trl-quietstar[eval]`")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_quietstar import QuietStarForCausalLM
from trl_quietstar.cli import main
from trl_quietstar.harness import Outcome, QuietStarLM, evaluate_tasks, paired_test
from trl_quietstar.likelihood import log_likelihoods
from trl_quietstar.sampling import Thinking

from .tiny import byte_tokenizer
from .training import saved_model


DOCUMENTS = [
    {"question": f"{a} plus {b} is", "right": str(a + b), "wrong": str(a + b + 3)}
    for a, b in zip(range(8), range(3, 11), strict=True)
]


@pytest.fixture
def tasks(tmp_path) -> str:
    """A folder with a multiple-choice task, a generation task and a perplexity task, and their documents."""
    folder = tmp_path / "tasks"
    folder.mkdir()
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


@pytest.fixture
def thinker(tmp_path) -> str:
    """A saved thinking model whose thoughts change what it says."""
    model = QuietStarForCausalLM.from_pretrained(saved_model(tmp_path / "plain"))
    with torch.no_grad():
        model.quietstar.mixing_head.bias.fill_(1)
    model.save_pretrained(tmp_path / "thinker")
    byte_tokenizer().save_pretrained(tmp_path / "thinker")
    return str(tmp_path / "thinker")


NAMES = ["choose_sum", "write_sum", "read_sum"]


def values(outcomes: list[Outcome]) -> dict:
    """By task and metric."""
    return {(outcome.task, outcome.metric): outcome.value for outcome in outcomes}


def test_without_thoughts_it_is_lm_evals_own_model(thinker, tasks):
    """Every task's numbers are those of stock `HFLM` on the plain base."""
    ours = values(evaluate_tasks(QuietStarLM(thinker, think="never"), NAMES, tasks))
    plain = HFLM(AutoModelForCausalLM.from_pretrained(thinker), tokenizer=AutoTokenizer.from_pretrained(thinker))
    theirs = simple_evaluate(plain, tasks=NAMES, task_manager=TaskManager(include_path=tasks), bootstrap_iters=0)
    for (task, metric), value in ours.items():
        assert value == pytest.approx(theirs["results"][task][f"{metric},none"], rel=1e-6), task
    assert {task for task, _ in ours} == set(NAMES)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("every", [1, 2])
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
    with pytest.raises(ValueError, match="knows no task no_such_task.*--include_path"):
        main(["eval", "--model", thinker, "--tasks", "choose_sum,no_such_task", "--include_path", tasks])
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
