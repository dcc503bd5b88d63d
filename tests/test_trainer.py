"""The trainer end to end on tiny models: metrics, data formats, options, adapters, schedules and reports."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_quietstar import QuietStarConfig, QuietStarForCausalLM, QuietStarREINFORCETrainer, QuietStarSettings
from trl_quietstar.model.adapters import base_of
from trl_quietstar.text.batch import Text
from trl_quietstar.text.positions import choose_positions

from .tiny import byte_tokenizer, generators, sums
from .training import logged, plain_model, saved_model, text_data, tiny_args, tiny_trainer


METRICS = (
    "episode reward avg_reward_100 policy_loss value_loss entropy entropy_coefficient advantages kl_divergence "
    "total_loss num_thoughts coherence learning_rate reward_std mixing_weight nll_with nll_without "
    "explained_variance grad_norm thought_length tokens_per_second"
).split()
EVAL_METRICS = ("reward", "nll_with", "nll_without", "accuracy_with", "accuracy_without", "coherence")
LORA = dict(r=4, target_modules="all-linear")


def finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def thought_places(trainer) -> tuple[Text, list[list[int]]]:
    """The first training batch, and the text indices at which it may think."""
    batch = next(iter(trainer.get_train_dataloader()))
    text = Text.from_batch(**batch)
    positions = choose_positions(text, "all", generators(text))
    return text, [i[m].tolist() for i, m in zip(positions.index, positions.mask, strict=True)]


# Metrics


def test_every_metric_is_logged(tmp_path):
    """Each `rl/*` metric of the design is in every log entry, as a finite number."""
    trainer = tiny_trainer(tmp_path, beta=0.1)
    trainer.train()
    entries = logged(trainer)
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    for entry in entries:
        assert not [name for name in METRICS if not finite(entry.get(f"rl/{name}"))]


def test_metrics_are_what_they_say(tmp_path):
    """Counts, means and schedules in the log are those of the run."""
    trainer = tiny_trainer(tmp_path, num_thoughts=2, max_steps=4, max_grad_norm=0.5, entropy_decay=0.9)
    trainer.train()
    rewards = []
    for entry in logged(trainer):
        rewards.append(entry["rl/reward"])
        assert entry["rl/episode"] == entry["step"]
        assert entry["rl/total_loss"] == pytest.approx(entry["loss"])
        assert entry["rl/learning_rate"] == entry["learning_rate"]
        assert entry["rl/grad_norm"] == entry["grad_norm"]
        assert entry["rl/num_thoughts"] == 4 * 3 * 2
        assert entry["rl/thought_length"] == 3
        assert entry["rl/avg_reward_100"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-12)
        assert 0 <= entry["rl/coherence"] <= 1 and 0 < entry["rl/mixing_weight"] < 1
        assert 0 <= entry["rl/entropy"] <= math.log(300)
        assert -1 <= entry["rl/reward"] <= 1
    assert len(set(rewards)) == 4
    weights = [entry["rl/entropy_coefficient"] for entry in logged(trainer)]
    assert all(after == pytest.approx(0.9 * before) for before, after in zip(weights, weights[1:], strict=False))


def test_a_logging_window_averages_its_steps(tmp_path):
    """Two steps a log: the mean of what each step logs alone, and the moving average of all of them."""
    single, double = tiny_trainer(tmp_path, max_steps=4), tiny_trainer(tmp_path, max_steps=4, logging_steps=2)
    single.train(), double.train()
    steps, windows = logged(single), logged(double)
    assert [window["step"] for window in windows] == [2, 4]
    for i, window in enumerate(windows):
        pair = steps[2 * i : 2 * i + 2]
        for name in ("reward", "policy_loss", "thought_length", "num_thoughts", "total_loss"):
            mean = sum(entry[f"rl/{name}"] for entry in pair) / 2
            assert window[f"rl/{name}"] == pytest.approx(mean, rel=1e-5, abs=1e-9), name
        assert window["rl/avg_reward_100"] == pytest.approx(pair[-1]["rl/avg_reward_100"], abs=1e-9)


def test_evaluation_metrics(tmp_path):
    """Each `eval_*` metric of the design is logged at each evaluation, and is a mean over the data."""
    trainer = tiny_trainer(tmp_path, evaluation=text_data(10, 300), eval_strategy="steps", eval_steps=2)
    trainer.train()
    entry = logged(trainer, "eval_reward")[0]
    assert entry["step"] == 2
    assert not [name for name in EVAL_METRICS if not finite(entry.get(f"eval_{name}"))]
    assert 0 <= entry["eval_accuracy_with"] <= 1 and 0 <= entry["eval_coherence"] <= 1


def test_evaluation_is_deterministic(tmp_path):
    """Twice the same numbers, whatever the random state, and none of the training's own."""
    trainer = tiny_trainer(tmp_path, evaluation=text_data(10, 300))
    first = trainer.evaluate()
    torch.manual_seed(99)
    second = trainer.evaluate()
    trainer.train()
    third = trainer.evaluate()
    for name in EVAL_METRICS:
        assert first[f"eval_{name}"] == second[f"eval_{name}"], name
    assert first["eval_nll_with"] != third["eval_nll_with"]


