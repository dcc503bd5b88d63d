"""Thoughts whose advantage is too small to be trained on are left out of the update, and of nothing else."""

import pytest
import torch
from datasets import Dataset

from trl_quietstar.learning.advantages import MovingAverage
from trl_quietstar.learning.experience import Experience
from trl_quietstar.learning.selection import drop_groups, fold_repeats, kept_thoughts, worth_training_on
from trl_quietstar.text.batch import Positions, Thoughts

from .tiny import byte_tokenizer, exact_model
from .training import Gradients, logged, tiny_args, tiny_trainer


TEXTS = [
    "1 plus 1 is 2 .",
    "7 plus 12 is 19 . 3 plus 4 is 7 . 8 plus 0 is 8 .",
    "5",
    "2 plus 19 is 21 . 6 plus 6 is 12 .",
]
POLICY = dict(
    advantage_baseline="leave_one_out",
    positive_advantages_only=True,
    num_thoughts=4,
    policy_coefficient=300.0,  # rewards of random weights are tiny
    nll_coefficient=0.0,
    reader_nll_coefficient=0.0,
    base_nll_coefficient=0.0,
    entropy_coefficient=0.0,
    min_entropy_coefficient=0.0,
)
CASES = {
    "policy": {},
    "early ends": dict(min_thought_length=1, thought_stop_string="1"),
    "text": dict(base_nll_coefficient=1.0),
    "standardized": dict(normalize_advantages="step"),
    "scaled by group": dict(normalize_advantages="group"),
    "reference": dict(no_thought_model="reference"),
    "replay": dict(thought_path="replay"),
    "further updates": dict(num_iterations=3, max_steps=3, learning_rate=1e-2),
}


def run(folder, rows: int = 4, batches: int = 1, resume: str | None = None, **options):
    """Gradients of the last step, and the trainer."""
    gradients = Gradients()
    trainer = tiny_trainer(
        folder,
        model=exact_model(vocab_size=len(byte_tokenizer())),
        data=Dataset.from_dict({"text": TEXTS}),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=batches,
        value_head_hidden_size=256,
        max_grad_norm=0.0,
        callbacks=[gradients],
        **{"max_steps": 1, **POLICY, **options},
    )
    trainer.train(resume_from_checkpoint=resume)
    return gradients.steps[-1], trainer


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_out_added_nothing(name, tmp_path):
    """Advantages of 0 left out: gradients to 1e-9 and all metrics are those of the update on every thought."""
    whole, oracle = run(tmp_path, **CASES[name])
    for rows, batches in ((4, 1), (2, 2)):
        ours, trainer = run(tmp_path, rows, batches, advantage_threshold=1e-12, **CASES[name])
        for parameter, gradient in whole.items():
            mine = ours.get(parameter, torch.zeros(()))
            torch.testing.assert_close(mine.expand_as(gradient), gradient, rtol=1e-7, atol=1e-9, msg=parameter)
        assert [entry["loss"] for entry in logged(trainer, "loss")] == pytest.approx(
            [x["loss"] for x in logged(oracle, "loss")], rel=1e-6
        )
        for metric, value in logged(oracle)[0].items():
            if metric not in ("rl/tokens_per_second", "rl/coherence"):  # coherence is of the first batch
                assert logged(trainer)[0][metric] == pytest.approx(value, rel=1e-6, abs=1e-9), metric
    assert any(g.abs().max() > 1e-3 for g in whole.values())


def test_fewer_thoughts_are_trained_on(tmp_path, monkeypatch):
    """The update runs less than half of the thoughts; with a threshold that none reaches, it runs one empty row and changes
    nothing."""
    seen = []
    trainer_module = "trl_quietstar.trainer"
    from trl_quietstar.trainer import quietstar_loss

    def spy(inputs, *args, **kwargs):
        seen.append(inputs.thought_mask)
        return quietstar_loss(inputs, *args, **kwargs)

    monkeypatch.setattr(f"{trainer_module}.quietstar_loss", spy)
    run(tmp_path)
    run(tmp_path, advantage_threshold=1e-12)
    gradients, _ = run(tmp_path, advantage_threshold=1e9)
    whole, kept, none = (int(mask.sum()) for mask in seen)
    assert 0 < kept <= whole / 2 and none == 0 and seen[2].shape[0] == 1
    assert not any(g.any() for g in gradients.values())


