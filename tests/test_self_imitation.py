"""A run's own useful thoughts, which it goes on to imitate."""

import pytest
import torch
from datasets import Dataset

from trl_quietstar.text.batch import Text
from trl_quietstar.text.divided import Written, joined, without_thoughts
from trl_quietstar.training.imitation import SelfImitation, trimmed

from .tiny import byte_tokenizer, exact_model
from .training import Gradients, logged, tiny_args, tiny_trainer


TEXTS = ["1 plus 1 is 2 .", "7 plus 12 is 19 . 3 plus 4 is 7 .", "5", "2 plus 19 is 21 . 6 plus 6 is 12 ."]
OPTIONS = dict(
    num_thoughts=4,
    useful_gain=0.0,  # random weights gain little
    self_imitation_batch_size=3,
    learning_rate=1e-2,
    max_steps=3,
    max_grad_norm=0.0,
    value_head_hidden_size=256,
    per_device_train_batch_size=2,
    thought_stop_string="1",  # thoughts of unequal lengths
)


def run(folder, resume: str | None = None, data=None, **options):
    """Gradients of the steps, and the trainer."""
    gradients = Gradients()
    trainer = tiny_trainer(
        folder,
        model=exact_model(vocab_size=len(byte_tokenizer())),
        data=Dataset.from_dict({"text": TEXTS}) if data is None else data,
        callbacks=[gradients],
        **{**OPTIONS, **options},
    )
    trainer.train(resume_from_checkpoint=resume)
    return gradients.steps, trainer


@pytest.fixture
def seen(monkeypatch):
    """What each batch adds to the memory, and what it is given of it: text, experience and memory before and after; memory and batch."""
    added, given = [], []
    add, beside = SelfImitation.add, SelfImitation.beside

    def adding(self, text, scores, experience, rows):
        self._gather()
        before = list(self._kept)
        add(self, text, scores, experience, rows)
        self._gather()
        added.append((text, scores, experience, before, list(self._kept)))

    def drawing(self, *args):
        batches = beside(self, *args)
        given.extend((list(self._kept), divided) for divided in batches)
        return batches

    monkeypatch.setattr(SelfImitation, "add", adding)
    monkeypatch.setattr(SelfImitation, "beside", drawing)
    return added, given


def test_the_best_of_mixed_groups_are_kept(tmp_path, seen):
    """Of each group that holds useful and useless thoughts the one that earned most, with the text it follows; by hand."""
    run(tmp_path)
    kinds = set()
    for text, scores, experience, before, after in seen[0]:
        wanted = []
        p_with, p_without = (
            x.masked_fill(~experience.score_mask, 0).sum(-1).exp()
            for x in (scores.reader_logps, experience.logps_without)
        )
        for row, column in experience.thoughts.positions.mask.nonzero().tolist():
            gains = (p_with - p_without)[row, column]
            rewards = [float(r) for r in experience.rewards[row, column]]
            helpful = [g for g in range(len(gains)) if gains[g] > 0]
            kinds.add(len(helpful))
            if 0 < len(helpful) < len(gains):
                best = max(helpful, key=lambda g: rewards[g])
                mask = experience.thoughts.mask[row, column, best]
                ids = experience.thoughts.token_ids[row, column, best][mask].tolist()
                length = int(text.attention_mask[row].sum())
                place = int(experience.thoughts.positions.index[row, column])
                wanted.append((text.input_ids[row, :length].tolist(), place, ids))
        found = [
            (x["input_ids"][0].tolist(), int(x["index"]), x["thought_ids"].flatten().tolist())
            for x in after[len(before) :]
        ]
        assert found == wanted
        assert all(x["mask"].all() and x["attention_mask"].all() and x["exists"].all() for x in after)
    assert {0, 4} & kinds and {1, 2, 3} & kinds  # both kinds of groups came


def test_a_batch_is_given_thoughts_from_before(tmp_path, seen):
    """Up to `self_imitation_batch_size` different ones of those that are kept, none at first; another choice at another step."""
    _, trainer = run(tmp_path, max_steps=6)
    given = seen[1]
    assert [len(kept) for kept, _ in given] == [0, *(len(after) for *_, after in seen[0][:-1])]
    assert given[0][1].written is None
    for kept, divided in given[1:]:
        written = divided.written.tensors()
        drawn = [
            next(i for i, x in enumerate(kept) if equal(x, {name: y[row : row + 1] for name, y in written.items()}))
            for row in range(len(written["index"]))
        ]
        assert len(set(drawn)) == len(drawn) == min(3, len(kept))
    assert all("rl/written_nll" in entry for entry in logged(trainer)[1:])


