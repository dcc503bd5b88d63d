"""The benchmarks run and say what they promise to, at a size that proves nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    ablations,
    early_ends,
    early_stopping,
    generation,
    gpu,
    gradient_variance,
    learning,
    long_thoughts,
    measuring,
    objectives,
    plan,
    replay,
    speed,
)
from trl_quietstar.evaluation.controls import CONTROLS
from trl_quietstar.text.batch import Text
from trl_quietstar.thinking.scoring import ScoreRequest, score

from .tiny import sums
from .training import saved_model


RECIPES = Path(__file__).parent.parent / "recipes"
CONDITIONS = {"none", "with", *CONTROLS} - {"real"}


@pytest.fixture
def few(monkeypatch):
    """Few problems, in a batch and held out."""
    monkeypatch.setattr(learning, "HELD_OUT", 20)
    monkeypatch.setattr(learning, "PROBLEMS", 4)


@pytest.fixture
def argv(monkeypatch):
    """Sets the command line."""
    return lambda *flags: monkeypatch.setattr("sys.argv", ["benchmark", "--pretraining-steps", "2", *flags])


@pytest.mark.parametrize("flags", [(), ("--task", "hard", "--sabotage", learning.SABOTAGES[0])])
def test_learning_reports_every_number(flags, few, argv, tmp_path):
    """The keys that readers of the file rely on, each with a number."""
    argv("--seeds", "5", "--steps", "1", "--output", str(tmp_path / "out.json"), *flags)
    learning.main()
    seeds = json.loads((tmp_path / "out.json").read_text())["seeds"]
    assert [result["seed"] for result in seeds] == [5]
    for result in seeds:
        assert result["steps_to_90"] is None
        for measured in (result["before"], result["after"]):
            assert set(measured["accuracy"]) == set(measured["nll"]) == CONDITIONS
            for name, value in measured["accuracy"].items():
                low, high = measured["accuracy_interval"][name]
                assert 0 <= low <= value <= high <= 1
            assert measured["anti_theater_passed"] is False
            assert 0 < measured["read"]["probability"] < 1 and 0 <= measured["read"]["accuracy"] <= 1


def test_learning_takes_the_method_of_a_recipe(few, argv, tmp_path):
    """A curriculum's stages are scaled, further settings win, and its last stage is reached and measured."""
    recipe = ("--recipe", str(RECIPES / "fast_quietstar.yaml"), "--set", "policy_temperature=3.0")
    argv("--seeds", "0", "--steps", "5", "--output", str(tmp_path / "out.json"), *recipe)
    learning.main()
    result = json.loads((tmp_path / "out.json").read_text())
    options, (run,) = result["options"], result["seeds"]
    assert result["recipe"].endswith("fast_quietstar.yaml") and options["policy_temperature"] == 3
    lengths = [changes.get("thought_length") for changes in options["curriculum"].values()]
    assert lengths == [4, 3, 2, None] and list(options["curriculum"]) == ["0", "1", "2", "3"]
    assert run["sampled_batches"] == 5 and run["seconds"] > 0
    assert run["before"]["right_chains"] is not None and run["after"]["right_chains"] is None


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_has_a_method(path):
    """Nothing of a recipe's scale comes along, and what does is a configuration of this benchmark."""
    options = learning.recipe_options(path, learning.Task(), 300)
    assert not learning.SCALE & set(options)
    args = learning.configuration(learning.Task(), "out", 0, 300, **options)
    assert args.max_steps == 300 and args.thought_length == 4 and args.talk_length == 1
    assert args.muon_learning_rate in (None, learning.MUON_LEARNING_RATE)


def test_plain_training_is_measured_too(few):
    """The control has no thoughts in training, and accuracies all the same."""
    task = learning.Task()
    result = learning.run(task, learning.pretrain(task, 0, 2), 0, 1, {"thought_positions": "none"})
    assert set(result["after"]["accuracy"]) == CONDITIONS and not result["after"]["anti_theater_passed"]


