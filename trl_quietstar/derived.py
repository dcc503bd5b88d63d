"""What follows from the options of a run."""

from typing import TYPE_CHECKING, Any

from .curriculum import Curriculum
from .learning.advantages import BASELINES
from .other_trainers import refuse_options
from .readers import READERS
from .settings import OPTIONS, QuietStarSettings


VALUE_BASELINES = tuple(name for name, baseline in BASELINES.items() if baseline.uses_value_head)


class Derived:
    """What the options of a [`QuietStarConfig`] decide, now and at later stages."""

    if TYPE_CHECKING:
        advantage_baseline: str
        temperature: float
        policy_temperature: float | None
        epsilon: float
        epsilon_high: float | None
        advantage_threshold: float | None
        reward_std_filter: float | None
        beta: float
        no_thought_model: str
        muon_learning_rate: float | None
        grokfast_lambda: float
        curriculum: dict | str | None
        stages: Curriculum

    def __new__(cls, *args: Any, **options: Any):
        refuse_options(cls, options)  # ahead of `__init__`, which would only say that there is no such argument
        return super().__new__(cls)

    def settings(self) -> QuietStarSettings:
        """The part of the configuration that a saved model keeps."""
        return QuietStarSettings(**{setting: getattr(self, option) for setting, option in OPTIONS.items()})

    def enter_stage(self, step: int) -> bool:
        """Sets the options of the curriculum to what they are at an optimizer step; returns whether any changed."""
        return self.stages.enter(step, vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickles, also a `training_args.bin` from before an option had its type or the stages were an object."""
        vars(self).update(state)
        vars(self).update({name: read(state[name]) for name, read in READERS.items() if name in state})
        if "_before_stages" in state:
            self.stages = Curriculum(self.curriculum, state["_before_stages"], READERS)

    @property
    def uses_value_head(self) -> bool:
        """Whether advantages come from the value head."""
        return self.advantage_baseline in VALUE_BASELINES

    @property
    def logps_temperature(self) -> float:
        """Temperature that the policy's log-probabilities are taken at."""
        return self.temperature if self.policy_temperature is None else self.policy_temperature

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far below and above 1 the probability ratio may go."""
        return self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def drops_thoughts(self) -> bool:
        """Whether thoughts are left out of the update once they are judged."""
        return self.advantage_threshold is not None or self.reward_std_filter is not None

    @property
    def uses_reference(self) -> bool:
        """Whether a reference model is needed."""
        return self.beta > 0 or self.no_thought_model == "reference"

    @property
    def combines_optimizers(self) -> bool:
        """Whether Muon or Grokfast act beside AdamW."""
        return self.muon_learning_rate is not None or self.grokfast_lambda > 0

    @property
    def longest_thought(self) -> int:
        """The largest `thought_length` of all stages."""
        return max(self.stages.at(step)["thought_length"] for step in self.stages.starts)