def equal(kept: dict, padded: dict) -> bool:
    """Whether a row is the kept one, but for what fills it up."""
    return all(
        torch.equal(x, padded[name][tuple(slice(size) for size in x.shape)]) for name, x in kept.items()
    ) and bool(
        (padded["attention_mask"].sum(), padded["mask"].sum()) == (kept["attention_mask"].sum(), kept["mask"].sum())
    )


def test_only_the_latest_are_kept(tmp_path, seen):
    """The memory holds no more than `self_imitation_memory`."""
    run(tmp_path, self_imitation_memory=2)
    *_, before, after = seen[0][-1]
    assert len(before) == len(after) == 2 and not equal(before[0], after[0])


def test_it_counts_as_written_thoughts_do(tmp_path, seen):
    """Beside rows that the data teach: text, thoughts and labels of each are scored as they are alone, in float64 to 1e-9."""
    rows = [{"prompt": "1 plus 2", "completion": " is 3 .", "thought": "2 3"}] + [
        {"prompt": f"{i} plus 1", "completion": f" is {i + 1} . {'7 ' * i}", "thought": None} for i in range(3)
    ]
    options = dict(thought_positions="prompt_end", per_device_train_batch_size=4, num_thoughts=8, thought_length=6)
    _, trainer = run(tmp_path, data=Dataset.from_list(rows), max_steps=4, **options)
    written = seen[1][-1][1].written
    assert len(written.text.input_ids) == 4  # one of the data
    model, device = trainer.model, torch.device("cpu")
    whole = trainer.thinker.written_request(written).scores(model)
    for i in range(4):
        alone = trimmed({name: x[i : i + 1] for name, x in written.tensors().items()})
        one = Written.of(alone, device)
        ours = trainer.thinker.written_request(one).scores(model)
        for name in ("thought_logps", "talk_logps", "reader_logps"):
            own, other = getattr(ours, name)[0, 0, 0], getattr(whole, name)[i, 0, 0]
            mask = one.thoughts.mask[0, 0, 0] if name == "thought_logps" else None
            length = int(mask.sum()) if mask is not None else int((one.text.labels[0] != -100).sum())
            torch.testing.assert_close(own[:length], other[:length], rtol=1e-9, atol=1e-9)


def test_parts_are_joined():
    """Rows of other lengths are filled up with what means nothing."""
    short, long = (
        without_thoughts(Text.from_batch(torch.ones(1, size, dtype=torch.long))).tensors() for size in (3, 5)
    )
    whole = joined([short, long], torch.device("cpu"))
    assert whole.text.attention_mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert whole.text.labels.eq(-100).all() and not whole.thoughts.mask.any()


@pytest.mark.parametrize("options", [{}, dict(num_iterations=2), dict(gradient_accumulation_steps=2)], ids=str)
def test_a_checkpoint_holds_the_memory(options, tmp_path):
    """A resumed run ends bit for bit as the whole one; a run that begins anew begins without thoughts."""
    whole, oracle = run(tmp_path, **options, max_steps=5, save_strategy="steps", save_steps=1)
    for step in (2, 3):
        resumed, trainer = run(tmp_path / "again", resume=str(tmp_path / f"checkpoint-{step}"), max_steps=5, **options)
        assert len(trainer.step.imitation) == len(oracle.step.imitation) > 3
        for name, gradient in whole[-1].items():
            assert torch.equal(resumed[-1][name], gradient), name
    trainer.step.begin_run()
    assert len(trainer.step.imitation) == 0


def test_a_stage_may_begin_it(tmp_path, seen):
    """Of a curriculum: nothing is kept before."""
    run(
        tmp_path, self_imitation_batch_size=0, curriculum={"0": {}, "2": {"self_imitation_batch_size": 2}}, max_steps=4
    )
    assert [divided.written is None for _, divided in seen[1]] == [True, False]


@pytest.mark.parametrize("options", [dict(written_thought_coefficient=0.0), dict(thought_positions="none")], ids=str)
def test_contradictions_are_refused(options, tmp_path):
    """Without a weight, and where nothing is sampled."""
    with pytest.raises(ValueError, match="`self_imitation_batch_size=2` imitates thoughts"):
        tiny_args(tmp_path, self_imitation_batch_size=2, **options)