def test_evaluation_changes_no_training(tmp_path):
    """Evaluating on the way leaves every training metric as it was."""
    plain = tiny_trainer(tmp_path)
    watched = tiny_trainer(tmp_path, evaluation=text_data(6, 300), eval_strategy="steps", eval_steps=1)
    plain.train(), watched.train()
    assert_same_logs(watched, plain)


def assert_same_logs(ours, oracle, rel: float = 0.0) -> None:
    """The same training metrics, but for the clock."""
    ours, oracle = logged(ours), logged(oracle)
    assert len(ours) == len(oracle) > 0
    for mine, theirs in zip(ours, oracle, strict=True):
        for name, value in theirs.items():
            if value is not None and name != "rl/tokens_per_second":
                assert mine[name] == pytest.approx(value, rel=rel, abs=rel), name


@pytest.mark.parametrize("sample", [True, False])
def test_evaluation_does_not_depend_on_its_batches(sample, tmp_path):
    """Means are taken over thoughts and tokens, not over batches of unequal size."""
    metrics = []
    for size in (10, 3):
        trainer = tiny_trainer(
            tmp_path,
            evaluation=Dataset.from_dict({"text": [" ".join(sums()[: 1 + i % 4]) for i in range(10)]}),
            per_device_eval_batch_size=size,
            eval_do_sample=sample,
            thought_positions="all",
        )
        metrics.append(trainer.evaluate())
    for name in EVAL_METRICS:
        assert metrics[0][f"eval_{name}"] == pytest.approx(metrics[1][f"eval_{name}"], rel=1e-5, abs=1e-6), name


def test_several_evaluation_sets(tmp_path):
    """A dictionary of datasets is evaluated name by name."""
    sets = {"small": text_data(4, 300), "large": text_data(8, 310)}
    trainer = tiny_trainer(tmp_path, evaluation=sets, eval_strategy="steps", eval_steps=3)
    trainer.train()
    for name in sets:
        assert finite(logged(trainer, f"eval_{name}_reward")[0][f"eval_{name}_nll_with"])


def test_training_improves_prediction(tmp_path):
    """A few dozen steps lower the held-out NLL, with thoughts and without: gradients point downhill."""
    trainer = tiny_trainer(tmp_path, evaluation=text_data(16, 300), max_steps=30, data=text_data(200))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("eval_nll_with", "eval_nll_without"):
        assert after[name] < before[name] - 0.5, name


# The optimizer


