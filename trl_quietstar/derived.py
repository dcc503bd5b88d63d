"""What follows from the options of a run."""

from typing import TYPE_CHECKING

from .curriculum import Curriculum
from .learning.advantages import BASELINES


VALUE_BASELINES = tuple(name for name, baseline in BASELINES.items() if baseline.uses_value_head)


class Derived:
    """Properties of [`QuietStarConfig`] that its options decide."""

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
        stages: Curriculum

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
