"""Written thoughts: rows that hold any are set apart, and imitated in the very branch that a thought is sampled in."""

import pytest
import torch
from datasets import Dataset

from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.learning.objective import TokenCounts, WrittenInputs
from trl_quietstar.text.batch import Text
from trl_quietstar.text.divided import divide
from trl_quietstar.text.positions import talk_span
from trl_quietstar.thinking import scoring
from trl_quietstar.thinking.scoring import ScoreRequest, score

from .tiny import exact_model
from .training import assert_same_state, log_of, logged, tiny_trainer


PROMPT, LENGTHS = 4, (9, 7, 8)
WRITTEN_IDS = torch.tensor([[[3, 5, 8], [7, -1, -1]], [[-1] * 3] * 2, [[2, 9, -1], [-1] * 3]])
WRITTEN_AT = torch.tensor([[3, 3], [-1, -1], [3, -1]])


def batch() -> Text:
    """Three prompts with completions; the first and the third have written thoughts after the prompt, two and one."""
    ids = torch.randint(10, 90, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    labels = ids.masked_fill(torch.arange(max(LENGTHS)) < PROMPT, -100)
    return Text.from_batch(ids, mask, labels)


def inputs(rows=(0, 1, 2)) -> dict[str, torch.Tensor]:
    """The collated columns of some rows."""
    index = torch.tensor(rows)
    return {"written_ids": WRITTEN_IDS[index], "written_at": WRITTEN_AT[index]}


def test_rows_are_set_apart():
    """Rows with written thoughts go to the one side with their thoughts, the others to be sampled."""
    divided = divide(batch(), inputs())
    assert divided.rows == [1] and divided.columns({"columns": {"name": list("abc")}}) == {"name": ["b"]}
    assert torch.equal(divided.sampled.input_ids, batch().input_ids[[1]])
    written = divided.written
    assert torch.equal(written.text.labels, batch().labels[[0, 2]])
    assert written.thoughts.mask[:, :, 0].sum(-1).tolist() == [[3, 1], [2, 0]]
    assert written.thoughts.positions.mask.tolist() == [[True, True], [True, False]]
    assert written.thoughts.token_ids[0, 0, 0].tolist() == [3, 5, 8]


def test_a_batch_of_one_kind():
    """Without written thoughts the batch is as it was; with nothing to sample, one row stays that predicts nothing."""
    text = batch().rows(torch.tensor([1]))
    divided = divide(text, inputs([1]))
    assert divided.sampled is text and divided.rows == [0] and divided.written is None
    always = divide(text, inputs([1]), always=True).written
    assert not always.thoughts.mask.any() and not always.text.predicted().any()
    divided = divide(batch().rows(torch.tensor([0, 2])), inputs([0, 2]))
    assert divided.rows == [0] and not divided.sampled.predicted().any() and len(divided.written.text.input_ids) == 2


def by_hand(model, text: Text, row: int, thought: list[int]) -> list[torch.Tensor]:
    """Log-probabilities of a thought's tokens and of the talk after it, by an ordinary forward over the whole sequence."""
    embed, heads, end = model.get_input_embeddings(), model.quietstar, LENGTHS[row]
    ids = text.input_ids[row, :end]
    embeds = [
        embed(ids[:PROMPT]),
        heads.start_embedding[None],
        embed(torch.tensor(thought)),
        heads.end_embedding[None],
    ]
    hidden = model.base_model(inputs_embeds=torch.cat([*embeds, embed(ids[PROMPT:-1])])[None]).last_hidden_state[0]
    logps = model.lm_head(hidden).log_softmax(-1)
    targets = torch.cat([torch.tensor(thought), torch.tensor([0]), ids[PROMPT:]])
    found = logps[PROMPT : PROMPT + len(targets)].gather(1, targets[:, None])[:, 0]
    return [found[: len(thought)], found[len(thought) + 1 :]]


def of_written(model, path, prediction: str = "thought") -> WrittenInputs:
    """What the objective gets of the rows with written thoughts."""
    written = divide(batch(), inputs()).written
    talk_length = talk_span(written.text, "completion", "prompt_end", written.thoughts.positions)
    return WrittenInputs.of(
        written.text, score(model, ScoreRequest(written.text, written.thoughts, talk_length, path, 1.0, prediction))
    )


@pytest.mark.parametrize("path", [SharedPrefix(), Replay()], ids=["shared", "replay"])
def test_imitation_is_by_hand(path):
    """NLL of written thoughts and of the text after them, and its gradient, are those of ordinary sequences, to 1e-9."""
    model = exact_model()
    ours = of_written(model, path)
    assert ours.counts().written == 6 and ours.counts().talk == 5 + 5 + 4 and ours.counts().thought == 0
    loss = -(ours.thought_logps * ours.thought_mask).sum() - 0.5 * (ours.reader_logps * ours.talk_mask).sum()
    thoughts = [(0, [3, 5, 8]), (0, [7]), (2, [2, 9])]
    hand = [by_hand(model, batch(), row, thought) for row, thought in thoughts]
    oracle = -sum(x[0].sum() for x in hand) - 0.5 * sum(x[1].sum() for x in hand)
    torch.testing.assert_close(loss, oracle, rtol=1e-9, atol=1e-9)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if "quietstar" not in n), strict=True)
    pairs = (torch.autograd.grad(x, parameters, materialize_grads=True, allow_unused=True) for x in (loss, oracle))
    for name, mine, theirs in zip(names, *pairs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9, msg=name)