class Recorder(TrainerCallback):
    """Learning rates in force at each optimizer step, and which trainable parameters have no gradient."""

    def __init__(self):
        self.rates, self.without = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        heads = {id(p) for p in base_of(model).quietstar.parameters()}
        groups = optimizer.param_groups
        own = {g["lr"] for g in groups for p in g["params"] if id(p) in heads}
        others = {g["lr"] for g in groups for p in g["params"] if id(p) not in heads}
        assert len(own) == len(others) == 1
        self.rates.append((others.pop(), own.pop()))
        self.without += [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_warm_up_is_linear(tmp_path):
    """The learning rate rises from 0 to its peak over the warm-up, then falls: for the model and, in proportion, the
    heads; and it is what the log says."""
    recorder = Recorder()
    trainer = tiny_trainer(
        tmp_path, max_steps=8, warmup_steps=4, lr_scheduler_type="linear", callbacks=[recorder],
        learning_rate=1e-3, heads_learning_rate=2e-2,
    )  # fmt: skip
    trainer.train()
    factors = [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]
    assert [rate for rate, _ in recorder.rates] == pytest.approx([1e-3 * f for f in factors])
    assert [rate for _, rate in recorder.rates] == pytest.approx([2e-2 * f for f in factors])
    assert [entry["rl/learning_rate"] for entry in logged(trainer)] == pytest.approx([1e-3 * f for f in factors])


@pytest.mark.parametrize("peft", [False, True])
def test_every_parameter_is_in_one_group(peft, tmp_path):
    """Each trainable parameter is optimised once, and the heads at their own rate."""
    trainer = tiny_trainer(tmp_path, peft_config=LoraConfig(**LORA) if peft else None, weight_decay=0.1)
    trainer.create_optimizer()
    grouped = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    heads = {id(p) for p in base_of(trainer.model).quietstar.parameters()}
    for group in trainer.optimizer.param_groups:
        assert all(group["lr"] == (1e-2 if id(p) in heads else 1e-3) for p in group["params"])


@pytest.mark.parametrize(
    ("baseline", "prediction", "peft"),
    [
        ("value", "mixed", False),
        ("leave_one_out", "thought", True),
        ("both", "thought", False),
        ("none", "mixed", True),
        ("value", "mixed", True),
    ],
)
def test_every_trainable_parameter_has_a_gradient(baseline, prediction, peft, tmp_path):
    """No parameter is left out of the graph, which would stall distributed training; an unused head is frozen."""
    recorder = Recorder()
    trainer = tiny_trainer(
        tmp_path,
        advantage_baseline=baseline,
        reward_prediction=prediction,
        peft_config=LoraConfig(**LORA) if peft else None,
        max_steps=1,
        callbacks=[recorder],
    )
    trainer.train()
    heads = base_of(trainer.model).quietstar
    assert recorder.rates and not recorder.without
    assert all(p.requires_grad == (baseline in ("value", "both")) for p in heads.value_head.parameters())
    assert all(p.requires_grad == (prediction == "mixed") for p in heads.mixing_head.parameters())
    assert heads.start_embedding.requires_grad and heads.end_embedding.requires_grad


def equal_rows(count: int = 16) -> Dataset:
    """Texts of ten tokens each, so that a mean over a batch is the mean over its halves."""
    ids = torch.randint(1, 200, (count, 10), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist()})


def test_gradient_accumulation_is_a_larger_batch(tmp_path):
    """Two batches of four accumulated make the step, and the log, of one batch of eight."""
    options = dict(data=equal_rows(32), talk_length=1, optim="sgd", learning_rate=0.1, heads_learning_rate=0.1)
    whole = tiny_trainer(tmp_path, per_device_train_batch_size=8, **options)
    halves = tiny_trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
    whole.train(), halves.train()
    for (name, ours), oracle in zip(halves.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-6, msg=name)
    for ours, oracle in zip(logged(halves), logged(whole), strict=True):
        for name in ("loss", "grad_norm", "rl/reward", "rl/num_thoughts", "rl/total_loss", "rl/avg_reward_100"):
            assert ours[name] == pytest.approx(oracle[name], rel=1e-4, abs=1e-6), name


def test_gradient_checkpointing_changes_no_step(tmp_path):
    """With layers recomputed, the run is the same."""
    ours = tiny_trainer(tmp_path / "a", gradient_checkpointing=True)
    oracle = tiny_trainer(tmp_path / "b", gradient_checkpointing=False, thought_path="replay")
    ours.train(), oracle.train()
    assert logged(ours)[0]["loss"] == pytest.approx(logged(oracle)[0]["loss"], rel=1e-5)
    assert logged(ours)[-1]["loss"] == pytest.approx(logged(oracle)[-1]["loss"], rel=1e-3)


def test_runs_are_reproducible(tmp_path):
    """The same seed gives the same run; another gives another."""
    first, again, other = (tiny_trainer(tmp_path, seed=seed) for seed in (3, 3, 4))
    for trainer in (first, again, other):
        trainer.train()
    assert_same_logs(again, first)
    assert logged(other)[0]["loss"] != logged(first)[0]["loss"]


# Data


