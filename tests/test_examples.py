"""The example scripts and the notebook run as their docstrings say."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_quietstar import QuietStarForCausalLM

from .tiny import sums
from .training import saved_model


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> tuple[str, str]:
    """Paths of a tiny model and of its texts."""
    folder = tmp_path_factory.mktemp("material")
    data = folder / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in sums()[:48]))
    return saved_model(folder / "model"), str(data)


def run(monkeypatch, script: str, *flags: str) -> None:
    """Runs a script as the command line would."""
    monkeypatch.setattr("sys.argv", [script, *flags])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def log(folder: Path) -> list[dict]:
    """The entries of a saved log that hold rewards."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "rl/reward" in entry]


def metrics(file: Path) -> dict[str, float]:
    """The measurements among saved metrics."""
    saved = json.loads(file.read_text())
    return {name: saved[name] for name in ("eval_reward", "eval_nll_with", "eval_nll_without", "eval_accuracy_with")}


@pytest.fixture(scope="module")
def quickstart(material, tmp_path_factory) -> Path:
    """What the quickstart leaves."""
    output = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        model, data = material
        run(patch, "quickstart.py", "--model", model, "--data", data, "--steps", "2", "--output", str(output))
    return output


def test_sums_of_the_demo(tmp_path):
    """Held-out sums are no training sums; answers and thoughts are right; rows with thoughts come first, the same each time."""
    demo = runpy.run_path(str(EXAMPLES / "prepare_demo.py"))
    demo["write_sums"](tmp_path, seed=0)
    train, test = (
        [json.loads(line) for line in (tmp_path / f"sums_{part}.jsonl").open()] for part in ("train", "test")
    )
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert len({row["prompt"] for row in test}) == len(test) == demo["HELD_OUT"]
    for row in train + test:
        assert int(row["completion"]) == eval(row["prompt"].strip(" ="))
        if row.get("thought") is not None:  # two equal signs: a sum, what it comes to, and what is left to add
            first, rest = row["thought"].removesuffix(" =").split("=")
            assert row["prompt"].startswith(f" {first}") and eval(first) == int(rest[:-2])
            assert eval(rest) == int(row["completion"])
    taught = [row["prompt"] for row in train if row["thought"] is not None]
    passes = [taught[i : i + demo["WRITTEN"]] for i in range(0, len(taught), demo["WRITTEN"])]
    assert len(passes) == demo["TIMES"] and all(set(part) == set(taught) for part in passes)
    others = [row["prompt"] for row in train[len(taught) :]]
    assert len(set(others)) == len(others) == demo["SAMPLED"] and not set(others) & set(taught)


def test_thoughts_and_their_control_are_measured_alike(tmp_path, monkeypatch):
    """Both arms start from the same numbers, stop when their time is up, and end elsewhere."""
    model = saved_model(tmp_path / "model", max_position_embeddings=512)
    lines = [json.dumps({"question": text, "answer": f"{text} {text}"}) for text in sums()[:24]]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))
    results = {}
    for arm in ("thoughts", "plain"):
        output = tmp_path / arm
        flags = ["--model", model, "--data", str(tmp_path / "problems.jsonl"), "--output", str(output)]
        run(monkeypatch, "gsm8k.py", arm, *flags, "--minutes", "0.02", "--held-out", "4")
        results[arm] = json.loads((output / "results.json").read_text())
    names = ("eval_nll_without", "eval_nll_with", "eval_reward")
    for name in names:
        assert results["thoughts"]["before"][name] == pytest.approx(results["plain"]["before"][name])
        assert results["thoughts"]["after"][name] != results["plain"]["after"][name]
    for arm in results.values():
        assert arm["steps"] > 1  # the first is warm-up from a rate of 0
        assert arm["after"]["eval_nll_without"] != arm["before"]["eval_nll_without"]


def test_the_quickstart_trains_and_saves(quickstart, material):
    """Weights and heads have moved, and load as a thinking model."""
    trained, base = (QuietStarForCausalLM.from_pretrained(path) for path in (str(quickstart), material[0]))
    assert not trained.fresh_thought_embeddings
    before = base.state_dict()
    moved = [name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any("quietstar" in name for name in moved) and any("layers" in name for name in moved)
    assert all(abs(value) < 20 for value in metrics(quickstart / "eval_results.json").values())


def test_training_goes_on_where_it_ended(quickstart, material, tmp_path, monkeypatch):
    """The saved model evaluates as it did when it was saved, and then moves."""
    flags = ["--model", str(quickstart), "--data", material[1], "--steps", "2", "--output", str(tmp_path)]
    run(monkeypatch, "continue_training.py", *flags)
    before = metrics(tmp_path / "before_results.json")
    assert before == pytest.approx(metrics(quickstart / "eval_results.json"), rel=1e-4, abs=1e-6)
    assert metrics(tmp_path / "eval_results.json")["eval_nll_without"] != before["eval_nll_without"]


def test_an_adapter_is_trained_saved_and_merged(material, tmp_path, monkeypatch):
    """The merged model is a plain model that differs from the base, with the heads of the adapter repository beside it."""
    model, data = material
    run(monkeypatch, "lora.py", "--model", model, "--data", data, "--steps", "3", "--output", str(tmp_path))
    merged, base = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "merged", Path(model))
    )
    assert merged.keys() == base.keys() and any(not torch.equal(merged[name], base[name]) for name in base)
    heads = "quietstar.safetensors"
    assert (tmp_path / heads).read_bytes() == (tmp_path / "merged" / heads).read_bytes()


