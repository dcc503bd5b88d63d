"""Two thousand steps of everything that a run repeats: memory, open files and the time of a step stay flat."""

import gc
import time

import psutil
import pytest
from transformers import TrainerCallback

from .training import plain_model, text_data, tiny_trainer


STEPS = 2_000
EVERY = 200  # steps between evaluations and checkpoints
MIB = 2**20


class Meter(TrainerCallback):
    """CPU time of each step without evaluation and saving; memory and open files at every `EVERY` steps."""

    def __init__(self):
        self.process = psutil.Process()
        self.seconds, self.memory, self.files, self.history = [], {}, {}, {}
        self.start = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.start)

    def on_save(self, args, state, control, **kwargs):
        gc.collect()
        self.memory[state.global_step] = self.process.memory_info().rss
        self.files[state.global_step] = self.process.num_fds()
        self.history[state.global_step] = len(state.log_history)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


@pytest.mark.slow
def test_a_long_run_is_flat(tmp_path, capsys):
    """From step 200 to step 2,000 resident memory grows by less than 5%, no file stays open, and a step takes no longer."""
    meter = Meter()
    trainer = tiny_trainer(
        tmp_path,
        plain_model(hidden_size=16, num_hidden_layers=1, intermediate_size=24, num_attention_heads=2),
        text_data(200),
        text_data(8, 300),
        max_steps=STEPS,
        logging_steps=10,
        log_thoughts=True,
        eval_strategy="steps",
        eval_steps=EVERY,
        save_strategy="steps",
        save_steps=EVERY,
        save_total_limit=2,
        per_device_train_batch_size=2,
        callbacks=[meter],
    )
    trainer.train()
    early, late = median(meter.seconds[EVERY : 2 * EVERY]), median(meter.seconds[-EVERY:])
    with capsys.disabled():
        print()
        for step in meter.memory:
            print(f"step {step}: {meter.memory[step] / MIB:.1f} MiB, {meter.files[step]} files open", end="")
            print(f", {meter.history[step]} log entries")
        print(f"CPU time of a step: {1e3 * early:.2f} ms early, {1e3 * late:.2f} ms late")
    assert len(meter.seconds) == STEPS and list(meter.memory) == list(range(EVERY, STEPS + 1, EVERY))
    assert meter.memory[STEPS] < 1.05 * meter.memory[EVERY]
    assert meter.files[STEPS] <= meter.files[EVERY]
    assert late < 1.3 * early
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
