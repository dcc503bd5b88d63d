"""Two processes are one: under each engine, what is trained, measured and saved is what one process does."""

import math
import os
from types import SimpleNamespace

import pytest
import torch
from datasets import IterableDataset
from packaging.version import parse
from peft import LoraConfig
from torch.distributed.fsdp import StateDictType

from trl_quietstar import QuietStarForCausalLM
from trl_quietstar.learning.reward_functions import RewardFunctions
from trl_quietstar.learning.rewards import thought_rewards
from trl_quietstar.model.sharding import load_sharded
from trl_quietstar.training.checks import check_streams
from trl_quietstar.training.distributed import check_engine, check_optimizer_file
from trl_quietstar.training.folders import check_checkpoint

from .engines import UNSHARED, Run, has_deepspeed, written_texts
from .training import plain_model, saved_model


WEIGHTS = 2e-6  # tolerance of weights after AdamW steps of 1e-3, and of heads' of 1e-2
METRICS = 1e-4  # of metrics, whose sums run in another order; least exact is the explained variance of tiny returns
ENGINES = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPQuietStarLlamaForCausalLM", "zero2": "DeepSpeedEngine"}
ENGINES["zero3"] = ENGINES["zero2"]
DEEPSPEED = pytest.mark.skipif(not has_deepspeed(), reason="DeepSpeed is not installed")
ALL = ["ddp", "fsdp2", *(pytest.param(name, marks=DEEPSPEED) for name in ("zero2", "zero3"))]
# of a validation; its random and shuffled thoughts, and its intervals, depend on which texts share a batch, and their order
ESTIMATES = ("divergence", "ablation", "correlation", "nll_none", "nll_real", "nll_filler", "nll_truncated")
REFERENCE = dict(beta=0.1, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5)
OPTIONS = {
    "everything": dict(
        max_steps=2,
        thought_positions="all",
        beta=0.1,
        min_thought_length=1,
        normalize_advantages="step",
        gradient_accumulation_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        preflight_thoughts=20,
        useful_gain=1e-3,
    ),
    # of another seed: with the default, a draw of the third step lies so near a threshold that rounding decides it
    "tied": dict(model=dict(tie_word_embeddings=True), gradient_accumulation_steps=2, seed=1),
    "groups": dict(branch_batch_size=2, gradient_checkpointing=True, thought_positions=0.5),
    "difficulty": dict(thought_positions="difficulty", difficulty_threshold=0.95, branch_batch_size=3),
    "ends": dict(
        num_thoughts=1,
        thought_positions=1,
        thought_length=6,
        min_thought_length=1,
        thought_stop_string="1",
        max_steps=6,
        validate=True,
    ),
    "replay": dict(thought_path="replay"),
    "written": dict(
        data=written_texts,
        min_thought_length=1,
        thought_length=8,
        gradient_accumulation_steps=2,
        max_steps=4,
    ),
    "own thoughts again": dict(
        self_imitation_batch_size=3,
        useful_gain=0.0,
        thought_positions="all",
        gradient_accumulation_steps=2,
        max_steps=3,
    ),
    "lora": dict(peft_config=LoraConfig(target_modules="all-linear", r=4), beta=0.1),
    "reference": REFERENCE,
    "validation": dict(validate=True, max_steps=1),
    # no loss on the text: as in RLP, its last layer gets gradients through keys and values alone
    "policy": dict(
        reward_prediction="thought",
        advantage_baseline="leave_one_out",
        branch_batch_size=2,
        **dict.fromkeys(("nll_coefficient", "reader_nll_coefficient", "base_nll_coefficient"), 0.0),
    ),
}