def test_thoughts_that_say_the_same_are_run_once(tmp_path, monkeypatch):
    """Of thoughts of one token many are equal: fewer than two thirds are run, and every term has the gradient of all."""
    seen = []
    from trl_quietstar.trainer import quietstar_loss

    def spy(inputs, *args, **kwargs):
        seen.append(int(inputs.thought_mask.sum()))
        return quietstar_loss(inputs, *args, **kwargs)

    monkeypatch.setattr("trl_quietstar.trainer.quietstar_loss", spy)
    terms = dict(nll_coefficient=0.7, reader_nll_coefficient=0.3, base_nll_coefficient=0.2, entropy_coefficient=0.5)
    options = dict(
        terms, thought_length=1, num_thoughts=8, temperature=0.3, beta=0.4, nll_weighting="share", max_steps=2
    )
    for weights in ({}, dict(base_nll_coefficient=0.0)):  # rows stay as they are, or are regrouped
        whole, oracle = run(tmp_path, **(options | weights))
        ours, trainer = run(tmp_path, reward_std_filter=0.0, **(options | weights))  # drops nothing
        for name, gradient in whole.items():
            mine = ours.get(name, torch.zeros(())).expand_as(gradient)
            torch.testing.assert_close(mine, gradient, rtol=1e-7, atol=1e-9, msg=name)
        assert logged(trainer)[1]["loss"] == pytest.approx(logged(oracle)[1]["loss"], rel=1e-6)
        every, run_once = sum(seen[:2]), sum(seen[2:])
        assert 0 < run_once < every * 2 / 3
        seen.clear()


@pytest.mark.parametrize(("text_length", "keeps_rows", "group"), [(1, False, 1), (1000, False, 2), (1, True, 2)])
def test_each_thought_keeps_what_it_earned(text_length, keeps_rows, group):
    """Of ragged positions and groups, exactly the thoughts above the threshold are left, each with its own numbers."""
    generator = torch.Generator().manual_seed(0)
    B, J, G, L, M = 3, 4, 5, 6, 4
    exists = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    lengths = torch.randint(1, L + 1, (B, J, G, 1), generator=generator)
    mask = (torch.arange(L) < lengths) & exists[..., None, None]
    ids = torch.arange(B * J * G * L).view(B, J, G, L)
    advantage = torch.rand(B, J, G, generator=generator) * exists[..., None]
    advantage[2, 0] = torch.tensor([0.9, 0, 0, 0, 0])
    spread = advantage[..., None] * mask

    def talk():
        return torch.rand(B, J, 1, M, generator=generator)

    experience = Experience(
        Thoughts(Positions(torch.arange(J).expand(B, J), exists), ids * mask, mask),
        talk() > 0.3,
        talk() > 0.6,
        talk(),
        talk() > 0.5,
        advantage * 7,
        spread,
        spread,
        -spread,
    )
    rows, kept = worth_training_on(experience, kept_thoughts(experience, 0.8), text_length, keeps_rows)
    assert len(rows) > 3 if group == 1 else rows.tolist() == [0, 1, 2]
    assert kept.thoughts.mask.shape[2] == group
    wanted = {int(ids[b, j, g, 0]): (b, j, g) for b, j, g in (advantage >= 0.8).nonzero().tolist()}
    found = {}
    for r, j, g in kept.thoughts.mask[..., 0].nonzero().tolist():
        own = kept.thoughts.token_ids[r, j, g]
        found[int(own[0])] = (r, j, g)
        b, old_j, old_g = wanted[int(own[0])]
        assert rows[r] == b and kept.thoughts.positions.index[r, j] == old_j
        length = int(mask[b, old_j, old_g].sum())
        assert (
            own[:length].tolist() == ids[b, old_j, old_g, :length].tolist()
            and kept.thoughts.mask[r, j, g].sum() == length
        )
        assert kept.rewards[r, j, g] == experience.rewards[b, old_j, old_g] and kept.talk_weights[r, j, g] == 1
        assert torch.equal(kept.logps_without[r, j], experience.logps_without[b, old_j])
        assert torch.equal(kept.score_mask[r, j], experience.score_mask[b, old_j])
    assert found.keys() == wanted.keys() and len(wanted) > 5
    assert kept.talk_weights.sum() == len(wanted)