def test_the_language_is_what_it_says():
    """Right chains are running sums, answers their last; without need of thought, the last digit."""
    for task, right in ((learning.Task(), True), (learning.Task(needs_thought=False), False)):
        digits, sums, answers = learning.draw_problems(task, 50, torch.Generator().manual_seed(0))
        assert torch.equal(sums[:, 2], (digits[:, 0] + digits[:, 1] + digits[:, 2]) % 10)
        assert torch.equal(answers, (sums if right else digits)[:, -1])
    texts = learning.draw_texts(learning.Task(), 400, 1.0, torch.Generator().manual_seed(0))
    chains = [text for text in texts if learning.START in text]
    assert 0.65 < len(chains) / len(texts) < 0.85
    for text in chains:
        letters = np.array(text[6:10]) - learning.FIRST_LETTER
        assert letters.tolist() == (np.cumsum(text[:4]) % 10).tolist() and text[-1] == letters[-1]


def test_answers_are_read_once(few, tmp_path):
    """All ten digits' log-probabilities from one reading are those of each digit scored by itself."""
    task = learning.Task()
    model = learning.pretrain(task, 0, 20)
    args = learning.configuration(task, str(tmp_path), 0, 1)
    data = learning.training_data(task, 0, 1)
    trainer = learning.QuietStarREINFORCETrainer(model, args, data, processing_class=learning.tokenizer())
    found, thoughts = learning.answer_logps(trainer, task, 3, ("real",))
    digits, _, _ = learning.draw_problems(task, 3, torch.Generator().manual_seed(7))
    for digit in (0, 9):
        text = Text.from_batch(torch.cat([digits, torch.tensor([[learning.EQUALS, digit]] * 3)], dim=1))
        with torch.no_grad():
            scores = score(trainer.model, ScoreRequest(text, thoughts, 1, trainer.path))
        torch.testing.assert_close(found["real"][..., digit], scores.talk_logps[:, 0, :, 0])
        torch.testing.assert_close(found["none"][..., 0, digit], scores.text_logps[:, -1])


def test_more_problems_for_as_many_reminders(few):
    """Rows to think about come before each reminder, as many as are asked for."""
    for each in (1, 3):
        thinks = [any(row["thought_mask"]) for row in learning.training_data(learning.Task(), 0, 2, each)]
        assert thinks == ([True] * each + [False]) * (2 * learning.PROBLEMS)


def test_training_ends_when_it_is_enough(few):
    """At the first look at an accuracy that is reached, and not at the last step."""
    task = learning.Task()
    result = learning.run(task, learning.pretrain(task, 0, 2), 0, 40, {}, enough=0.0)
    assert (result["steps"], result["sampled_batches"], len(result["curve"])) == (20, 20, 1)


def test_objectives_are_compared_and_run_once(few, argv, tmp_path, capsys):
    """Each run leaves a file and each task a table; a second command finds them, and runs what is missing only."""
    flags = ("--tasks", "easy", "--steps", "1", "--seeds", "3", "--output", str(tmp_path), "--settings", "defaults")
    argv(*flags)
    objectives.main()
    (path,) = tmp_path.glob("easy-3-*.json")
    first, printed = path.read_text(), capsys.readouterr().out
    assert json.loads(first)["options"] == {} and "easy, seed 3, defaults: " in printed
    argv(*flags, "quietstar")
    objectives.main()
    assert path.read_text() == first and "defaults: " not in capsys.readouterr().out
    rows = (tmp_path / "easy.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| defaults", "| quietstar"]
    assert all(len(row.split("|")) == len(rows[0].split("|")) for row in rows)


def test_every_objective_is_a_configuration():
    """All settings of the comparison, on every task; those with one thought have as many of them in a step."""
    for group in objectives.GROUPS.values():
        for setting in group.values():
            args = learning.configuration(
                learning.Task(), "out", 0, 300, **objectives.options_of(setting, learning.Task(), 300)
            )
            each = args.per_device_train_batch_size // learning.PROBLEMS - 1
            assert args.num_thoughts * each == learning.THOUGHTS


