"""The settings of [`benchmarks.real`], by task and stage, and for a GPU."""

from dataclasses import asdict, dataclass, field, fields, replace

import torch

from benchmarks.learning import parse
from trl_quietstar._compat import is_slow_in_bf16
from trl_quietstar.precision import has_bf16


@dataclass(frozen=True)
class Settings:
    """
    What a task is run with.

    Parameters:
        problems, written, held_out, watched (`int`):
            Problems to train on; those of them with a written thought; held-out ones at the end, and of these on the way.
        terms, digits (`int`):
            Size of a sum.
        examples (`int`):
            Worked problems before each problem, as it is thought about and answered; all arms see them.
        fewest_terms (`int`):
            Of the problems that are trained on by their answers alone, which have up to `terms`.
        cold_share (`float`):
            Share of the time of `thinking` that is its cold start.
        written_mix (`int`):
            Rows in a step of reinforcement after a cold start that hold written thoughts.
        warmup, decay (`float`):
            Share of an arm's time in which learning rates rise at its start, and in which they fall to 0 at its end.
        points (`int`):
            Measurements on the way, at equal distances of time used.
        checkpoint_minutes (`float`):
            Processor time between checkpoints.
        stages (`dict[str, dict]`):
            Fields of [`QuietStarConfig`] in the stages `written`, `reinforcement` and `plain`; under `all`, in each.
    """

    problems: int = 32_000
    written: int = 500
    held_out: int = 500
    watched: int = 64
    terms: int = 4
    fewest_terms: int = 2
    digits: int = 2
    examples: int = 0
    cold_share: float = 0.1
    written_mix: int = 0
    warmup: float = 0.05
    decay: float = 0.8
    points: int = 6
    checkpoint_minutes: float = 10.0
    stages: dict[str, dict] = field(default_factory=dict)

    def changed(self, changes: list[str]) -> "Settings":
        """With `FIELD=VALUE` and `STAGE.FIELD=VALUE` from the command line."""
        values = asdict(self)
        for name, value in (change.split("=", 1) for change in changes):
            stage, dot, option = name.rpartition(".")
            place = values["stages"].get(stage, {}) if dot else values
            if dot and stage not in values["stages"] or not dot and (name not in values or name == "stages"):
                known = [field.name for field in fields(self) if field.name != "stages"]
                known += [f"{stage}.FIELD" for stage in self.stages]
                raise ValueError(f"`--set {name}`: there is no such setting; give one of {', '.join(known)}.")
            place[option] = parse(value)
        return Settings(**values)


# of every run: how it is run, and what is written about it
RUN = {
    "max_steps": 10**7,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "save_total_limit": 1,
    "logging_steps": 20,
    "report_to": "none",
    "disable_tqdm": True,
}
# as the other arms have it
PLAIN = {"completion_only_loss": True, "gradient_checkpointing": False, "model_init_kwargs": {"dtype": "float32"}}
COMMON = {
    "max_length": 64,
    "thought_positions": "prompt_end",
    "talk_length": "completion",
    "thought_length": 40,
    "thought_start_text": " [",
    "thought_end_text": "]",
    "thought_stop_string": "]",
    "reward_prediction": "thought",
    "advantage_baseline": "leave_one_out",
    "heads_learning_rate": 1e-3,
    "base_nll_coefficient": 0.0,  # answers without thoughts are what `plain` is for
    "reader_nll_coefficient": 0.0,  # the same as the other one, where the thought's prediction is the only one
    "preflight_thoughts": None,  # the first point of the curve tells more
    "per_device_eval_batch_size": 50,
    "bf16": has_bf16() if torch.accelerator.is_available() else not is_slow_in_bf16(torch.device("cpu")),
}
SETTINGS = {
    "chain_sum": Settings(
        stages={
            "all": COMMON,
            "written": {
                "per_device_train_batch_size": 16,
                "learning_rate": 3e-4,
                "base_nll_coefficient": 0.1,  # what to say without a thought; else the steps are said aloud, and divergence fails
            },
            "reinforcement": {
                "per_device_train_batch_size": 32,
                "num_thoughts": 8,
                "learning_rate": 1e-4,
                # of answers: partly right ones earn little, and thoughts without an advantage cost no update
                "reward_type": "sequence_probability",
                "nll_weighting": "probability",
                "advantage_threshold": 0.02,
                "positive_advantages_only": True,
                "entropy_coefficient": 0.0,
                "min_entropy_coefficient": 0.0,
                "logging_steps": 16,  # some of what is logged costs as much as half a step
            },
            "plain": {"per_device_train_batch_size": 16, "learning_rate": 3e-4},
        },
    ),
}
# a GPU takes hardly longer for more thoughts, and plain training of the same time far more rows
ON_GPU = (
    "cold_share=0.2",
    "reinforcement.per_device_train_batch_size=128",
    "reinforcement.learning_rate=2e-4",
    "plain.per_device_train_batch_size=64",
    "plain.gradient_accumulation_steps=1",
)
# which a model begins to think about by examples in the prompt alone
SETTINGS["step_sum"] = replace(
    SETTINGS["chain_sum"],
    **dict(problems=2_400, terms=3, fewest_terms=3, digits=1, examples=4, watched=40, warmup=0.1),
    stages={
        **SETTINGS["chain_sum"].stages,
        "all": {
            **{
                **COMMON,
                "max_length": 256,
                "thought_length": 26,
                "thought_format": "text",
                "thought_stop_string": None,
            },
            **{"thought_start_text": ":", "thought_end_text": ", so"},
        },
        "reinforcement": {
            **SETTINGS["chain_sum"].stages["reinforcement"],
            **{"per_device_train_batch_size": 16, "num_thoughts": 16, "learning_rate": 3e-5, "logging_steps": 4},
        },
    },
)
WORD_PROBLEMS = replace(
    SETTINGS["chain_sum"],
    problems=7_000,
    written=7_000,
    stages={
        **SETTINGS["chain_sum"].stages,
        "all": {**COMMON, "max_length": 256, "thought_length": 96},
        # all 16 texts at once take 12 GB, which is too much beside another arm
        "plain": {
            **SETTINGS["chain_sum"].stages["plain"],
            **{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
        },
    },
)
SETTINGS |= {"gsm_symbolic": WORD_PROBLEMS, "gsm8k": WORD_PROBLEMS}