def test_text(tmp_path):
    """Plain text: a thought may follow every token but the last, and EOS is the last to be predicted."""
    trainer = tiny_trainer(tmp_path)
    text, places = thought_places(trainer)
    for row, at in enumerate(places):
        length = int(text.attention_mask[row].sum())
        assert at == list(range(length - 1))
        assert text.input_ids[row, length - 1] == byte_tokenizer().eos_token_id


def test_prompt_completion(tmp_path):
    """Prompt and completion: thoughts only where the next token is of the completion."""
    tokenizer = byte_tokenizer()
    data = Dataset.from_dict({"prompt": ["3 plus 4 is", "10 plus 2 is"], "completion": [" 7 .", " 12 ."]})
    trainer = tiny_trainer(tmp_path, data=data, max_steps=1, per_device_train_batch_size=2)
    text, places = thought_places(trainer)
    for row, at in enumerate(places):
        said = tokenizer.decode([text.input_ids[row, t + 1] for t in at])
        assert said in (" 7 .<eos>", " 12 .<eos>")
    trainer.train()
    assert finite(logged(trainer)[0]["loss"])


def test_prompt_counts_when_asked(tmp_path):
    """`completion_only_loss=False`: thoughts in the prompt as well."""
    data = Dataset.from_dict({"prompt": ["3 plus 4 is"], "completion": [" 7 ."]})
    trainer = tiny_trainer(tmp_path, data=data, completion_only_loss=False)
    text, places = thought_places(trainer)
    assert places[0] == list(range(int(text.attention_mask[0].sum()) - 1))


CHAT = {
    "messages": [
        [{"role": "user", "content": "3 plus 4"}, {"role": "assistant", "content": "7 ."}],
        [{"role": "user", "content": "10 plus 2"}, {"role": "assistant", "content": "12 ."}],
    ]
}


@pytest.mark.parametrize("assistant_only", [True, False])
def test_messages(assistant_only, tmp_path):
    """Conversations through the chat template; with `assistant_only_loss`, thoughts in the assistant's turns only."""
    tokenizer = byte_tokenizer()
    trainer = tiny_trainer(
        tmp_path,
        data=Dataset.from_dict(CHAT),
        assistant_only_loss=assistant_only,
        max_steps=1,
        per_device_train_batch_size=2,
    )
    text, places = thought_places(trainer)
    for row, at in enumerate(places):
        said = tokenizer.decode([text.input_ids[row, t + 1] for t in at])
        assert ("assistant: " not in said) == assistant_only
        assert ("plus" not in said) == assistant_only and " .<eos>" in said
    trainer.train()
    assert finite(logged(trainer)[0]["loss"])


def test_tokenized_data(tmp_path):
    """`input_ids` are taken as they are; `labels` beside them say where to think."""
    ids = [[5, 6, 7, 8, 9], [10, 11, 12, 13]]
    labels = [[-100, -100, 7, 8, -100], [-100, 11, 12, 13]]
    trainer = tiny_trainer(tmp_path, data=Dataset.from_dict({"input_ids": ids, "labels": labels}))
    text, places = thought_places(trainer)
    rows = {tuple(text.input_ids[row][text.attention_mask[row]].tolist()): at for row, at in enumerate(places)}
    assert rows == {tuple(ids[0]): [1, 2], tuple(ids[1]): [0, 1, 2]}


def test_a_thought_mask(tmp_path):
    """A `thought_mask` beside `input_ids` says where a thought may follow; the text is predicted as without it."""
    ids, mask = [[5, 6, 7, 8, 9], [10, 11, 12]], [[0, 1, 0, 1, 1], [1, 0, 0]]
    trainer = tiny_trainer(tmp_path, data=Dataset.from_dict({"input_ids": ids, "thought_mask": mask}))
    text, places = thought_places(trainer)
    rows = {
        int(text.attention_mask[row].sum()): (at, int(text.predicted()[row].sum())) for row, at in enumerate(places)
    }
    assert rows == {5: ([1, 3], 4), 3: ([0], 2)}
    trainer.train()
    assert finite(logged(trainer)[-1]["loss"])


