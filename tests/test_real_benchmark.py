"""The benchmark of thinking on a real model, with a tiny one: its bookkeeping is right, whatever is learned."""

import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from transformers import AutoTokenizer

from benchmarks import real, real_report, real_tasks
from benchmarks.real_clock import Clock
from benchmarks.real_measures import wilson

from .training import saved_model


SIZE = dict(problems=30, written=8, held_out=6, terms=3, fewest_terms=2, digits=2)
CHANGES = [
    *(f"{name}={value}" for name, value in SIZE.items()),
    *("watched=4", "points=2", "warmup=0.1", "cold_share=0.5", "written_mix=1"),
    "checkpoint_minutes=0.01",
    *("all.thought_length=24", "all.value_head_hidden_size=16", "reinforcement.num_thoughts=2"),
    *(f"{stage}.per_device_train_batch_size=3" for stage in ("written", "reinforcement", "plain")),
]
RESULTS = ("arm", "seconds", "cold_seconds", "steps", "cold_steps", "curve", "exact", "samples", "right_chains")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with its tokenizer."""
    return saved_model(tmp_path_factory.mktemp("model"))


def runs(model: str, output, now=None, task="chain_sum", changes=()) -> real.Runs:
    """Of six seconds, by a clock on which each step takes one."""
    settings = real.SETTINGS[task].changed([*CHANGES, *changes])
    return real.Runs(task, model, "", 6.0, 0, settings, output, now or map(float, itertools.count()).__next__)


def results(output, name: str) -> dict:
    """What a run found, but for what no two runs share."""
    found = json.loads((output / "seed-0" / f"{name}.json").read_text())
    return {name: found.get(name) for name in RESULTS}


class Killed(BaseException):
    """Ends a run as a signal would."""


def clock_until(end: int):
    """A clock that kills the run at a tick."""
    for tick in itertools.count():
        if tick == end:
            raise Killed
        yield float(tick)


@pytest.mark.parametrize("arm", ["thinking", "plain", pytest.param("no_cold_start", marks=pytest.mark.slow)])
def test_an_arm_uses_its_time_and_goes_on_after_a_kill(arm, model, tmp_path):
    """To the same results as a run that nothing disturbed; and a run that is finished is not run again."""
    runs(model, tmp_path / "whole").run(arm)
    whole = results(tmp_path / "whole", arm)
    assert whole["seconds"] == 6 and whole["steps"] + whole["cold_steps"] == 6
    assert whole["cold_steps"] == (3 if arm == "thinking" else 0)
    assert [point["minutes"] * 60 for point in whole["curve"]] == [0, 3, 6]
    for end in (3, 5):
        with pytest.raises(Killed):
            runs(model, tmp_path / "killed", clock_until(end).__next__).run(arm)
    runs(model, tmp_path / "killed").run(arm)
    assert results(tmp_path / "killed", arm) == whole
    runs(model, tmp_path / "killed", clock_until(0).__next__).run(arm)
    assert not list(tmp_path.glob(f"whole/seed-0/{arm}/checkpoints"))
    conditions = {"without"} if arm == "plain" else {"without", *real.measures.CONDITIONS}
    assert {name: len(solved) for name, solved in whole["exact"].items()} == dict.fromkeys(conditions, 6)


def test_the_cold_start_is_the_beginning_of_supervised(model, tmp_path):
    """It is trained once; its optimizer goes on in the one arm, and its weights in the other."""
    both, alone = runs(model, tmp_path / "both"), runs(model, tmp_path / "alone")
    both.run("thinking")
    before = (tmp_path / "both/seed-0/cold_start.json").stat().st_mtime_ns
    both.run("supervised")
    assert (tmp_path / "both/seed-0/cold_start.json").stat().st_mtime_ns == before
    alone.run("supervised")
    assert results(tmp_path / "both", "supervised") == results(tmp_path / "alone", "supervised")


def test_arms_see_the_same_problems_in_the_same_order(model, tmp_path):
    """Those that are sampled or answered; and no arm trains on a held-out one."""
    seen, asked = {}, runs(model, tmp_path)
    for name in ("plain", "no_cold_start", "thinking", "cold_start"):
        trainer = asked.trainer(name, model, tmp_path / name)
        rows = trainer.train_dataset.select(range(12))
        written = [bool(ids) for ids in rows["written_ids"]] if "written_ids" in rows.column_names else [False] * 12
        texts = trainer.processing_class.batch_decode(list(rows["input_ids"]), skip_special_tokens=True)
        seen[name] = list(zip(texts, written, strict=True))
    assert seen["plain"] == seen["no_cold_start"]
    assert [written for _, written in seen["thinking"]] == [False, False, True] * 4
    assert [row for row in seen["thinking"] if not row[1]] == seen["plain"][:8]
    assert all(written for _, written in seen["cold_start"])
    held_out = {row["prompt"] for row in asked.held_out}
    assert not held_out & {text.partition("=")[0] + "=" for several in seen.values() for text, _ in several}


@pytest.mark.parametrize("task", real_tasks.TASKS)
def test_held_out_problems_are_never_trained_on(task, tmp_path):
    """Not by the same seed, and generated ones by no seed; seeds hold out different ones."""
    if task == "gsm_symbolic":
        pytest.importorskip("reasoning_gym", reason="needs `pip install trl-quietstar[demo]`")
    data = tmp_path / "gsm8k.jsonl"
    solution = "{0} + 1 = <<{0}+1={1}>>{1} and 2 = <<{1}+2={2}>>{2}\n#### {2}"
    lines = [{"question": f"What is {i}?", "answer": solution.format(i, i + 1, i + 3)} for i in range(1000, 1040)]
    data.write_text("\n".join(map(json.dumps, lines)))
    held = []
    for seed in (0, 1):
        drawn = [[row["prompt"] for row in rows] for rows in real_tasks.draw(task, seed, **SIZE, data=str(data))]
        train, taught, held_out = map(set, drawn)
        assert len(train) <= 30 and len(taught) == 8 and len(held_out) == 6
        assert not held_out & (train | taught)
        held.append(held_out)
    assert not held[0] & held[1]


def test_thoughts_are_the_steps_to_the_answer(tmp_path):
    """In sums, and in what GSM8K marks."""
    train, taught, _ = real_tasks.draw("chain_sum", 0, **SIZE, data="")
    for row in train:
        assert eval(row["prompt"].strip(" =")) == int(row["completion"])
        assert row["thought"].endswith(f"={row['completion'].strip()}") and row["thought"].count("=") in (1, 2)
    short = [row for row in train if row["thought"].count("=") == 1]
    assert len(train) == 30 and len(short) == 15 and not any(row in short for row in taught)
    data = tmp_path / "gsm8k.jsonl"
    data.write_text('{"question": "Q?", "answer": "2 * 3 = <<2*3=6>>6, less 1: <<6-1 = 5>>5\\n#### 1,005"}\n')
    assert real_tasks.read_gsm8k(str(data)) == [
        {"prompt": "Question: Q?\nAnswer:", "completion": " 1005", "thought": "2*3=6, 6-1=5"}
    ]


def test_examples_stand_before_each_problem(model, tmp_path):
    """Worked as thoughts are written and answers given, of problems that are not held out; too few of them are refused."""
    asked = runs(model, tmp_path, task="step_sum", changes=["examples=2", "all.max_length=512"])
    rows = [*asked.train_rows, *asked.taught_rows, *asked.held_out]
    eos, examples = AutoTokenizer.from_pretrained(model).eos_token, asked.held_out[0]["prompt"].split("\n")[:-1]
    assert all(row["prompt"].split("\n")[:-1] == examples for row in rows)
    for row in rows:
        assert eval(row["prompt"].split("\n")[-1]) == int(row["completion"])
        assert row["thought"].endswith(f"={row['completion'].strip()}") and row["thought"].count("=") in (1, 2)
    assert examples == [
        f"{row['prompt'].split(chr(10))[-1]}:{row['thought']}, so{row['completion']}{eos}"
        for row in asked.taught_rows[:2]
    ]
    asked.run("thinking")
    assert results(tmp_path, "thinking")["samples"][0]["prompt"] == asked.held_out[0]["prompt"]
    with pytest.raises(ValueError, match="9 examples need as many"):
        runs(model, tmp_path, task="step_sum", changes=["examples=9"])


def test_arms_may_begin_at_once(tmp_path):
    """Processes that note the same settings in one folder at the same time do not take each other's file."""
    folders = [tmp_path / str(i // 4) for i in range(200)]
    with ProcessPoolExecutor(4, get_context("fork")) as pool:
        assert list(pool.map(real.claim, folders, [{"terms": 4}] * len(folders))) == [None] * len(folders)


def test_too_few_problems_are_refused():
    """Terms of one digit make no million of sums."""
    size = {**SIZE, "digits": 1, "terms": 2, "problems": 1000}
    with pytest.raises(ValueError, match="different problems"):
        real_tasks.draw("chain_sum", 0, **size, data="")


def test_learning_rates_follow_the_time_used():
    """A rise, a plateau, a fall over the last fifth; and a run that begins later warms up anew."""
    clock = Clock(40.0, 100.0, 100.0, warmup=0.1, decay=0.2, points=1, checkpoints=1, measure=dict, write=print)
    clock.step = 0.0
    for clock.used, expected in ((40, 0.01), (45, 0.5), (50, 1), (80, 1), (90, 0.5), (100, 0.01)):
        assert clock.factor() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("right", "count", "interval"), [(0, 10, (0, 0.2775)), (10, 10, (0.7225, 1)), (50, 100, (0.4038, 0.5962))]
)
def test_intervals_are_wilsons(right, count, interval):
    """Values of published tables."""
    assert wilson(right, count) == pytest.approx(interval, abs=1e-4)


def outcome(arm: str, seed: int, passed: bool = True, **shares: float) -> dict:
    """A finished run that solved these shares of 200 problems."""
    exact = {name: [i < 200 * share for i in range(200)] for name, share in shares.items()}
    found = {"arm": arm, "seed": seed, "exact": {x.replace("_", "'"): y for x, y in exact.items()}, "machine": {}}
    found |= {"task": "chain_sum", "minutes": 9.0, "seconds": 540.0, "cold_seconds": 90.0, "steps": 5, "cold_steps": 0}
    found |= {"curve": [{"minutes": x, "with": 0.1 * x, "without": 0.01 * x} for x in (0, 9)], "generated_alike": 1.0}
    found["machine"] = {"cpu": "", "device": "cpu", "threads": 1}
    sample = {"prompt": "1+1=", "completion": " 2", "thought": "1+1=2]", "right": True}
    return found if arm == "plain" else {**found, "anti_theater_passed": passed, "samples": [sample]}


GOOD = {"with": 0.7, "without": 0.1, "another_s": 0.02, "filler": 0.05, "random": 0.1}


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({}, 0),
        ({"with": 0.5}, 1),  # under 60%, and still apart
        ({"plain": 0.3}, 1),
        ({"supervised": 0.65}, 1),
        ({"another_s": 0.4}, 1),
        ({"filler": 0.4}, 1),
        ({"random": 0.4}, 1),
        ({"passed": False}, 1),
        ({"seeds": (0,)}, 1),
        ({"with": 0.1}, 3),
    ],
)
def test_each_criterion_can_fail(changes, fails):
    """And all of them hold where they should."""
    changes = dict(changes)
    plain, supervised = changes.pop("plain", 0.1), changes.pop("supervised", 0.3)
    seeds = changes.pop("seeds", (0, 1))
    found = {name: [] for name in real_report.NAMES}
    for seed in seeds:
        found["thinking"].append(outcome("thinking", seed, **{**GOOD, **changes}))
        found["plain"].append(outcome("plain", seed, without=plain))
        found["supervised"].append(outcome("supervised", seed, **{**GOOD, "with": supervised}))
    verdict = real_report.verdict(found)
    assert len(verdict) == 8 and sum(not holds for holds in verdict.values()) == fails