@pytest.mark.slow
def test_sabotage_changes_training(few):
    """Flipped rewards and random thoughts lead elsewhere than training does."""
    task, model = learning.Task(), learning.pretrain(learning.Task(), 0, 2)
    after = [
        learning.run(task, model, 0, 2, {"policy_coefficient": 100.0}, sabotage)["after"]["nll"]["with"]
        for sabotage in (None, "random_thoughts", "flipped_reward")
    ]
    assert len(set(after)) == 3


@pytest.mark.slow
def test_ablations_write_table_and_plot(few, argv, tmp_path, monkeypatch):
    until = learning.Until90
    monkeypatch.setattr(learning, "Until90", lambda task, every, enough: until(task, 1, enough))
    monkeypatch.setattr(ablations, "GROUPS", {"a": dict(list(ablations.VARIANTS.items())[:2]), "b": {}})
    names = list(ablations.VARIANTS)[:2]
    argv("--seeds", "0", "--steps", "2", "--output", str(tmp_path / "table"), "--variants", *names)
    ablations.main()
    found = json.loads((tmp_path / "table.json").read_text())
    assert set(found) == set(names) and [step for step, _ in found[names[0]][0]["curve"]] == [1, 2]
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(names) and all(name in "".join(lines) for name in names)
    assert (tmp_path / "table.png").stat().st_size > 1_000


def test_every_ablation_changes_a_field():
    """No variant is the default under another name."""
    options = [json.dumps(options, sort_keys=True) for options in ablations.VARIANTS.values()]
    assert len(set(options)) == len(options)
    for variant in ablations.VARIANTS.values():
        assert not variant or learning.configuration(learning.Task(), "out", 0, 1, **variant).settings()


def test_gradient_variance_statistics():
    """Against the definition, on gradients with a known mean and spread."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((400, 30))
    found = {"none": 1 + 2 * noise, "half": 1 + noise, "shrunk": 0.5 * (1 + 2 * noise)}
    results = gradient_variance.statistics(found)
    for name, rows in found.items():
        assert results[name]["variance"] == pytest.approx(rows.var(0, ddof=1).sum())
        low, high = results[name]["reduction_interval"]
        assert low <= results[name]["reduction"] <= high
    assert results["half"]["reduction"] == pytest.approx(0.75)
    assert results["half"]["relative_reduction"] == pytest.approx(0.75, abs=0.02)
    assert results["shrunk"]["reduction"] == pytest.approx(0.75)
    assert results["shrunk"]["relative_reduction"] == pytest.approx(0, abs=1e-6)
    assert results["half"]["noise_to_signal"] == pytest.approx(1, rel=0.1)


def test_gradient_variance_runs(argv, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "HELD_OUT", 40)
    monkeypatch.setattr(gradient_variance, "POINTS", (0, 1))
    monkeypatch.setattr(gradient_variance, "FITTING_STEPS", 2)
    argv("--seeds", "0", "--resamples", "6", "--output", str(tmp_path / "out.json"))
    gradient_variance.main()
    points = json.loads((tmp_path / "out.json").read_text())["seeds"]["0"]
    assert set(points) == {"0", "1"} and set(points["0"]) == {*gradient_variance.BASELINES, gradient_variance.WEIGHTED}
    assert points["0"]["none"]["reduction"] == 0


def test_early_stopping_runs(few, argv, tmp_path, monkeypatch):
    """The run to the end, and each patience, with what it saved."""
    for name, value in (("STEPS", 4), ("EVERY", 1), ("THRESHOLD", 10.0), ("PATIENCES", (2,)), ("HELD_OUT", 20)):
        monkeypatch.setattr(early_stopping, name, value)
    argv("--seeds", "0", "--output", str(tmp_path / "out.json"))
    early_stopping.main()
    full, stopped = json.loads((tmp_path / "out.json").read_text())["0"]
    assert full["steps"] == 4 and full["saved"] == 0
    assert stopped["steps"] == 3  # the first evaluation sets the best, two do not improve on it


def test_generation_reports_every_way(tmp_path, monkeypatch, capsys):
    """Units for each way of decoding at each context; the quarter is bracketed, and plain decoding is the unit."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in sums()))
    model = saved_model(tmp_path / "model", max_position_embeddings=256)
    flags = ["--model", model, "--data", str(data), "--contexts", "16", "64", "--tokens", "8", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["benchmark", *flags, "--output", str(tmp_path / "out.json")])
    generation.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["context"] for row in rows] == [16, 64]
    for row in rows:
        assert row["units"]["plain"] == 1 and row["units"]["always"] > row["units"]["every 4"] > 1
        assert row["thoughts per token"]["always"] == 1 and row["thoughts per token"]["every 4"] == 0.25
        assert row["thoughts per token"]["adaptive"] <= 0.25


