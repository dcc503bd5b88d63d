"""Metrics of a batch, and their running sums over a logging window and over processes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..text.batch import Positions, Text
from ..text.transfer import exact_dtype, to_device
from ..thinking.scoring import Scores
from .experience import Experience
from .objective import WrittenInputs
from .rewards import exact_match, is_mixed, useful


if TYPE_CHECKING:
    from ..config import QuietStarConfig


@dataclass(frozen=True)
class BatchResult:
    """
    The numbers that one batch yields on its way to the loss.

    Parameters:
        text ([`Text`]), scores ([`Scores`]), experience ([`Experience`]):
            The batch, the scores of its thoughts, and what they are worth.
        loss (`torch.Tensor`), terms (`dict[str, torch.Tensor]`):
            This batch's part of the step's objective, and of its unweighted terms.
        share (`float`):
            Share of this batch among the batches of the step, on all processes.
        finite (`torch.Tensor`, scalar bool, *optional*):
            Whether reward, loss and terms are finite on all processes; it lies on the device, so that the host does not wait.
        written ([`~learning.objective.WrittenInputs`], *optional*):
            Of the batch's rows with written thoughts.
        is_reused (`bool`):
            Whether this is a further update on the thoughts of a batch that are worth training on. What all of them are worth was
            measured by the update that sampled them; only what belongs to this update is then logged.
    """

    text: Text
    scores: Scores
    experience: Experience
    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    share: float = 1.0
    finite: torch.Tensor | None = None
    written: WrittenInputs | None = None
    is_reused: bool = False


# values, and the mask or weight of each value; None where there is nothing to measure
Measured = tuple[torch.Tensor, torch.Tensor] | None

# metrics of an evaluation
EVAL_METRICS = (
    *("reward", "nll_with", "nll_without", "accuracy_with", "accuracy_without", "coherence"),
    *("exact_match_with", "exact_match_without", "useful_thoughts"),
)
PENALIZED = ("gain", "penalty")  # those that it has, too, where the reward has a penalty
# metrics that follow from the spread of others
DERIVED = ("reward_std", "explained_variance")
# terms of the objective, of which a batch holds its part of the step's mean
PARTS = ("policy_loss", "value_loss", "kl_divergence", "total_loss")
# what an update on thoughts from before has of its own
OF_UPDATE = (*PARTS, "router_loss", "clip_ratio", "written_nll", "written_reader_nll")


def batch_metrics(batch: BatchResult) -> dict[str, Measured]:
    """
    The metrics of a batch, by their names without prefix: they are logged as `rl/*`, and those in `EVAL_METRICS` are an
    evaluation's, too. A new metric is one entry here; names that begin with `_` are summed for others and not logged.

    Args:
        batch ([`BatchResult`]):
            The batch.

    Returns:
        `dict`: for each metric its values and their mask, whose mean is the metric; None where it is undefined.
    """
    scores, experience = batch.scores, batch.experience
    tokens, exists, written = experience.thoughts.mask, experience.exists, batch.written
    said, scored = (mask.expand_as(scores.talk_logps) for mask in (experience.talk_mask, experience.score_mask))
    has_score = exists & scored.any(-1)
    exact = exact_dtype(tokens.device)
    share = torch.full((), batch.share, dtype=exact, device=tokens.device)
    parts = {"total_loss": batch.loss, **batch.terms}
    functions = {name: pair for name, pair in experience.measured.items() if name.startswith("rewards/")}
    judged = tokens if experience.value_weights is None else tokens * experience.value_weights
    moments = {
        **functions,
        "reward": (experience.rewards, exists),
        "return": (experience.returns, judged),
        "residual": (experience.returns - scores.thought_values.detach(), judged),
    }
    fined = {}
    if experience.penalties is not None:
        fined["gain"] = (experience.rewards + experience.penalties, exists)
        fined["penalty"] = (experience.penalties, exists)
    return {
        "reward": moments["reward"],
        **fined,
        **{name: (parts[name] / share, share) if name in parts else None for name in PARTS},
        **{name: (parts[name] / share, share) for name in ("router_loss", "distillation_loss") if name in parts},
        "entropy": (scores.thought_entropies, tokens),
        "advantages": (experience.advantages, tokens),
        "mixing_weight": (scores.mixing_weights, said),
        "nll_with": (-scores.talk_logps, said),
        "reader_nll": (-scores.reader_logps, said),
        "nll_without": (-experience.logps_without.expand_as(scores.talk_logps), said),
        "accuracy_with": (scores.talk_correct, scored),
        "accuracy_without": (experience.correct_without.expand_as(scores.talk_correct), scored),
        "exact_match_with": (exact_match(scores.talk_correct, scored), has_score),
        "exact_match_without": (exact_match(experience.correct_without, scored), has_score),
        "thought_length": (tokens.sum(-1), exists),
        "written_nll": None if written is None else (-written.thought_logps, written.thought_mask),
        "written_reader_nll": None if written is None else (-written.reader_logps, written.talk_mask),
        **{f"_{name}": (values.to(exact), mask) for name, (values, mask) in moments.items()},
        **{f"_{name}_square": (values.to(exact) ** 2, mask) for name, (values, mask) in moments.items()},
    }


def group_metrics(
    reader_logps: torch.Tensor,
    logps_without: torch.Tensor,
    talk_mask: torch.Tensor,
    positions: Positions,
    useful_gain: float,
) -> dict[str, Measured]:
    """
    How many thoughts help, and in how many groups some do and some do not: what reinforcement lives on.

    Thoughts are judged by the prediction after the thought alone, so that a mixing head that is nearly closed hides nothing.

    Args:
        reader_logps (`torch.Tensor` of shape `(B, J, G, M)`), logps_without, talk_mask (of shape `(B, J, 1, M)`):
            Log-probabilities in nats of the talk tokens by the thought's prediction and without a thought, and which count.
        positions ([`Positions`]):
            Where the thoughts were written.
        useful_gain (`float`):
            Above which gain in the probability of the whole talk a thought is useful.

    Returns:
        As [`batch_metrics`].
    """
    is_useful = useful(reader_logps, logps_without, talk_mask, useful_gain)
    return {
        "useful_thoughts": (is_useful, positions.mask[..., None].expand_as(is_useful)),
        "mixed_groups": (is_mixed(is_useful), positions.mask) if is_useful.shape[-1] > 1 else None,
    }


def run_metrics(batch: BatchResult, args: "QuietStarConfig") -> dict[str, Measured]:
    """
    The metrics of a batch as the options of a run have them, by their names without prefix.

    Args:
        batch ([`BatchResult`]):
            The batch.
        args ([`QuietStarConfig`]):
            The options.

    Returns:
        As [`batch_metrics`].
    """
    experience = batch.experience
    talk = (batch.scores.reader_logps, experience.logps_without, experience.score_mask)
    metrics = {
        **batch_metrics(batch),
        **group_metrics(*talk, experience.thoughts.positions, args.useful_gain),
    }
    if args.reward_std_filter is not None:
        dropped = experience.dropped
        metrics["dropped_groups"] = None if dropped is None else (dropped, experience.groups)
    if not args.uses_value_head:
        metrics["value_loss"] = metrics["_residual"] = None
    if args.thought_positions == "none":  # no talk to take them on: of all text
        predicted = batch.text.predicted()
        metrics["nll_without"] = (-batch.scores.text_logps, predicted)
        metrics["accuracy_without"] = (batch.scores.text_correct, predicted)
    if args.num_iterations > 1:
        low, high = args.clip_range
        ratio = torch.exp(batch.scores.thought_logps - batch.experience.sampled_logps)
        metrics["clip_ratio"] = ((ratio < 1 - low) | (ratio > 1 + high), batch.experience.thoughts.mask)
    if batch.is_reused:
        metrics = {name: value if name in OF_UPDATE else None for name, value in metrics.items()}
    return metrics


class MetricSums:
    """
    Sum and weight of each metric since the last reset. They add up on the device, and are read when they are asked for.

    Args:
        saved (`dict[str, list[float]]`, *optional*):
            What [`MetricSums.state`] gave.
    """

    def __init__(self, saved: dict[str, list[float]] | None = None):
        self._names = list(saved or {})
        self._sums = torch.tensor(list((saved or {}).values()), dtype=torch.float64).view(-1, 2)

    def __bool__(self) -> bool:
        return bool(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(
        self,
        metrics: dict[str, Measured],
        reduce: Callable[[torch.Tensor], torch.Tensor],
        finite: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Adds a batch.

        Args:
            metrics (`dict`):
                As [`batch_metrics`] gives them; the same names on every process.
            reduce (`Callable`):
                Sums a tensor over processes.
            finite (`torch.Tensor`, scalar bool, *optional*):
                Whether to add it at all; the same on every process.

        Returns:
            `dict`: sum and weight, of shape `(2,)`, that each metric grew by.
        """
        self._names = list(dict.fromkeys([*self._names, *metrics]))
        device = next((m[0].device for m in metrics.values() if m is not None), self._sums.device)
        nothing = torch.zeros(2, dtype=exact_dtype(device), device=device)
        measured = [metrics.get(name) for name in self._names]
        pairs = [nothing if m is None else torch.stack([_total(m[0], m[1]), _total(m[1])]) for m in measured]
        grown = reduce(torch.stack(pairs))
        if finite is not None:
            grown = torch.where(finite, grown, torch.zeros_like(grown))
        missing = len(self._names) - len(self._sums)
        self._sums = torch.nn.functional.pad(to_device(self._sums.to(grown.dtype), device), (0, 0, 0, missing)) + grown
        return dict(zip(self._names, grown, strict=True))

    def _read(self, name: str) -> tuple[float, float]:
        self._sums = self._sums.cpu()
        total, weight = self._sums[self._names.index(name)].tolist() if name in self._names else (0.0, 0.0)
        return total, weight

    def total(self, name: str) -> float:
        """Weighted sum of a metric; 0 where nothing was added."""
        return self._read(name)[0]

    def mean(self, name: str) -> float | None:
        """Mean of a metric; None where nothing was measured."""
        total, weight = self._read(name)
        return total / weight if weight else None

    def means(self) -> dict[str, float | None]:
        """Mean of every metric, and what follows from the spread of some."""
        means = {name: self.mean(name) for name in self._names if not name.startswith("_")}
        for name in [name for name in means if name.startswith("rewards/")]:
            variance = self._variance(name)
            means[name.replace("/mean", "/std")] = None if variance is None else variance**0.5
        reward, returns, residual = (self._variance(name) for name in ("reward", "return", "residual"))
        means["reward_std"] = None if reward is None else reward**0.5
        # the share of the returns' variance that the values predict
        means["explained_variance"] = 1 - residual / returns if returns and residual is not None else None
        return means

    def _variance(self, name: str) -> float | None:
        mean, square = self.mean(f"_{name}"), self.mean(f"_{name}_square")
        if mean is None or square is None:
            return None
        variance = square - mean**2
        return variance if variance > 1e-12 * square else 0.0  # what rounding leaves is none

    def state(self) -> dict[str, list[float]]:
        """For a checkpoint."""
        return dict(zip(self._names, self._sums.tolist(), strict=True))


def _total(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    values = values.to(exact_dtype(values.device))
    return values.sum() if mask is None else (values * mask).sum()