def assert_same(run: Run, one: Run, metrics: bool = True) -> None:
    """Weights agree, and so does all that was logged."""
    weights, expected = run.weights(), one.weights()
    for name in expected:
        torch.testing.assert_close(
            weights[name], expected[name], atol=WEIGHTS, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert run.rates == one.rates
    if not metrics:
        return
    assert len(run.history) == len(one.history)
    for entry, wanted in zip(run.history, one.history, strict=True):
        assert wanted.keys() == entry.keys()
        compared = [name for name in wanted if not any(part in name for part in UNSHARED)]
        assert {name: entry[name] for name in compared} == pytest.approx(
            {name: wanted[name] for name in compared}, abs=METRICS, rel=METRICS
        )


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The runs of one process, by their options."""
    runs: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in runs:
            runs[name] = Run("one", tmp_path_factory.mktemp(name), **OPTIONS[name])
        return runs[name]

    return run


@pytest.mark.parametrize("engine", ALL)
def test_two_processes_are_one(engine, one, tmp_path):
    """Rows of unequal lengths, thoughts that end early, standardized advantages, a reference and an evaluation: losses,
    metrics and weights after AdamW are those of one process with the same global batch; the saved model loads."""
    run = Run(engine, tmp_path, **OPTIONS["everything"])
    assert run.type == ENGINES[engine]
    assert_same(run, one("everything"))
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    for name, tensor in one("everything").weights().items():
        torch.testing.assert_close(
            loaded[name.replace("model.", "", 1)] if name.startswith("model.") else loaded[name],
            tensor,
            atol=WEIGHTS,
            rtol=0,
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "everything"])
@pytest.mark.parametrize("engine", ALL)
def test_features_under_engines(engine, name, one, tmp_path):
    """The features that read weights or shape a forward give what they give in one process."""
    run = Run(engine, tmp_path, **OPTIONS[name])
    assert_same(run, one(name))
    if run.report is not None:
        for estimate in ESTIMATES:
            assert run.report[estimate] == pytest.approx(one(name).report[estimate], abs=METRICS)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ALL)
def test_a_model_given_by_its_path(engine, tmp_path):
    """A model that the trainer loads itself is trained as one process trains it; ZeRO-3 partitions it only then."""
    folder = saved_model(tmp_path / "plain")
    run, single = (Run(name, tmp_path / name, model=folder) for name in (engine, "one"))
    assert_same(run, single)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["full", "lora"])
@pytest.mark.parametrize("writer", ["one", "ddp", "fsdp2"])
def test_checkpoints_are_read_by_other_engines(writer, options, tmp_path):
    """What one engine wrote half-way, another resumes, optimizer included, to where one process ends that never stopped."""
    lora = dict(peft_config=LoraConfig(target_modules="all-linear", r=4))
    changes = dict(lora) if options == "lora" else dict(REFERENCE)
    changes |= dict(max_steps=4, save_strategy="steps", save_steps=2)
    straight = Run("one", tmp_path / "straight", **changes)
    Run(writer, tmp_path / "written", **changes)
    for reader in ("one", "ddp", "fsdp2"):
        resumed = Run(reader, tmp_path / reader, **changes, resume=str(tmp_path / "written" / "checkpoint-2"))
        assert_same(resumed, straight, metrics=False)


@pytest.mark.slow
@DEEPSPEED
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed_resumes_its_own_checkpoints(engine, tmp_path):
    """DeepSpeed goes on from its checkpoint as one process would that never stopped."""
    changes = dict(max_steps=4, save_strategy="steps", save_steps=2, **REFERENCE)
    straight = Run("one", tmp_path / "straight", **changes)
    Run(engine, tmp_path / "written", **changes)
    resumed = Run(engine, tmp_path / "resumed", **changes, resume=str(tmp_path / "written" / "checkpoint-2"))
    assert_same(resumed, straight, metrics=False)


class SpoiltReward:
    """NaN on the second of two processes, or on the only one, in the second step."""

    def __init__(self):
        self.calls = 0

    def __call__(self, text, thoughts, **gains):
        self.calls += 1
        rewards = thought_rewards(**gains, reward_type="log_likelihood")
        return rewards * math.nan if self.calls == 2 and os.environ.get("RANK") != "0" else rewards


@pytest.mark.slow
@pytest.mark.parametrize("engine", ALL)
def test_a_fault_of_one_process_is_all_processes(engine, tmp_path):
    """DDP and FSDP2 skip the step, as one process would; DeepSpeed, which has nothing to skip, stops with a checkpoint."""
    if engine.startswith("zero"):
        with pytest.raises(AssertionError, match=r"\[1, 1\]"):
            Run(engine, tmp_path, reward_functions=SpoiltReward())
        check_checkpoint(tmp_path / "checkpoint-1")
        return
    run, single = (Run(name, tmp_path / name, reward_functions=SpoiltReward()) for name in (engine, "one"))
    assert [entry["rl/skipped_steps"] for entry in run.history if "loss" in entry] == [0, 1, 1]
    assert_same(run, single, metrics=False)  # the loss of a step with a NaN is none


def test_unsupported_engines_are_refused(monkeypatch, caplog):
    """FSDP1 and sharded checkpoints are refused with what to set; of a PyTorch whose gradient norms are wrong it is told."""

    def accelerator(version, kind):
        plugin = SimpleNamespace(fsdp_version=version, state_dict_type=kind)
        return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))

    with pytest.raises(ValueError, match="fsdp_version: 2"):
        check_engine(accelerator(1, StateDictType.FULL_STATE_DICT))
    with pytest.raises(ValueError, match="FULL_STATE_DICT"):
        check_engine(accelerator(2, StateDictType.SHARDED_STATE_DICT))
    for version, is_told in (("2.9.0+cu128", True), ("2.13.0", False)):
        caplog.clear()
        monkeypatch.setattr("accelerate.utils.versions.torch_version", parse(version))
        check_engine(accelerator(2, StateDictType.FULL_STATE_DICT))
        assert ("gradient norms" in caplog.text) == is_told


def test_weights_of_another_form_are_not_left_out(tmp_path):
    """Experts that are stored one by one, and other shapes, are refused rather than passed over; tied weights are read."""
    for name, changes in (("tied", dict(tie_word_embeddings=True)), ("wide", dict(intermediate_size=64))):
        plain_model(**changes).save_pretrained(tmp_path / name)
    plain_model("mixtral").save_pretrained(tmp_path / "experts")
    for model, saved in ((plain_model("mixtral"), "experts"), (plain_model(), "wide")):
        with pytest.raises(ValueError, match="differ in name or shape.*resume that under DDP"):
            load_sharded(model, str(tmp_path / saved))
    model = plain_model(tie_word_embeddings=True)
    model.model.embed_tokens.weight.data.zero_()
    load_sharded(model, str(tmp_path / "tied"))
    assert model.model.embed_tokens.weight.any()


def test_optimizer_of_deepspeed_is_not_dropped(tmp_path):
    """Another engine does not go on with a fresh optimizer from a checkpoint of DeepSpeed's."""
    check_optimizer_file(str(tmp_path))
    (tmp_path / "global_step2").mkdir()
    with pytest.raises(ValueError, match="only DeepSpeed reads it"):
        check_optimizer_file(str(tmp_path))


def test_columns_of_a_stream_that_one_process_reads_for_all():
    """They are no tensors, which are all that is dealt out: refused by name where a reward function takes them."""
    stream = IterableDataset.from_generator(lambda: iter([{"text": "a b"}]))

    def check(processes, reward, dispatches=None, data=stream):
        accelerator = SimpleNamespace(num_processes=processes, dispatch_batches=dispatches)
        functions = RewardFunctions({"reward": reward}, (1.0,))
        check_streams(SimpleNamespace(remove_unused_columns=True), accelerator, data, {"one": None}, functions)

    with pytest.raises(ValueError, match="take columns of a stream, .*'dispatch_batches': False"):
        check(2, lambda answer, **_: 0)
    check(2, lambda text, **_: 0)
    check(1, lambda answer, **_: 0)
    check(2, lambda answer, **_: 0, dispatches=False)
    check(2, lambda answer, **_: 0, data=None)


class Told:
    """A reward from what the model says after thoughts, which logs of some rows only."""

    def __call__(self, answers, thought_texts, log_metric):
        for row, texts in zip(answers, thought_texts, strict=True):
            if len(texts[0][0]) % 2:
                log_metric("answers/length", len(row[0][0]))
        return [[[len(own) / 10 for own in group] for group in row] for row in answers]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_answers_and_logged_metrics_of_several_processes(engine, tmp_path):
    """Processes decode equally often where they must, and sum the metrics that only some of them logged."""
    options = dict(reward_functions=[Told(), "probability"], max_steps=2)
    run, single = (Run(name, tmp_path / name, **options) for name in (engine, "one"))
    assert_same(run, single)
    assert any("rl/answers/length" in entry for entry in run.history)
    assert all("rl/rewards/Told/std" in entry for entry in run.history if "rl/reward" in entry)
