"""What survives a run: the best model, early stopping, and a resumed run that is the run it resumes."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_quietstar import QuietStarConfig, QuietStarForCausalLM
from trl_quietstar.model.adapters import base_of

from .tiny import byte_tokenizer
from .training import CLOCK, assert_same_state, log_of, logged, plain_model, saved_model, text_data, tiny_trainer


FROZEN = dict(learning_rate=0.0, heads_learning_rate=0.0)
LORA = dict(r=4, target_modules="all-linear")


# Resuming


RUNS = {
    "full": {},
    "accumulated, frozen reference": dict(gradient_accumulation_steps=2, per_device_train_batch_size=2, beta=0.1),
    "lora": dict(peft_config=LoraConfig(**LORA), beta=0.1),
    "moving reference": dict(
        beta=0.1, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.4, learning_rate=1e-2
    ),
    "checkpointed": dict(gradient_checkpointing=True, temperature=0.8, min_thought_length=1),
    "dropout": dict(disable_dropout=False),
    "mixture of experts": {},
    "muon, grokfast": dict(muon_learning_rate=1e-3, weight_decay=0.1, grokfast_lambda=0.5),
    "lora, grokfast": dict(peft_config=LoraConfig(**LORA), grokfast_lambda=0.5),
    "packed": dict(packing=True, max_length=40, normalize_advantages="step"),
}


def run(folder, model, resume=None, **options):
    """Six steps with a checkpoint after every three, and an evaluation after every two."""
    options = dict(
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        warmup_steps=2,
        **options,
    )
    trainer = tiny_trainer(folder, model=model, data=text_data(40), evaluation=text_data(4, 300), **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_run(name, tmp_path):
    """From a checkpoint on, every logged number and every weight is bit for bit that of the uninterrupted run."""
    if "grokfast" in name:
        pytest.importorskip("pytorch_optimizer")
    shape = dict(attention_dropout=0.2) if name == "dropout" else {}
    path = saved_model(tmp_path / "model", "mixtral" if name == "mixture of experts" else "llama", **shape)
    whole = run(tmp_path / "run", path, **RUNS[name])
    resumed = run(tmp_path / "again", path, resume=str(tmp_path / "run/checkpoint-3"), **RUNS[name])
    assert log_of(resumed, after=3) == log_of(whole, after=3)
    assert [entry["step"] for entry in log_of(resumed, after=3)] == [4, 4, 5, 6, 6]
    assert_same_state(resumed.model, whole.model)
    assert resumed.entropy_coefficient == whole.entropy_coefficient
    if whole.ref_model is not None:
        assert_same_state(resumed.ref_model, whole.ref_model)


def test_a_resumed_run_differs_from_a_new_one(tmp_path):
    """The comparison can fail: the same last steps from fresh weights log other numbers."""
    path = saved_model(tmp_path / "model")
    whole, new = run(tmp_path / "run", path), run(tmp_path / "new", path, seed=7)
    assert log_of(new, after=3) != log_of(whole, after=3)


def test_a_logging_window_survives_a_checkpoint(tmp_path):
    """Saved in the middle of a window, the window's means still cover all its steps."""
    path = saved_model(tmp_path / "model")
    options = dict(logging_steps=4, max_steps=8, save_strategy="steps", save_steps=6)
    whole = tiny_trainer(tmp_path / "run", model=path, **options)
    whole.train()
    resumed = tiny_trainer(tmp_path / "again", model=path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-6"))
    (ours,), (oracle,) = (logged(t)[-1:] for t in (resumed, whole))
    assert {n: v for n, v in ours.items() if n not in CLOCK} == {n: v for n, v in oracle.items() if n not in CLOCK}


def test_a_checkpoint_holds_everything(tmp_path):
    """Weights, heads, optimizer, scheduler, entropy coefficient, recent rewards and the card are in a checkpoint."""
    trainer = run(tmp_path / "run", saved_model(tmp_path / "model"))
    checkpoint = tmp_path / "run/checkpoint-3"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"model.safetensors", "quietstar.safetensors", "config.json", "tokenizer.json"} <= files
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json"} <= files
    rewards = [entry["rl/reward"] for entry in logged(trainer)][:3]
    saved = "".join(path.read_text() for path in checkpoint.glob("*.json"))
    assert all(repr(reward)[:12] in saved for reward in rewards)
    again = QuietStarForCausalLM.from_pretrained(checkpoint)
    assert not any(torch.equal(a, b) for a, b in zip(again.parameters(), trainer.model.parameters(), strict=True))


def test_an_adapter_checkpoint_holds_the_heads(tmp_path):
    """Under PEFT a checkpoint has the heads beside the adapter, and no base weights."""
    run(tmp_path / "run", saved_model(tmp_path / "model"), peft_config=LoraConfig(**LORA))
    files = {path.name for path in (tmp_path / "run/checkpoint-3").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "quietstar.safetensors", "quietstar.json"} <= files
    assert "model.safetensors" not in files
    assert json.loads((tmp_path / "run/checkpoint-3/quietstar.json").read_text())["thought_length"] == 3