def test_a_stream(tmp_path):
    """A streaming dataset trains as the same data in memory does."""
    stream = text_data(12).to_iterable_dataset()
    held_out = text_data(4, 300)
    ours = tiny_trainer(tmp_path, data=stream, evaluation=held_out.to_iterable_dataset(), max_length=64, max_steps=2)
    oracle = tiny_trainer(tmp_path, evaluation=held_out)
    before = ours.evaluate(), oracle.evaluate()
    for name in EVAL_METRICS:
        assert before[0][f"eval_{name}"] == before[1][f"eval_{name}"], name
    ours.train()
    assert len(logged(ours)) == 2 and finite(ours.evaluate()["eval_reward"])


def test_packed_texts(tmp_path):
    """Packing puts several texts in a row, and no thought is written at the end of one."""
    trainer = tiny_trainer(tmp_path, packing=True, max_length=40, max_steps=2)
    text, places = thought_places(trainer)
    assert int(text.document_ids.max()) > 1
    eos = byte_tokenizer().eos_token_id
    for row, at in enumerate(places):
        assert at and not any(text.input_ids[row, t] == eos for t in at)
        assert not any(text.document_ids[row, t] != text.document_ids[row, t + 1] for t in at)
    trainer.train()
    assert finite(logged(trainer)[-1]["loss"])


def test_long_texts_are_cut(tmp_path):
    """`max_length` bounds a text, from either end."""
    long = Dataset.from_dict({"text": [" ".join(sums()[:20])]})
    trainer = tiny_trainer(tmp_path, data=long, max_length=17)
    assert len(trainer.train_dataset[0]["input_ids"]) == 17
    ending = tiny_trainer(tmp_path, data=long, max_length=17, truncation_mode="keep_end")
    assert ending.train_dataset[0]["input_ids"][-1] == byte_tokenizer().eos_token_id


def test_a_left_padding_tokenizer(tmp_path):
    """The tokenizer's padding side changes nothing in training."""
    left, right = (tiny_trainer(tmp_path, tokenizer=byte_tokenizer(padding_side=side)) for side in ("left", "right"))
    left.train(), right.train()
    assert_same_logs(left, right)


def test_a_tokenizer_with_a_pad_token(tmp_path):
    """A pad token of its own, or none: padding is masked, so the run is the same."""
    with_pad, without = tiny_trainer(tmp_path, tokenizer=byte_tokenizer(pad_token="<eos>")), tiny_trainer(tmp_path)
    with_pad.train(), without.train()
    assert_same_logs(with_pad, without)


# Models


def test_a_model_by_path(tmp_path):
    """A path loads model and tokenizer; weights are float32 and become a thinking class."""
    trainer = tiny_trainer(tmp_path / "out", model=saved_model(tmp_path / "model"), max_steps=1)
    trainer.train()
    assert type(trainer.model).__name__ == "QuietStarLlamaForCausalLM"
    assert trainer.model.dtype == torch.float32
    assert trainer.processing_class.eos_token == "<eos>"


def test_a_path_and_an_object_are_one_model(tmp_path):
    """Before training, both predict the same."""
    path = saved_model(tmp_path / "model")
    metrics = []
    for model in (path, QuietStarForCausalLM.from_pretrained(path)):
        trainer = tiny_trainer(
            tmp_path, model=model, tokenizer=byte_tokenizer(), evaluation=text_data(6, 300), value_head_hidden_size=256
        )
        metrics.append(trainer.evaluate()["eval_nll_without"])
    assert metrics[0] == metrics[1]


def test_the_smallest_call(tmp_path, monkeypatch):
    """Model and data alone are enough; the output directory is named after the model."""
    monkeypatch.chdir(tmp_path)
    path = saved_model(tmp_path / "model")
    trainer = QuietStarREINFORCETrainer(model=path, train_dataset=text_data(8))
    assert isinstance(trainer.args, QuietStarConfig) and trainer.args.output_dir == "model-QuietStar"


def test_the_start_is_an_em_dash(tmp_path):
    """A new model's start and end begin as the strings the configuration names."""
    tokenizer, model = byte_tokenizer(), plain_model()
    table = model.get_input_embeddings().weight
    trainer = tiny_trainer(tmp_path, model=model, thought_end_text=" plus")
    for string, ours in (("—", "start_embedding"), (" plus", "end_embedding")):
        ids = tokenizer(string, add_special_tokens=False)["input_ids"]
        assert torch.equal(getattr(trainer.model.quietstar, ours), table[ids].mean(0)), string