def test_counts_add_up():
    """Tokens of written thoughts are counted apart, and their talk with all other talk."""
    counts = of_written(exact_model(), SharedPrefix()).counts()
    total = TokenCounts.total([counts, counts], lambda x: x)
    assert (total.written, total.talk, total.thought) == (12, 28, 0)


# In training

SUMS = {
    "prompt": [f"{i} plus 1 is" for i in range(8)],
    "completion": [f" {i + 1} ." for i in range(8)],
    "thought": [None if i % 2 else f" {i + 1}" for i in range(8)],
}
ENDING = dict(thought_positions="prompt_end", talk_length="completion", min_thought_length=1, thought_length=4)


def trained(folder, data: dict, **options):
    """A trainer after three steps."""
    trainer = tiny_trainer(folder, data=Dataset.from_dict(data), **{**ENDING, **options})
    trainer.train()
    return trainer


def test_weight_zero_samples_every_row(tmp_path):
    """With `written_thought_coefficient=0` training is bit for bit what it is without written thoughts, and not otherwise."""
    bare = trained(tmp_path, {name: SUMS[name] for name in ("prompt", "completion")})
    off = trained(tmp_path, SUMS, written_thought_coefficient=0.0)
    assert_same_state(off.model, bare.model)
    assert log_of(off) == log_of(bare)
    on = trained(tmp_path, SUMS)
    assert any(not torch.equal(x, y) for x, y in zip(on.model.parameters(), bare.model.parameters(), strict=True))


def test_a_row_is_sampled_as_it_is_alone(tmp_path):
    """The thoughts of a row do not depend on whether other rows of its batch are imitated."""
    taken = {}
    for name, data in (("bare", {**SUMS, "thought": [None] * 8}), ("mixed", SUMS)):
        trainer = tiny_trainer(tmp_path, data=Dataset.from_dict(data), train_sampling_strategy="sequential", **ENDING)
        inputs = trainer.step.begin([next(iter(trainer.get_train_dataloader()))])[0]
        rows, part = trainer.step.take(trainer.model, inputs, 0)
        thoughts = trainer.thinker.sample(rows.sampled, part)
        taken[name] = dict(zip(rows.rows, thoughts.token_ids, strict=True))
    assert list(taken["bare"]) == [0, 1, 2, 3] and list(taken["mixed"]) == [1, 3]
    for row, ids in taken["mixed"].items():
        assert torch.equal(ids, taken["bare"][row])