@pytest.fixture
def tiny_speed(monkeypatch):
    """A model and texts that take a second."""
    size = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    monkeypatch.setattr(speed, "MODEL", {**size, **heads})
    monkeypatch.setattr(
        speed, "CASES", {"reference": [(24, {})], "replay": [(24, {"thought_path": "replay"}), (24, {})]}
    )
    for name, value in (("LENGTH", 24), ("WARM_UP_LENGTH", 8), ("RLOO_PROMPTS", 4), ("GENERATED_TOKENS", 4)):
        monkeypatch.setattr(speed, name, value)


def speed_of(cases: list[str], folder: Path, monkeypatch) -> dict:
    """What the benchmark writes of some cases."""
    flags = ["--repeats", "1", "--set", "thought_length=3", "--output", str(folder / "out.json")]
    monkeypatch.setattr("sys.argv", ["benchmark", *flags, "--cases", *cases])
    speed.main()
    return json.loads((folder / "out.json").read_text())


def test_speed_reports_every_number(tiny_speed, tmp_path, monkeypatch, capsys):
    """Time, stages and memory of a step, and replay against it."""
    monkeypatch.setattr(speed, "in_fresh_process", lambda function, *args, **environment: function(*args))
    result = speed_of(["reference", "replay"], tmp_path, monkeypatch)
    assert set(result["machine"]) == {"cpu", "threads", "torch", "device"} and result["options"]["thought_length"] == 3
    (reference,), (replay, shared) = result["rows"]["reference"], result["rows"]["replay"]
    assert shared == reference and replay != reference
    for row in (reference, replay):
        assert [row[letter] for letter in "TJGLM"] == [24, 23, 1, 3, 4] and row["branch tokens"] == 23 * 8
        assert row["units"] == pytest.approx(row["step seconds"] / row["plain seconds"])
        assert {"scoring", "backward", "rest"} <= set(row["stage units"])
        assert sum(row["stage units"].values()) == pytest.approx(row["units"])
        cost = (row["step seconds"] - row["plain seconds"]) / row["branch tokens"]
        assert row["seconds per branch token"] == pytest.approx(cost)
    assert reference["peak MB"] >= 0 and reference["plain peak MB"] >= 0 and "peak MB" not in replay
    ratio = replay["step seconds"] / shared["step seconds"]
    assert result["summary"]["replay"] == {"replay / shared prefix": pytest.approx(ratio)}
    assert reference["plain seconds"] > 0