def test_training_goes_on_from_a_saved_model(tmp_path):
    """A saved thinking model keeps its heads when it is trained further."""
    first = tiny_trainer(tmp_path / "first")
    first.train()
    first.save_model()
    again = tiny_trainer(tmp_path / "again", model=str(tmp_path / "first"))
    for name, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_lora(tmp_path):
    """With an adapter, the adapter and the heads train; the base stays as it was, and saving takes little."""
    path = saved_model(tmp_path / "base")
    trainer = tiny_trainer(tmp_path / "out", model=path, peft_config=LoraConfig(**LORA), evaluation=text_data(6, 300))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == ("lora_" in name or "quietstar" in name), name
        assert parameter.requires_grad == changed
    trainer.save_model()
    assert not (tmp_path / "out/model.safetensors").exists()
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path / "out")
    again = tiny_trainer(tmp_path, model=loaded, tokenizer=byte_tokenizer(), evaluation=text_data(6, 300))
    for name in EVAL_METRICS:
        assert again.evaluate()[f"eval_{name}"] == trainer.evaluate()[f"eval_{name}"], name


def test_a_peft_model(tmp_path):
    """A `PeftModel` is trained as it is, with heads that carry no adapter."""
    peft = get_peft_model(plain_model(), LoraConfig(**LORA))
    trainer = tiny_trainer(tmp_path, model=peft)
    trainer.train()
    assert trainer.model is peft
    assert not [name for name, _ in peft.named_parameters() if "quietstar" in name and "lora" in name]


@pytest.mark.parametrize("adapter", [None, LoraConfig(**LORA)], ids=["full", "lora"])
def test_a_model_just_trained_with_sft(adapter, tmp_path):
    """`SFTTrainer` puts a forward of its own on the object; the model still thinks, and still works for SFT."""
    options = dict(max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True)
    sft = SFTTrainer(
        model=plain_model(),
        args=SFTConfig(str(tmp_path), **options),
        train_dataset=text_data(),
        processing_class=byte_tokenizer(),
        peft_config=adapter,
    )
    sft.train()
    trainer = tiny_trainer(tmp_path, model=sft.model, evaluation=text_data(6, 300))
    trainer.train()
    model = trainer.model.eval()
    assert finite(logged(trainer)[-1]["rl/reward"]) and finite(trainer.evaluate()["eval_reward"])
    ids = torch.tensor([[1, 2, 3]])
    assert finite(model(input_ids=ids, labels=ids).loss.item())
    assert model.generate(input_ids=ids, max_new_tokens=2).shape == (1, 5)


def test_evaluation_needs_no_training_data(tmp_path):
    """A trainer with evaluation data alone evaluates as one with both does."""
    model, evaluation = saved_model(tmp_path / "model"), text_data(6, 300)
    both = tiny_trainer(tmp_path, model=model, evaluation=evaluation)
    alone = QuietStarREINFORCETrainer(model, tiny_args(tmp_path), eval_dataset=evaluation)
    for name in EVAL_METRICS:
        assert alone.evaluate()[f"eval_{name}"] == both.evaluate()[f"eval_{name}"], name
    with pytest.raises(ValueError, match="train_dataset"):
        alone.train()