def experience_with(rewards: torch.Tensor, exists: torch.Tensor, scored: torch.Tensor) -> Experience:
    """Thoughts of one token with rewards of shape `(B, J, G)`, at the positions that exist, and where there is anything to score."""
    B, J, G = rewards.shape
    mask = exists[..., None, None].expand(B, J, G, 1)
    spread = rewards[..., None] * mask
    talk = torch.ones(B, J, 1, 1)
    positions = Positions(torch.arange(J).expand(B, J), exists)
    thoughts = Thoughts(positions, torch.zeros(B, J, G, 1, dtype=torch.long), mask)
    return Experience(thoughts, talk > 0, scored[..., None, None], talk, talk > 0, rewards, spread, spread, spread)


def test_groups_without_spread_are_dropped():
    """Those whose standard deviation is below the share of its average over the steps before; not at the first one, and not
    where a reward is no number, which the average leaves out as it does positions that do not exist or have nothing scored."""
    exists = torch.tensor([[True, True, True], [True, False, True]])
    scored = torch.tensor([[True, True, True], [True, True, False]])
    wide, narrow, none = [0.0, 1.0], [0.4, 0.6], [0.5, 0.5]
    first = torch.tensor([[wide, narrow, none], [wide, wide, wide]])
    second = torch.tensor([[narrow, wide, none], [[0.0, float("nan")], none, none]])
    average, reduce = MovingAverage(0.5), lambda sums: sums
    (whole,) = drop_groups([experience_with(first, exists, scored)], 0.5, average, reduce)
    assert not whole.dropped.any()
    deviation = 0.5**0.5  # of `wide`, over G - 1
    before = (deviation + 0.2 * deviation + 0 + deviation) / 4
    assert average.value == pytest.approx(before)
    again = MovingAverage(0.5)  # two processes with the same batch
    drop_groups([experience_with(first, exists, scored)], 0.5, again, lambda sums: 2 * sums)
    assert again.value == pytest.approx(before)
    halves = [experience_with(*(x[row : row + 1] for x in (second, exists, scored))) for row in (0, 1)]
    ours = torch.cat([x.dropped for x in drop_groups(halves, 0.5, average, reduce)])
    assert ours.tolist() == [[True, False, True], [False, False, False]]  # narrow: 0.2 < 0.5 * 0.55
    now = (0.2 * deviation + deviation + 0) / 3
    assert average.value == pytest.approx((0.5 * before + now) / 1.5)
    kept = kept_thoughts(drop_groups(halves, 0.5, average, reduce)[0], 0.45)
    assert kept.tolist() == [[[False, False], [False, True], [False, False]]]


def test_a_filter_that_drops_nothing_changes_nothing(tmp_path):
    """Gradients to 1e-9 are those without the filter where no group is below it, and 0 where all groups are."""
    whole, _ = run(tmp_path, max_steps=2)
    for factor, share in ((0.0, 0.0), (1e9, 1.0)):
        ours, trainer = run(tmp_path, max_steps=2, reward_std_filter=factor)
        assert [entry["rl/dropped_groups"] for entry in logged(trainer)] == [0.0, share]
        for name, gradient in whole.items():
            mine = ours.get(name, torch.zeros(())).expand_as(gradient)
            torch.testing.assert_close(mine, gradient * (1 - share), rtol=1e-7, atol=1e-9, msg=name)