@pytest.mark.slow  # imports take most of it
def test_speed_of_sampling_and_generation(tiny_speed, tmp_path, monkeypatch, capsys):
    """Sampling against RLOO, and generation; and the memory of a step in processes of their own."""
    result = speed_of(["reference", "sampling", "generation"], tmp_path, monkeypatch)
    assert result["rows"]["reference"][0]["peak MB"] > 0
    rates = result["summary"]["sampling"]
    assert rates["RLOO prompts"] == 4 and rates["RLOO mean prompt length"] == rates["mean prefix length"] == 12
    quotient = rates["thought tokens per second"] / rates["RLOO tokens per second"]
    assert rates["ours / RLOO"] == pytest.approx(quotient)
    decoding = result["summary"]["generation"]
    assert set(decoding["units"]) == set(generation.FIXED_WAYS) and decoding["units"]["plain"] == 1
    for part in (rates, decoding):
        assert part["plain seconds"] > 0


def test_every_case_of_speed_is_a_configuration(tmp_path):
    """No case names a field that does not exist, and each sweep changes what it is named after."""
    for name, cases in speed.CASES.items():
        for length, changes in cases:
            options = {**speed.REFERENCE, **changes}
            speed.QuietStarConfig(str(tmp_path), **options, use_cpu=True, bf16=False)
            assert length + options["thought_length"] + 1 <= speed.MODEL["max_position_embeddings"]
        assert len({repr(case) for case in cases}) == len(cases) > (1 if name in speed.SWEEPS else 0)