def test_a_peft_model_of_a_thinking_model(tmp_path):
    """PEFT freezes everything it is given; the heads are trained all the same, and come back with the adapter."""
    path, settings = saved_model(tmp_path / "base"), QuietStarSettings(3, 2, value_head_hidden_size=16)
    thinking = QuietStarForCausalLM.from_pretrained(path, settings=settings)
    peft = get_peft_model(thinking, LoraConfig(r=4, target_modules=["q_proj"]))
    assert not any(p.requires_grad for p in thinking.quietstar.parameters())
    trainer = tiny_trainer(tmp_path / "out", model=peft, evaluation=text_data(6, 300))
    before = thinking.quietstar.start_embedding.clone()
    trainer.train()
    assert not torch.equal(thinking.quietstar.start_embedding, before)
    trainer.save_model()
    again = base_of(QuietStarForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.equal(again.quietstar.start_embedding, thinking.quietstar.start_embedding)


def test_lora_with_gradient_checkpointing(tmp_path):
    """Recomputed layers pass gradient to the adapter, though the embeddings are frozen."""
    recorder = Recorder()
    trainer = tiny_trainer(
        tmp_path, peft_config=LoraConfig(**LORA), gradient_checkpointing=True, callbacks=[recorder], max_steps=2
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if "lora_A" in name}
    trainer.train()
    assert not recorder.without
    assert not any(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)


@pytest.mark.parametrize("peft", [False, True])
def test_the_reference_is_the_model_at_the_start(peft, tmp_path):
    """KL is 0 before the first update and above 0 after it."""
    trainer = tiny_trainer(tmp_path, beta=0.1, peft_config=LoraConfig(**LORA) if peft else None)
    trainer.train()
    divergences = [entry["rl/kl_divergence"] for entry in logged(trainer)]
    assert divergences[0] == pytest.approx(0, abs=1e-9)
    assert all(value > 1e-6 for value in divergences[1:])


@pytest.mark.parametrize(
    ("moved", "peft"), [("learning_rate", True), ("heads_learning_rate", True), ("heads_learning_rate", False)]
)
def test_the_reference_has_its_own_weights_and_heads(moved, peft, tmp_path):
    """Training the model alone, or the heads alone, moves the policy away: the reference follows in neither."""
    rates = {"learning_rate": 0.0, "heads_learning_rate": 0.0, moved: 1e-2}
    trainer = tiny_trainer(tmp_path, beta=0.1, peft_config=LoraConfig(**LORA) if peft else None, **rates)
    trainer.train()
    divergences = [entry["rl/kl_divergence"] for entry in logged(trainer)]
    assert divergences[0] == pytest.approx(0, abs=1e-9) and divergences[2] > 1e-6


@pytest.mark.parametrize("peft", [False, True])
def test_thoughts_can_be_held_against_the_reference(peft, tmp_path):
    """`no_thought_model="reference"`: what is predicted without thoughts stays as it was while the policy learns."""
    trainer = tiny_trainer(
        tmp_path,
        no_thought_model="reference",
        evaluation=text_data(16, 300),
        max_steps=15,
        learning_rate=1e-2,
        data=text_data(200),
        peft_config=LoraConfig(**LORA) if peft else None,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_nll_with"] < before["eval_nll_with"] - 0.3
    assert after["eval_accuracy_with"] > before["eval_accuracy_with"]
    for name in ("eval_nll_without", "eval_accuracy_without"):
        assert after[name] == before[name], name


def test_the_reference_follows_when_synchronised(tmp_path):
    """With weight 1 and a synchronisation every step, the reference is the policy again: KL stays 0."""
    trainer = tiny_trainer(tmp_path, beta=0.1, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
    trainer.train()
    assert [entry["rl/kl_divergence"] for entry in logged(trainer)] == pytest.approx([0, 0, 0], abs=1e-9)


@pytest.mark.parametrize("disable", [True, False])
def test_dropout_is_off_unless_wanted(disable, tmp_path):
    """`disable_dropout` sets every dropout to 0, the adapter's too; without it they stay."""
    peft = LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.2, fan_in_fan_out=True)
    trainer = tiny_trainer(tmp_path, model=plain_model("gpt2"), peft_config=peft, disable_dropout=disable)
    rates = {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0} if disable else rates >= {0.1, 0.2}


def test_bfloat16_on_a_cpu(tmp_path):
    """A step under bfloat16 autocast is finite, with float32 master weights, near the float32 one."""
    half, single = (tiny_trainer(tmp_path, bf16=bf16, max_steps=2) for bf16 in (True, False))
    half.train(), single.train()
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert all(finite(entry["loss"]) and finite(entry["grad_norm"]) for entry in logged(half))
    assert logged(half)[0]["loss"] == pytest.approx(logged(single)[0]["loss"], rel=0.05)


# Options


COMBINATIONS = [
    dict(reward_type="log_likelihood", advantage_baseline="leave_one_out", no_thought_model="reference"),
    dict(reward_type="accuracy", advantage_baseline="both", reward_prediction="thought"),
    dict(reward_type="binary", advantage_baseline="none", normalize_advantages=True),
    dict(reward_type="probability", advantage_baseline="value", use_gae=False, positive_advantages_only=True),
    dict(reward_type="log_likelihood", reward_prediction="thought", reward_clip_range=[-0.5, 0.5], beta=0.1),
    dict(no_thought_model="reference", advantage_baseline="both", beta=0.1, sync_ref_model=True),
    dict(value_head_type="linear", temperature=0.7, top_p=0.9, top_k=20, min_p=0.01),
    dict(value_head_type="transformer", thought_positions="difficulty", difficulty_threshold=0.1),
    dict(thought_positions="0.5", min_thought_length=1, thought_stop_string=" .", thought_path="replay"),
    dict(thought_positions="all", num_thoughts=1, thought_length=1, talk_length=1),
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_options_train(options, tmp_path):
    """Every option, in some combination, gives finite steps that change the model."""
    trainer = tiny_trainer(tmp_path, max_steps=2, **options)
    before = trainer.model.model.embed_tokens.weight.clone()
    trainer.train()
    for entry in logged(trainer):
        assert finite(entry["loss"]) and finite(entry["grad_norm"]) and finite(entry["rl/reward"])
    assert not torch.equal(trainer.model.model.embed_tokens.weight, before)


def test_rewards_are_clipped_in_training(tmp_path):
    """A clip range bounds the rewards in the log."""
    trainer = tiny_trainer(tmp_path, reward_clip_range=[0.25, 0.5], reward_type="log_likelihood")
    trainer.train()
    assert all(0.25 <= entry["rl/reward"] <= 0.5 for entry in logged(trainer))


def test_stop_strings_shorten_thoughts(tmp_path):
    """A thought that meets the stop string is shorter on average, and never below the least length."""
    trainer = tiny_trainer(tmp_path, thought_stop_string="e", min_thought_length=2, thought_length=8, max_steps=2)
    trainer.train()
    assert all(2 <= entry["rl/thought_length"] <= 8 for entry in logged(trainer))


# Reports


def test_thoughts_are_printed(tmp_path, capsys):
    """`log_thoughts` prints a table with the thoughts, their context and their reward at each log."""
    tiny_trainer(tmp_path, log_thoughts=True, num_thoughts_to_print=2, max_steps=2).train()
    printed = capsys.readouterr().out
    assert "Thoughts at step 1" in printed and "Thoughts at step 2" in printed
    assert all(name in printed for name in ("context", "thought", "next", "reward"))
    assert "plus" in printed


def test_thoughts_are_not_printed_unless_asked(tmp_path, capsys):
    """Off by default."""
    tiny_trainer(tmp_path, max_steps=1).train()
    assert "Thoughts at step" not in capsys.readouterr().out


def test_sampled_thoughts_can_be_read(tmp_path):
    """After an evaluation a few of its thoughts are at hand, in equal columns."""
    trainer = tiny_trainer(tmp_path, evaluation=text_data(6, 300))
    trainer.evaluate()
    columns = trainer.sampled_thoughts()
    assert {"context", "thought", "next", "reward"} <= set(columns)
    assert {len(column) for column in columns.values()} == {5}


def test_a_model_card_is_written(tmp_path):
    """The card names the method, its paper and this library."""
    trainer = tiny_trainer(tmp_path)
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "Quiet-STaR" in card and "2403.09629" in card and "quietstar" in card


def test_wandb_receives_the_metrics(tmp_path, monkeypatch):
    """An offline W&B run holds every `rl/*` metric, and thoughts as a table."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer = tiny_trainer(tmp_path / "out", report_to="wandb", log_thoughts=True, beta=0.1, max_steps=2)
    try:
        trainer.train()
        summary = dict(wandb.run.summary)
    finally:
        wandb.finish()
    assert not [name for name in METRICS if not any(key.endswith(f"rl/{name}") for key in summary)]
    assert any(key.endswith("thoughts") for key in summary)


def test_arguments_stay_training_arguments(tmp_path):
    """Fields of `TrainingArguments` work beside the own ones, and the defaults are the documented ones."""
    args = tiny_args(tmp_path, weight_decay=0.3, lr_scheduler_type="cosine")
    assert args.weight_decay == 0.3 and args.lr_scheduler_type == "cosine"
    plain = QuietStarConfig(str(tmp_path))
    assert (plain.learning_rate, plain.heads_learning_rate) == (1e-6, 1e-4)
    assert (plain.thought_length, plain.talk_length, plain.num_thoughts) == (8, 4, 2)
    assert (plain.reward_type, plain.advantage_baseline, plain.beta) == ("probability", "value", 0.0)
