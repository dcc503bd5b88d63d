"""What a batch is measured by, and running sums of it over a window and over processes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .advantages import explained_variance
from .geometry import Text, Thoughts
from .scoring import Scores


@dataclass(frozen=True)
class BatchResult:
    """
    All that one batch yielded on its way to the loss.

    Parameters:
        text ([`Text`]), thoughts ([`Thoughts`]), scores ([`Scores`]):
            The batch, its thoughts, and their scores.
        talk_mask, logps_without, correct_without (`torch.Tensor` of shape `(B, J, 1, M)`):
            Talk tokens that count, and the no-thought prediction of them.
        rewards (`torch.Tensor` of shape `(B, J, G)`):
            Of the thoughts.
        advantages, returns (`torch.Tensor` of shape `(B, J, G, L)`):
            Of the thought tokens.
        loss (`torch.Tensor`), terms (`dict[str, torch.Tensor]`):
            The objective and its unweighted terms.
    """

    text: Text
    thoughts: Thoughts
    scores: Scores
    talk_mask: torch.Tensor
    logps_without: torch.Tensor
    correct_without: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    loss: torch.Tensor
    terms: dict[str, torch.Tensor]

    @property
    def exists(self) -> torch.Tensor:
        """Mask of shape `(B, J, G)`: thoughts that were written."""
        return self.thoughts.positions.mask[..., None].expand_as(self.rewards)


# values and the mask or weight of each, or None where there is nothing to measure
Measured = tuple[torch.Tensor, torch.Tensor] | None


def batch_metrics(batch: BatchResult) -> dict[str, Measured]:
    """
    The metrics of a batch, by their names without prefix.

    Args:
        batch ([`BatchResult`]):
            The batch.

    Returns:
        `dict`: for each metric its values and their mask, whose mean is the metric; None where it is undefined.
    """
    scores, tokens, exists = batch.scores, batch.thoughts.mask, batch.exists
    said = batch.talk_mask.expand_as(scores.talk_logps)
    return {
        "reward": (batch.rewards, exists),
        "reward_std": _scalar(batch.rewards[exists].std(correction=0)),
        "policy_loss": _scalar(batch.terms["policy_loss"]),
        "value_loss": _scalar(batch.terms["value_loss"]),
        "explained_variance": _scalar(explained_variance(scores.thought_values, batch.returns, tokens)),
        "entropy": (scores.thought_entropies, tokens),
        "advantages": (batch.advantages, tokens),
        "kl_divergence": _scalar(batch.terms["kl_divergence"]) if "kl_divergence" in batch.terms else None,
        **({"router_loss": _scalar(batch.terms["router_loss"])} if "router_loss" in batch.terms else {}),
        "total_loss": _scalar(batch.loss),
        "mixing_weight": (scores.mixing_weights, said),
        "nll_with": (-scores.talk_logps, said),
        "reader_nll": (-scores.reader_logps, said),
        "nll_without": (-batch.logps_without.expand_as(scores.talk_logps), said),
        "accuracy_with": (scores.talk_correct, said),
        "accuracy_without": (batch.correct_without.expand_as(scores.talk_correct), said),
        "thought_length": (tokens.sum(-1), exists),
    }


def _scalar(value: torch.Tensor) -> Measured:
    return None if torch.isnan(value) else (value, torch.ones_like(value))


class MetricSums:
    """
    Sum and weight of each metric since the last reset.

    Args:
        saved (`dict[str, list[float]]`, *optional*):
            What [`MetricSums.state`] gave.
    """

    def __init__(self, saved: dict[str, list[float]] | None = None):
        self._sums: dict[str, list[float]] = saved or {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, metrics: dict[str, Measured], reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """
        Adds a batch.

        Args:
            metrics (`dict`):
                As [`batch_metrics`] gives them; the same names on every process.
            reduce (`Callable`):
                Sums a tensor over processes.
        """
        nothing = torch.zeros(2, dtype=torch.float64)
        pairs = [
            nothing if m is None else torch.stack([_total(m[0], m[1]), _total(m[1])]).cpu() for m in metrics.values()
        ]
        for name, (total, weight) in zip(metrics, reduce(torch.stack(pairs)).tolist(), strict=True):
            sums = self._sums.setdefault(name, [0.0, 0.0])
            sums[0] += total
            sums[1] += weight

    def total(self, name: str) -> float:
        """Weighted sum of a metric; 0 where nothing was added."""
        return self._sums.get(name, [0.0, 0.0])[0]

    def mean(self, name: str) -> float | None:
        """Mean of a metric; None where nothing was measured."""
        total, weight = self._sums.get(name, [0.0, 0.0])
        return total / weight if weight else None

    def means(self) -> dict[str, float | None]:
        """Mean of every metric."""
        return {name: self.mean(name) for name in self._sums}

    def state(self) -> dict[str, list[float]]:
        """For a checkpoint."""
        return self._sums


def _total(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return values.double().sum() if mask is None else (values.double() * mask).sum()