def test_speed_tells_growth_and_plots_sweeps(tmp_path):
    """From rows as an engine gives them that samples inside scoring, without a stage for it."""
    row = {**dict(T=64, J=63, G=1, L=7), "plain seconds": 1.0, "step seconds": 5.0, "units": 5.0}
    row |= {"stage units": {"scoring": 2.0, "backward": 2.5, "rest": 0.5}, "seconds per branch token": 0.1}
    rows = [{**row, "peak MB": 10.0, "plain peak MB": 1.0}, {**row, "T": 128, "peak MB": 30.0, "plain peak MB": 2.0}]
    rows[1]["seconds per branch token"] = 0.15
    assert speed.summary("length", rows) == {
        "growth per branch token": pytest.approx(1.5),
        "memory growth": pytest.approx(3),
    }
    assert speed.summary("reference", rows[:1]) == {}
    assert speed.table({"length": rows, "replay": [row]}).row_count == 3
    speed.plot({"length": rows, "reference": rows[:1]}, tmp_path / "sweeps.png")
    assert (tmp_path / "sweeps.png").stat().st_size > 1_000
    speed.plot({"reference": rows[:1]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_stages_add_up(monkeypatch):
    """A stage within another is taken out of it, once; the run that is reported is the median one, whole."""
    monkeypatch.setattr(measuring.time, "perf_counter", iter([0.0, 1.0, 2.0, 5.0, 6.0, 7.0, 8.0, 10.0]).__next__)
    watch = measuring.Stopwatch()
    with watch.stage("step"):
        with watch.stage("scoring"):
            watch.timed("sampling", lambda: None)()
        watch.timed("backward", lambda: None)()
    assert watch.seconds == {"sampling": 3, "scoring": 2, "backward": 1, "step": 4}
    runs = [{"a": 1.0, "b": 9.0}, {"a": 5.0, "b": 1.0}, {"a": 2.0, "b": 2.0}]
    assert speed.median_run(runs) == {"a": 5.0, "b": 1.0}


def test_peak_memory_is_that_of_the_call():
    """Not of what was taken, and given back, before. The kernel counts resident pages in batches."""
    for size in (50_000_000, 25_000_000):
        peak = measuring.peak_above(lambda size=size: torch.ones(size))
        assert peak == pytest.approx(4 * size, rel=0.1)


def test_replay_reads_fewer_tokens_from_the_cache(monkeypatch, tmp_path):
    """The same task with everything run again and with the family's cache."""
    sizes = ("--length", "12", "--positions", "3", "--thought_length", "2", "--tokens", "2", "--repeats", "1")
    monkeypatch.setattr("sys.argv", ["replay", "--models", "bloom", *sizes, "--output", str(tmp_path / "out.json")])
    replay.main()
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["model"] == "bloom" and row["by token"] is False
    for task in ("sample", "generate"):
        again, cached = row[task]["again"], row[task]["cached"]
        assert cached["tokens"] < again["tokens"] and min(again["seconds"], cached["seconds"]) > 0
    assert row["generate"]["cached"]["tokens"] == 12 + 1 + 2 * (2 + 2)


def test_long_thoughts_are_measured(monkeypatch, tmp_path):
    """A step of each way and length, its time and its memory."""
    monkeypatch.setattr(long_thoughts, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr("sys.argv", ["long_thoughts", "--lengths", "2", "4", "--output", str(tmp_path / "out.json")])
    long_thoughts.main()
    steps = json.loads((tmp_path / "out.json").read_text())["steps"]
    assert [(step["way"], step["thought_length"]) for step in steps] == [
        (way, length) for way in long_thoughts.WAYS for length in (2, 4)
    ]
    assert all(step["seconds"] > 0 and step["peak_mb"] >= 0 for step in steps)


def test_gpu_reports_every_number(tmp_path, monkeypatch):
    """Of both models, trained whole and with LoRA, at a tiny size; a cell of the table for each."""
    monkeypatch.setattr(gpu, "GENERATED_TOKENS", 2)
    output = tmp_path / "out/gpu.json"
    flags = ("--cpu", "--repeats", "1", "--measures", *(name for name in gpu.MEASURES if name != "launches"))
    monkeypatch.setattr("sys.argv", ["benchmark", "--output", str(output), *flags])
    gpu.main()
    result = json.loads(output.read_text())
    assert [(row["model"], row["way"]) for row in result["rows"]] == [
        (name, way) for name in ("smollm2-135m", "llama-1b") for way in ("full", "LoRA")
    ]
    assert result["machine"]["device"]
    for row in result["rows"]:
        numbers = {key: row[key] for key, _ in gpu.COLUMNS.values() if key not in ("launches", "waits")}
        assert set(numbers.pop("generation units")) == {"plain", "always", "every 4"}
        assert all(value > 0 for name, value in numbers.items() if name != "peak GB")


@pytest.mark.slow
@pytest.mark.skipif(not gpu.can_fake(), reason="the faked device is compiled, for the CPU's build")
def test_gpu_counts_where_it_cannot_measure(tmp_path, monkeypatch, capsys):
    """Launches and waits of the faked device, and no time."""
    output = tmp_path / "gpu.json"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["benchmark", "--output", str(output), "--models", "llama-1b"])
    gpu.main()
    for row in json.loads(output.read_text())["rows"]:
        assert row["launches"] > 1_000 and row["waits"] > 0 and row["faked"]
        assert not any("seconds" in key for key in row)
    assert gpu.NOT_MEASURED in capsys.readouterr().out


def test_the_plan_of_memory_is_held_against_longer_forwards(monkeypatch, tmp_path):
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    monkeypatch.setattr(plan, "SMOLLM2", {**sizes, "num_key_value_heads": 2})
    monkeypatch.setattr("sys.argv", ["plan", "--output", str(tmp_path / "plan.json")])
    plan.main()
    found = json.loads((tmp_path / "plan.json").read_text())
    assert len(found) == 2 * len(plan.PRECISIONS)
    for row in found.values():
        assert 1 / 1.3 < row["estimate"] / row["measured"] < 1.3
    assert (
        found["float32, bf16 autocast; LoRA"]["one forward"] > 1.3 * found["float32, bf16 autocast; LoRA"]["measured"]
    )


def test_early_ends_cost_what_they_hold(monkeypatch, tmp_path):
    """At most two tokens are run for each that exists."""
    sizes = ["--length", "12", "--positions", "4", "--thought_length", "32", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["early_ends", *sizes, "--output", str(tmp_path / "out.json")])
    early_ends.main()
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert 1 <= row["run for each that exists"] <= 2 and row["of the time without ends"] > 0