def test_a_report_holds_every_arm(tmp_path):
    """Table, verdict, samples and plot; runs that are not finished are left out."""
    (tmp_path / "seed-0").mkdir()
    outcomes = [
        outcome("plain", 0, without=0.1),
        *(outcome(arm, 0, **GOOD) for arm in real_report.NAMES if arm != "plain"),
    ]
    for found in outcomes:
        (tmp_path / "seed-0" / f"{found['arm']}.json").write_text(json.dumps(found))
    (tmp_path / "seed-1").mkdir()
    running = {"arm": "plain", "seed": 1, "seconds": 90.0, "minutes": 9.0, "curve": []}
    (tmp_path / "seed-1/plain.json").write_text(json.dumps(running))
    page = real_report.report(tmp_path, tmp_path / "curves.png")
    for name in real_report.NAMES.values():
        assert f"| {name} | 1 | 9.0 |" in page
    assert "70.0% [63.3%, 75.9%]" in page and "`1+1=2]`" in page
    assert "not finished, and left out: plain training on answers, seed 1, 1.5 of 9 minutes" in page
    assert (tmp_path / "curves.png").stat().st_size > 0
    with pytest.raises(ValueError, match="No run"):
        real_report.report(tmp_path / "seed-1")


def test_settings_are_named_and_a_folder_keeps_its_own(model, tmp_path, monkeypatch):
    """An unknown setting is refused with those that there are; and so is a folder with runs of others."""
    for change in ("nothing=1", "stages={}", "none.learning_rate=1", "plain=1"):
        with pytest.raises(ValueError, match="no such setting"):
            real.SETTINGS["chain_sum"].changed([change])
    command = [
        "real",
        "--arm",
        "plain",
        "--minutes",
        "0.001",
        "--seeds",
        "0",
        "--model",
        model,
        "--output",
        str(tmp_path),
    ]
    monkeypatch.setattr("sys.argv", [*command, "--set", *CHANGES])
    real.main()
    assert json.loads((tmp_path / "seed-0/plain.json").read_text())["exact"]
    monkeypatch.setattr("sys.argv", [*command, "--set", *CHANGES, "terms=4"])
    with pytest.raises(ValueError, match=r"terms 3 \(4 here\)"):
        real.main()