def test_the_filter_is_of_the_whole_step(tmp_path):
    """Two batches of a step drop the groups that one batch of both drops, with the same gradients; some are dropped, and some
    are not."""
    whole, oracle = run(tmp_path, max_steps=2, reward_std_filter=0.3)
    halves, trainer = run(tmp_path, 2, 2, max_steps=2, reward_std_filter=0.3)
    ours, theirs = (logged(x)[1]["rl/dropped_groups"] for x in (trainer, oracle))
    assert ours == pytest.approx(theirs, abs=1e-9) and 0.1 < theirs < 0.9
    for name, gradient in whole.items():
        mine = halves.get(name, torch.zeros(())).expand_as(gradient)
        torch.testing.assert_close(mine, gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_the_average_survives_a_checkpoint(tmp_path):
    """A resumed run goes on with the average of the steps before it, and drops the groups that the whole run drops."""
    options = dict(reward_std_filter=1.0, max_steps=3, learning_rate=1e-3)
    _, whole = run(tmp_path, **options, save_strategy="steps", save_steps=1)
    _, resumed = run(tmp_path / "again", resume=str(tmp_path / "checkpoint-1"), **options)
    assert resumed.step.state() == whole.step.state()
    assert [entry["rl/dropped_groups"] for entry in logged(resumed)] == [e["rl/dropped_groups"] for e in logged(whole)]
    assert whole.step.state()["reward_deviation"][1] == pytest.approx(1 + 0.99 + 0.99**2)


FURTHER = dict(advantage_threshold=1e-12, num_iterations=3, learning_rate=1e-2, max_steps=5)


def test_further_updates_log_what_is_theirs(tmp_path):
    """Rewards are those of all thoughts and logged once; how far the policy went is of the thoughts that are trained on again."""
    _, trainer = run(tmp_path, **FURTHER)
    entries = logged(trainer, "loss")
    assert ["rl/reward" in entry for entry in entries] == [True, False, False, True, False]
    assert ["rl/coherence" in entry for entry in entries] == [True, False, False, True, False]
    assert [entry["rl/clip_ratio"] > 0 for entry in entries] == [False, True, True, False, True]
    assert entries[0]["rl/num_thoughts"] == entries[3]["rl/num_thoughts"] > entries[1]["rl/num_thoughts"] > 0
    assert all("rl/policy_loss" in entry for entry in entries)


@pytest.mark.parametrize("options", [{}, dict(reward_std_filter=0.3, advantage_threshold=None)], ids=str)
def test_further_updates_go_on_from_a_checkpoint(options, tmp_path):
    """Between two updates of a batch: the same losses as without the break, and the same gradient in the end."""
    options = {**FURTHER, **options}
    whole, oracle = run(tmp_path, **options, save_strategy="steps", save_steps=1)
    for step in (2, 4):
        ours, trainer = run(tmp_path / "again", resume=str(tmp_path / f"checkpoint-{step}"), **options)
        assert [x["loss"] for x in logged(trainer, "loss")] == [x["loss"] for x in logged(oracle, "loss")]
        for name, gradient in whole.items():
            torch.testing.assert_close(ours[name], gradient, rtol=0, atol=0, msg=name)


def test_thoughts_of_opposite_worth_are_not_folded():
    """A reward function may judge the same words in two ways: the clipped surrogate is no longer linear then."""
    rewards, exists = torch.tensor([[[1.0, -1.0, 2.0, float("nan")]]]), torch.ones(1, 1, dtype=torch.bool)
    kept, folded = fold_repeats(
        experience := experience_with(rewards, exists, exists), experience.thoughts.mask[..., 0]
    )
    assert kept[0, 0, :2].all() and not kept[0, 0, 2] and folded.repeats[0, 0, 1] == 1
    assert folded.advantages.isnan().any()


@pytest.mark.parametrize(
    "options",
    [
        dict(advantage_baseline="value"),
        dict(distillation_coefficient=0.1, advantage_baseline="mean"),
    ],
)
def test_contradictions_are_refused(options, tmp_path):
    """The value head and distillation want every thought."""
    for name in ("advantage_threshold", "reward_std_filter"):
        with pytest.raises(ValueError, match=f"`{name}=0.1` leaves thoughts out"):
            tiny_args(tmp_path, **{name: 0.1}, **options)