def test_a_checkpoint_of_the_model_alone_resumes(tmp_path):
    """As with any Trainer, a checkpoint saved with `save_only_model` resumes, with a fresh optimizer."""
    path = saved_model(tmp_path / "model")
    tiny_trainer(tmp_path / "run", path, save_strategy="steps", save_steps=2, save_only_model=True).train()
    resumed = tiny_trainer(tmp_path / "again", path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert resumed.state.global_step == 3


def test_a_run_that_had_ended_ends_again(tmp_path, caplog):
    """Resumed from the checkpoint of its last step, in the middle of an epoch, a run takes no step beyond it; with more
    steps it goes on."""
    path = saved_model(tmp_path / "model")
    options = dict(save_strategy="steps", save_steps=3, lr_scheduler_type="constant")
    whole = tiny_trainer(tmp_path / "run", path, **options)
    whole.train()
    resumed = tiny_trainer(tmp_path / "run", path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert_same_state(resumed.model, whole.model)
    assert "No step is taken" in caplog.text and "at step 3 of 3" in caplog.text
    caplog.clear()
    longer = tiny_trainer(tmp_path / "run", path, **{**options, "max_steps": 4})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 4 and "No step is taken" not in caplog.text


def test_early_stopping_counts_on(tmp_path):
    """Evaluations without improvement before a checkpoint count after it, and a run stopped by them stays so."""
    options = dict(
        model=saved_model(tmp_path / "model"),
        evaluation=text_data(4, 300),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=10,
        **FROZEN,
    )
    tiny_trainer(tmp_path / "run", early_stopping_patience=3, **options).train()
    for checkpoint, last in (("checkpoint-2", 4), ("checkpoint-4", 4)):
        resumed = tiny_trainer(tmp_path / "again", early_stopping_patience=3, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / checkpoint))
        assert resumed.state.global_step == last
    patient = tiny_trainer(tmp_path / "again", early_stopping_patience=5, **options)
    patient.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    assert patient.state.global_step == 6


# Whole checkpoints


class FailsToSave(TrainerCallback):
    """Raises in the middle of the second checkpoint."""

    def __init__(self):
        self.trainer = None

    def on_train_begin(self, args, state, control, **kwargs):
        save = self.trainer._save_scaler

        def interrupted(folder):
            save(folder)
            if state.global_step == 2:
                raise KeyboardInterrupt

        self.trainer._save_scaler = interrupted


def test_half_a_checkpoint_has_another_name(tmp_path):
    """What breaks off while it is written is no `checkpoint-N`, and is gone when training starts again."""
    path = saved_model(tmp_path / "model")
    options = dict(save_strategy="steps", save_steps=1)
    failing = FailsToSave()
    failing.trainer = trainer = tiny_trainer(tmp_path / "run", path, callbacks=[failing], **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    folders = {folder.name for folder in (tmp_path / "run").iterdir() if folder.is_dir()}
    assert folders == {"checkpoint-1", "_unfinished"}
    assert (tmp_path / "run/_unfinished/checkpoint-2/optimizer.pt").is_file()
    resumed = tiny_trainer(tmp_path / "run", path, **options)
    resumed.train(resume_from_checkpoint=True)
    folders = {folder.name for folder in (tmp_path / "run").iterdir() if folder.is_dir()}
    assert folders == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


def test_a_deletion_cut_short_leaves_no_checkpoint(tmp_path, monkeypatch):
    """A checkpoint over the limit loses its name before its files."""
    deleted = []
    monkeypatch.setattr("shutil.rmtree", lambda folder, **kwargs: deleted.append(folder))  # killed before it starts
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1).train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    names = {Path(folder).name for folder in deleted}
    assert "_unfinished" in names and not any(name.startswith("checkpoint-") for name in names)


def test_rotation_keeps_the_best_and_the_last(tmp_path):
    """Of many checkpoints two stay, under names that the state of the last one knows."""
    trainer = tiny_trainer(
        tmp_path,
        evaluation=text_data(6, 300),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        max_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="nll_without",
        greater_is_better=True,  # of what training lowers: the first is best
        learning_rate=0.03,
    )
    trainer.train()
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-5"]
    for step in (1, 5):
        state = json.loads((tmp_path / f"checkpoint-{step}/trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")


# Early stopping


class Evaluations(TrainerCallback):
    """Counts them."""

    def __init__(self):
        self.count = 0

    def on_evaluate(self, args, state, control, **kwargs):
        self.count += 1


@pytest.mark.parametrize("patience", [1, 2])
def test_early_stopping_counts_evaluations(patience, tmp_path):
    """Without improvement training stops `patience` evaluations after the best one."""
    counter = Evaluations()
    trainer = tiny_trainer(
        tmp_path,
        evaluation=text_data(4, 300),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=10,
        early_stopping_patience=patience,
        callbacks=[counter],
        **FROZEN,
    )
    trainer.train()
    assert counter.count == trainer.state.global_step == patience + 1
    assert len({entry["eval_reward"] for entry in logged(trainer, "eval_reward")}) == 1


def test_improvement_keeps_training_going(tmp_path):
    """Below the threshold no improvement counts; with none asked, and a rising reward, training goes on."""
    options = dict(
        evaluation=text_data(4, 300),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=6,
        early_stopping_patience=1,
        reward_type="log_likelihood",
        heads_learning_rate=3e-2,
    )
    strict = tiny_trainer(tmp_path, early_stopping_threshold=10.0, **options)
    strict.train()
    assert strict.state.global_step == 2
    lenient = tiny_trainer(tmp_path, **options)
    lenient.train()
    rewards = [entry["eval_reward"] for entry in logged(lenient, "eval_reward")]
    stopped = next((i for i in range(1, 6) if rewards[i] <= max(rewards[:i])), 5)
    assert lenient.state.global_step == stopped + 1


# The best model


def restored(folder, kind: str, greater: bool) -> bool:
    """Trains, checks that the end is the best evaluation's model, and tells whether that was not the last."""
    trainer = tiny_trainer(
        folder / "run",
        model=saved_model(
            folder / "model", "mixtral" if kind == "mixture" else "llama", tie_word_embeddings=kind == "tied"
        ),
        evaluation=text_data(6, 300),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=5,
        load_best_model_at_end=True,
        greater_is_better=greater,
        learning_rate=0.03,
        heads_learning_rate=0.3,
        peft_config=LoraConfig(**LORA) if kind == "lora" else None,
    )
    trainer.train()
    rewards = [entry["eval_reward"] for entry in logged(trainer, "eval_reward")]
    best = (max if greater else min)(rewards)
    checkpoint = folder / f"run/checkpoint-{rewards.index(best) + 1}"
    assert trainer.state.best_metric == best
    assert trainer.state.best_model_checkpoint == str(checkpoint)
    assert trainer.evaluate()["eval_reward"] == best
    heads = base_of(trainer.model).quietstar.state_dict()
    saved = load_file(checkpoint / "quietstar.safetensors")
    assert heads.keys() == saved.keys() and all(torch.equal(heads[name], saved[name]) for name in saved)
    return rewards[-1] != best


@pytest.mark.parametrize("kind", ["lora", "tied", "mixture", pytest.param("full", marks=pytest.mark.slow)])
def test_the_best_model_is_restored_with_its_heads(kind, tmp_path):
    """At the end policy and heads are those of the best evaluation, to the last bit of its reward; whether the highest
    or the lowest counts as best, of which the last is at most one."""
    earlier = [restored(tmp_path / str(greater), kind, greater) for greater in (True, False)]
    assert any(earlier)


def test_the_best_model_is_what_is_saved(tmp_path):
    """`save_model` after training writes the restored model: loaded again it has the best reward."""
    options = dict(evaluation=text_data(6, 300), learning_rate=0.03, heads_learning_rate=0.3)
    trainer = tiny_trainer(
        tmp_path / "run",
        model=saved_model(tmp_path / "model"),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        max_steps=5,
        load_best_model_at_end=True,
        **options,
    )
    trainer.train()
    trainer.save_model()
    again = tiny_trainer(tmp_path / "again", model=str(tmp_path / "run"), **options)
    assert again.evaluate()["eval_reward"] == trainer.state.best_metric
    assert math.isfinite(trainer.state.best_metric)


def test_saving_and_loading_gives_the_same_evaluation(tmp_path):
    """A trained model, saved and loaded, evaluates to the same numbers."""
    trainer = tiny_trainer(tmp_path / "run", model=plain_model("qwen2-window"), evaluation=text_data(6, 300))
    trainer.train()
    trainer.save_model()
    again = tiny_trainer(
        tmp_path / "again", model=str(tmp_path / "run"), tokenizer=byte_tokenizer(), evaluation=text_data(6, 300)
    )
    ours, oracle = again.evaluate(), trainer.evaluate()
    for name in ("eval_reward", "eval_nll_with", "eval_nll_without", "eval_coherence"):
        assert ours[name] == oracle[name], name


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_reward", True),
        ("eval_nll_with", False),
        ("eval_a_loss", False),
        ("eval_no_thought_drift", False),
        ("eval_penalty", False),
    ],
)
def test_the_best_model_is_the_better_one(metric, greater, tmp_path):
    """What counts losses is best when small, whatever the metric is called."""
    args = QuietStarConfig(str(tmp_path), metric_for_best_model=metric, use_cpu=True)
    assert args.greater_is_better is greater
