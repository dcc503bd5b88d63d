"""Before training: how many of the model's thoughts are useful, and in how many groups some are; and nothing else changes."""

import pytest
from datasets import Dataset
from peft import LoraConfig

from trl_quietstar.training.preflight import PreflightCallback

from .tiny import sums
from .training import LORA, assert_same_logs, assert_same_state, finite, logged, text_data, tiny_trainer


USEFUL, MIXED = "preflight_useful_thoughts", "preflight_mixed_groups"
ANSWERS = Dataset.from_dict(
    {
        "prompt": [f"{a} plus {b} is" for a in range(4) for b in range(4)],
        "completion": [f" {a + b} ." for a in range(4) for b in range(4)],
    }
)
AT_ONCE = dict(thought_positions="prompt_end", talk_length="completion", reward_prediction="thought")


@pytest.fixture
def messages(caplog):
    """What was said, with its level."""
    return lambda: [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name == "trl_quietstar.training.preflight"
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(data=text_data(16).to_iterable_dataset().shuffle(seed=1, buffer_size=4), max_length=64),
        dict(data=ANSWERS, **AT_ONCE, disable_dropout=False, thought_stop_string="1"),
        dict(peft_config=LoraConfig(**LORA, lora_dropout=0.1), beta=0.1),
        dict(thought_positions="difficulty", difficulty_threshold=0.1, single_pass=False),
    ],
    ids=["map-style", "stream", "answers", "lora", "difficulty"],
)
def test_training_is_the_same_with_it_and_without(options, tmp_path):
    """Weights and logs of the run are equal to the bit."""
    with_, without = (tiny_trainer(tmp_path, preflight_thoughts=count, **options) for count in (12, None))
    with_.train(), without.train()
    assert_same_logs(with_, without)
    assert_same_state(with_.model, without.model)
    (entry,) = logged(with_, USEFUL)
    assert entry["step"] == 0 and finite(entry[USEFUL]) and finite(entry[MIXED])
    assert logged(without, USEFUL) == []


@pytest.mark.parametrize("gain", [0.0, 1e-4, 1e-3])
def test_the_shares_are_those_of_the_first_step(gain, tmp_path):
    """On the rows of the first step, which draws the same thoughts, preflight finds what that step logs."""
    options = dict(train_sampling_strategy="sequential", per_device_train_batch_size=8, useful_gain=gain, **AT_ONCE)
    trainer = tiny_trainer(tmp_path, data=ANSWERS, preflight_thoughts=16, max_steps=1, num_thoughts=2, **options)
    trainer.train()
    (before,), (step,) = logged(trainer, USEFUL), logged(trainer)
    assert before[USEFUL] == pytest.approx(step["rl/useful_thoughts"])
    assert before[MIXED] == pytest.approx(step["rl/mixed_groups"])
    assert gain > 0 or 0 < before[USEFUL] < 1


@pytest.mark.parametrize(
    ("data", "options", "thoughts"),
    [
        # six positions in each row
        (text_data(64), dict(thought_positions="all"), 72),
        (text_data(64), dict(thought_positions="all", num_thoughts=3), 72),
        (text_data(4), dict(thought_positions=0.1), 48),
        # up to eight of hundreds
        (Dataset.from_dict({"text": [" ".join(sums()[:15])] * 8}), dict(thought_positions="all"), 64),
        (ANSWERS, AT_ONCE, 32),  # at all positions that there are
        (text_data(64), dict(thought_positions=1, num_thoughts=1), 66),
    ],
    ids=str,
)
def test_few_thoughts_are_tried(data, options, thoughts, tmp_path, messages):
    """About as many as asked for, whatever the number of positions in a row."""
    tiny_trainer(tmp_path, data=data, preflight_thoughts=64, max_steps=1, **options).train()
    ((_, message),) = messages()
    assert f" of {thoughts} thoughts raise" in message


def test_rows_without_a_position_are_passed_over(tmp_path, messages):
    """Rows that allow no thought are none of the first rows."""
    rows = [{"input_ids": [5, 6, 7, 8], "thought_mask": [0, int(i % 2), 0, 0]} for i in range(16)]
    tiny_trainer(tmp_path, data=Dataset.from_list(rows), preflight_thoughts=8, max_steps=1).train()
    ((_, message),) = messages()
    assert " of 8 thoughts raise" in message


def test_it_is_skipped_where_there_is_nothing_to_try(tmp_path, messages):
    """Off, in plain training, and where a run goes on."""
    tiny_trainer(tmp_path, preflight_thoughts=None).train()
    tiny_trainer(tmp_path, preflight_thoughts=8, thought_positions="none").train()
    assert messages() == []
    options = dict(preflight_thoughts=8, save_strategy="steps", save_steps=2, max_steps=3)
    tiny_trainer(tmp_path, **options).train()
    assert len(messages()) == 1
    resumed = tiny_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert len(messages()) == 1 and len(logged(resumed, USEFUL)) == 1


def preflight(trainer) -> None:
    """Without the training that follows."""
    PreflightCallback(trainer).on_train_begin(trainer.args, trainer.state, trainer.control)


def test_it_warns_where_hardly_any_thought_is_useful(tmp_path, messages, caplog):
    """What was measured and what helps, in a warning; where thoughts are useful, or the data bring written ones, only the
    former. Rows with written thoughts are not sampled in training either, and alone they are nothing to measure."""
    caplog.set_level("INFO", "trl_quietstar.training.preflight")
    preflight(tiny_trainer(tmp_path, data=ANSWERS, preflight_thoughts=16, useful_gain=1.0, **AT_ONCE))
    preflight(tiny_trainer(tmp_path, data=ANSWERS, preflight_thoughts=16, useful_gain=0.0, **AT_ONCE))
    options = dict(preflight_thoughts=16, useful_gain=1.0, min_thought_length=1)
    for share in (2, 1):
        written = [["1 2"] if i % share == 0 else [] for i in range(len(ANSWERS))]
        preflight(tiny_trainer(tmp_path, data=ANSWERS.add_column("thought", written), **options, **AT_ONCE))
    (bad, complaint), (good, praise), (taught, silence) = messages()
    assert (bad, good, taught) == ("WARNING", "INFO", "INFO") and " of 16 thoughts" in silence
    assert complaint.startswith("Before training, 0% of 16 thoughts") and "written thoughts first" in complaint
    assert "`num_thoughts`" in complaint and "`temperature`" in complaint
    assert "reinforce" not in praise and "reinforce" not in silence