def test_a_reward_of_ones_own_is_what_is_trained_on(material, tmp_path, monkeypatch):
    """The first reward falls by exactly the cost of the thoughts' tokens; another function gives another reward."""
    model, data = material
    first = {}
    for name, flags in {
        "free": ["--length-cost", "0"],
        "costly": ["--length-cost", "0.5"],
        "last": ["--reward", "last"],
    }.items():
        output = tmp_path / name
        common = ["--model", model, "--data", data, "--steps", "1", "--output", str(output)]
        run(monkeypatch, "custom_reward.py", *common, *flags)
        first[name] = log(output)[0]
    length = first["free"]["rl/thought_length"]
    assert first["costly"]["rl/reward"] == pytest.approx(first["free"]["rl/reward"] - 0.5 * length, abs=1e-4)
    assert first["last"]["rl/reward"] not in (first["free"]["rl/reward"], 0)
    assert first["last"]["rl/thought_length"] == length


def test_an_exact_match_is_mixed_with_the_likelihood(material, tmp_path, monkeypatch):
    """The reward is the weighted sum of the two, and each is in the log."""
    data = tmp_path / "problems.jsonl"
    data.write_text("\n".join(json.dumps({"question": f"{i} + 1", "answer": f"So\n#### {i + 1}"}) for i in range(9)))
    flags = [
        "--model",
        material[0],
        "--data",
        str(data),
        "--steps",
        "1",
        "--output",
        str(tmp_path),
        "--weights",
        "2",
        "0.25",
    ]
    run(monkeypatch, "exact_match.py", *flags)
    (entry,) = log(tmp_path)
    parts = [entry[f"rl/rewards/{name}/mean"] for name in ("exact_match", "sequence_probability")]
    assert entry["rl/reward"] == pytest.approx(2 * parts[0] + 0.25 * parts[1], abs=1e-6)


def test_a_cold_start_imitates_then_samples(tmp_path, monkeypatch):
    """The first step is taught by written thoughts and samples none; in the last one all are sampled."""
    model = saved_model(tmp_path / "model")
    run(
        monkeypatch,
        "cold_start.py",
        "--model",
        model,
        "--imitate",
        "1",
        "--steps",
        "2",
        "--output",
        str(tmp_path / "out"),
    )
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any("rl/written_nll" in entry for entry in history) and log(tmp_path / "out")
    assert "eval_exact_match_with" in json.loads((tmp_path / "out" / "eval_results.json").read_text())


def test_only_the_last_talk_token_earns(monkeypatch):
    """The last that counts in each row, holes in the mask or not; nothing where none counts."""
    reward = runpy.run_path(str(EXAMPLES / "custom_reward.py"))["last_token_gain"]
    probabilities = torch.tensor([0.1, 0.2, 0.4, 0.8]).expand(1, 3, 2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()[None, :, None]
    found = reward(logps_with=probabilities.log(), logps_without=torch.full((1, 3, 1, 4), 0.1).log(), mask=mask)
    torch.testing.assert_close(found, torch.tensor([[[0.7, 0.7], [0.3, 0.3], [0.0, 0.0]]]))


@pytest.mark.slow  # lm-eval's index of tasks takes most of it
def test_ways_of_thinking_are_compared_on_tasks(quickstart, tmp_path, monkeypatch):
    """Each way has its own log-likelihoods of the same documents, those of `eval` for a model whose thoughts are text; and a p-value
    against none."""
    harness = pytest.importorskip("trl_quietstar.evaluation.harness", reason="needs `pip install trl-quietstar[eval]`")
    saved = shutil.copytree(quickstart, tmp_path / "model") / "config.json"
    config = json.loads(saved.read_text())
    config["quietstar"] |= {"thought_format": "text", "thought_start_text": "(", "thought_end_text": ")"}
    saved.write_text(json.dumps(config))
    documents = [{"question": f"{a} + 3 =", "answer": str(a + 3)} for a in range(12)]
    folder = tmp_path / ".demo" / "tasks" / "gsm_symbolic"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, documents)))
    monkeypatch.chdir(tmp_path)
    name, include = "gsm_symbolic_solution", str(EXAMPLES / "tasks")
    flags = ["--tasks", name, "--include-path", include, "--limit", "2", "--output", "found.json"]
    run(monkeypatch, "evaluate.py", "--model", "model", *flags)
    found = json.loads(Path("found.json").read_text())
    assert set(found) == {"never", "always", "adaptive"}
    for mode in ("always", "adaptive"):
        (outcome,) = found[mode]
        assert outcome["metric"] == "bits_per_byte" and len(outcome["samples"]) == 2 and 0 < outcome["p"] <= 1
        (same,) = harness.evaluate_tasks(harness.QuietStarLM("model", think=mode), [name], include, 2)
        assert list(outcome["samples"].values()) == pytest.approx(list(same.samples.values()), rel=1e-6)


def test_the_notebook_runs(material, tmp_path, monkeypatch):
    """Its code cells, in order, train a model that thinks; no outputs are stored."""
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    for name, value in zip(("MODEL", "DATA", "STEPS"), (*material, "2"), strict=True):
        monkeypatch.setenv(f"QUIETSTAR_{name}", value)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    exec("\n".join("".join(cell["source"]) for cell in code), names)
    assert len(names["log"]) == 2 and names["log"].notna().all(axis=None)
    assert len(names["thoughts"]) > 0 and names["metrics"]["eval_nll_with"] > 0
    assert names["output"].thoughts[0] and (tmp_path / "out" / "notebook" / "adapter_model.safetensors").is_file()