@pytest.mark.parametrize("prediction", ["thought", "mixed"])
def test_the_model_runs_for_written_thoughts_alone(prediction, tmp_path, monkeypatch):
    """Where no row is sampled, the row that stands in for them does not run, and gradients are the same, of the value head too."""
    data = Dataset.from_dict({name: SUMS[name][::2] for name in SUMS})
    found = []
    for runs in (False, True):
        if runs:
            monkeypatch.setattr(scoring, "_asks_nothing", lambda request: False)
        trainer = tiny_trainer(tmp_path, data=data, reward_prediction=prediction, **ENDING)
        forwards = []
        trainer.model.get_decoder().register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        inputs = trainer.step.begin([next(iter(trainer.get_train_dataloader()))])[0]
        trainer.compute_loss(trainer.model, inputs).backward()
        found.append((len(forwards), {name: p.grad for name, p in trainer.model.named_parameters()}))
    (fewer, grads), (more, expected) = found
    assert fewer == more - 2  # text and branches
    for name, grad in expected.items():
        assert grad is None or torch.equal(grads[name], grad), name
        assert (grad is None) == (grads[name] is None), name


def test_a_cold_start_is_learned(tmp_path):
    """A stage of imitation alone: the model then writes the thoughts that it was taught; and a stage of sampling follows."""
    data = {name: SUMS[name][::2] * 2 for name in SUMS}
    stages = {"0": {"written_thought_coefficient": 1.0}, "60": {"written_thought_coefficient": 0.0}}
    trainer = trained(tmp_path, data, curriculum=stages, max_steps=62, learning_rate=1e-2, eval_do_sample=False)
    taught, sampled = logged(trainer, "rl/written_nll"), logged(trainer, "rl/reward")
    assert [entry["step"] for entry in taught] == list(range(1, 61))
    assert [entry["step"] for entry in sampled] == [61, 62]
    assert taught[0]["rl/written_nll"] > 3 and taught[-1]["rl/written_nll"] < 0.3
    assert taught[-1]["rl/written_reader_nll"] < 0.3


def test_evaluation_samples(tmp_path):
    """Evaluation data with written thoughts are evaluated by the model's own."""
    data = Dataset.from_dict(SUMS)
    bare = tiny_trainer(tmp_path, data=data, evaluation=data.remove_columns("thought"), **ENDING).evaluate()
    ours = tiny_trainer(tmp_path, data=data, evaluation=data, **ENDING).evaluate()
    assert ours["eval_reward"] == bare["eval_reward"] != 0


@pytest.mark.parametrize("option", [{}, {"gradient_accumulation_steps": 2}])
def test_the_control_reads_no_written_thoughts(tmp_path, option):
    """With `thought_positions='none'` training is plain, bit for bit as on data without written thoughts."""
    options = dict(thought_positions="none", talk_length=2, max_steps=2, **option)
    bare = trained(tmp_path, {name: SUMS[name] for name in ("prompt", "completion")}, **options)
    control = trained(tmp_path, SUMS, **options)
    assert_same_state(control.model, bare.model)
    assert log_of(control) == log_of(bare)


def test_what_is_not_sampled_is_not_logged(tmp_path, capsys):
    """A logging window of imitation alone has no average reward, and prints no thoughts."""
    data = {name: SUMS[name][::2] for name in SUMS}
    stages = {"1": {"written_thought_coefficient": 0.0}}
    trainer = trained(tmp_path, data, curriculum=stages, max_steps=2, log_thoughts=True)
    taught, sampled = logged(trainer, "loss")
    assert "rl/written_nll" in taught and not {"rl/reward", "rl/avg_reward_100", "rl/coherence"} & set(taught)
    assert {"rl/avg_reward_100", "rl/coherence"} <= set(sampled)
    printed = capsys.readouterr().out
    assert "Thoughts at step 2" in printed and "Thoughts at step 1" not in printed


def test_a_window_that_begins_with_imitation(tmp_path, capsys):
    """Thoughts are printed, and their coherence is measured, by the first batch in which some are sampled."""
    options = dict(train_sampling_strategy="sequential", per_device_train_batch_size=1, log_thoughts=True)
    trainer = trained(tmp_path, SUMS, gradient_accumulation_steps=2, max_steps=1, **options)
    (entry,) = logged(trainer)
    assert 0 < entry["rl/coherence"] < 1 and entry["rl/num_thoughts"] == 2
    assert "1 plus 1 is" in capsys.readouterr().out
