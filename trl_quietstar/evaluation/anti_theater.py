"""Anti-theater validation: are the thoughts used, or decoration?

Four tests on held-out text decide:

- divergence: do thoughts differ from what the model would say anyway?
- ablation: do thoughts help?
- correlation: are the coherent thoughts the ones that help?
- content gain: does the model's own thought help more than another position's?

A model can pass the first three without thinking, because a thought's format alone can tell the model that an answer
follows. The fourth test excludes that. The other controls of [`controls`] are reported and decide nothing.

Every statistic is a function of sums over the thoughts of each text. So a bootstrap over texts gives each number an
interval. It keeps all conditions of a text paired, and the thoughts of a text together, since they are not independent.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein

from ..branches.base import BranchCache, BranchPath
from ..branches.memory import Plan
from ..learning.rewards import coherence, masked_mean
from ..model.heads import ThinkingModel
from ..text.batch import Positions, Text, Thoughts, talk_after
from ..text.transfer import exact_dtype, to_device
from ..thinking.sampling import greedy_continuation
from ..thinking.scoring import ScoreRequest, Scores, at_talk, score, score_thoughts
from .controls import CONTROLS, controlled


CONDITIONS = ("none", *CONTROLS)
# a test passes above its threshold; that of the content gain is for the lower bound of its interval
THRESHOLDS = {"divergence": 0.30, "ablation": 0.02, "correlation": 0.5, "content_gain": 0.0}
# columns of [`text_sums`]: first sums over a text's thoughts, then over its talk tokens in each condition
SUMS = (
    *("thoughts", "distance", "coherence", "correctness", "coherence_squared", "correctness_squared", "product"),
    *("tokens", *(f"nll_{name}" for name in CONDITIONS), *(f"correct_{name}" for name in CONDITIONS)),
)
RESAMPLES = 2_000  # of the bootstrap
LEAST_TEXTS = 2  # a bootstrap over one text would draw the same one each time


@dataclass(frozen=True)
class Estimate:
    """A statistic and the bounds of its 95% interval. All three are NaN where the statistic is undefined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class AntiTheaterReport:
    """
    The result of a validation.

    Parameters:
        texts, thoughts (`int`):
            Number of texts and of thoughts that were examined.
        estimates (`dict[str, Estimate]`):
            The tests `"divergence"` (normalised edit distance, 0 to 1), `"ablation"` (accuracy with minus without),
            `"correlation"` (Pearson's) and `"content_gain"` (accuracy after real minus after shuffled thoughts);
            `"compute_gain"` (accuracy after filler minus without thoughts); the gains in nats, `"content_gain_nll"` and
            `"compute_gain_nll"`, positive where thoughts help; and `"accuracy_*"` and `"nll_*"` of each condition.
    """

    texts: int
    thoughts: int
    estimates: dict[str, Estimate]

    @property
    def failures(self) -> list[str]:
        """
        Names of the tests that failed. An undefined statistic fails. The content gain passes only if its whole interval
        is above the threshold.
        """
        failed = []
        for name, threshold in THRESHOLDS.items():
            estimate = self.estimates[name]
            if not (estimate.low if name == "content_gain" else estimate.value) > threshold:
                failed.append(name)
        return failed

    @property
    def passed(self) -> bool:
        """Whether the thoughts are used."""
        return not self.failures

    def metrics(self) -> dict[str, float | None]:
        """
        All numbers under flat names, for logging: `passed` (1 or 0), each estimate, and the bounds of the intervals of
        tests and gains. None where a number is undefined.
        """
        flat: dict[str, float | None] = {"passed": float(self.passed)}
        for name, estimate in self.estimates.items():
            flat[name] = _defined(estimate.value)
            if not name.startswith(("accuracy", "nll")):  # those of single conditions are left out of the log
                flat[f"{name}_low"], flat[f"{name}_high"] = _defined(estimate.low), _defined(estimate.high)
        return flat


def _defined(value: float) -> float | None:
    """None in place of NaN, which JSON cannot hold."""
    return None if math.isnan(value) else value


@torch.no_grad()
def text_sums(
    model: ThinkingModel,
    text: Text,
    thoughts: Thoughts,
    talk_length: int,
    path: BranchPath,
    prediction: str,
    generator: torch.Generator,
    plan: Plan | None = None,
) -> torch.Tensor:
    """
    Scores a batch's thoughts and every control, and sums over each text what the statistics need: over the talk tokens that
    rewards look at, and the thoughts that have any.

    Args:
        model ([`ThinkingModel`]):
            A model with heads, in `eval()` mode.
        text ([`Text`]):
            The batch.
        thoughts ([`Thoughts`]):
            The thoughts that the model sampled for this batch.
        talk_length (`int`):
            M, the talk tokens that are read after each thought.
        path ([`BranchPath`]):
            How to get hidden states.
        prediction (`str`):
            `"mixed"` or `"thought"`: which prediction of the talk is judged.
        generator (`torch.Generator`):
            Draws the tokens of the random control.
        plan ([`~branches.memory.Plan`], *optional*):
            How many branches run at once. Defaults to all.

    Returns:
        `torch.Tensor` of shape `(B, len(SUMS))`, in float64 where the device has it.
    """
    exact, plan = exact_dtype(text.input_ids.device), plan or Plan(False)
    cache = path.read(model, text)  # once, for all that follows
    request = ScoreRequest(
        text, thoughts, talk_length, path, prediction=prediction, branch_batch_size=plan.scoring, cache=cache
    )
    scored = _score_controls(model, request, thoughts, generator)
    real = scored["real"]
    logps = {name: scores.talk_logps for name, scores in scored.items()}
    correct = {name: scores.talk_correct for name, scores in scored.items()}
    logps["none"] = at_talk(real.text_logps, thoughts, talk_length)
    correct["none"] = at_talk(real.text_correct, thoughts, talk_length)

    # without a start the thought is judged as ordinary text, which coherence asks for
    plain = score_thoughts(model, text, thoughts, path, start=False, branch_batch_size=plan.scoring, cache=cache)
    continuation = _continuation(model, cache, thoughts, plan.sampling)
    talk = talk_after(text, thoughts.positions, talk_length)
    talk_mask, score_mask = talk.target_mask[:, :, None], talk.score_mask[:, :, None]
    evidence = (real.similarity, plain.thought_logps, thoughts.mask, real.talk_logps, logps["none"], talk_mask)
    x = coherence(*evidence).to(exact)
    y = masked_mean(real.talk_correct.to(exact), score_mask, dim=-1)
    per_thought = {
        "thoughts": torch.ones_like(y),
        "distance": _edit_distances(thoughts, continuation),
        **{"coherence": x, "correctness": y},
        **{"coherence_squared": x.square(), "correctness_squared": y.square(), "product": x * y},
    }
    # rows have unequally many positions, and some talks have nothing that is scored
    exists = (thoughts.positions.mask[..., None] & score_mask.any(-1)).expand_as(y)
    counted = score_mask.expand_as(real.talk_logps)  # once for each thought: the conditions are paired by thought
    sums = {name: (values * exists).sum((1, 2)) for name, values in per_thought.items()}
    sums["tokens"] = counted.sum((1, 2, 3))
    for name in CONDITIONS:
        sums[f"nll_{name}"] = -(logps[name].to(exact) * counted).sum((1, 2, 3))
        sums[f"correct_{name}"] = (correct[name].to(exact) * counted).sum((1, 2, 3))
    return torch.stack([sums[name].to(exact) for name in SUMS], dim=1)


def _score_controls(
    model: ThinkingModel, request: ScoreRequest, thoughts: Thoughts, generator: torch.Generator
) -> dict[str, Scores]:
    """Scores of the request's own thoughts (`"real"`) and of every control in their place, by name."""
    vocab_size = model.config.get_text_config().vocab_size
    return {
        name: score(
            model,
            replace(
                request,
                thoughts=controlled(thoughts, name, vocab_size, generator),
                whole_text=name == "real",  # the text's own predictions are the same for every control
            ),
        )
        for name in CONTROLS
    }


def _continuation(
    model: ThinkingModel, cache: BranchCache, thoughts: Thoughts, batch_size: int | None
) -> torch.Tensor:
    """The model's greedy continuation of the text at each position, `(B, J, L)`; `batch_size` positions of a row at once."""
    positions, length, device = thoughts.positions.host, thoughts.mask.shape[-1], thoughts.mask.device
    size = positions.index.shape[1] if batch_size is None else batch_size
    # each group goes on from a fresh copy of the cache, which a continuation grows
    groups = zip(positions.index.split(size, dim=1), positions.mask.split(size, dim=1), strict=True)
    continuations = [
        greedy_continuation(model, cache.again(), Positions(*group).to(device), length) for group in groups
    ]
    return torch.cat(continuations, dim=1)


def _edit_distances(thoughts: Thoughts, continuation: torch.Tensor) -> torch.Tensor:
    """Edit distance of each thought to equally many tokens of the continuation `(B, J, L)`, in [0, 1]: shape `(B, J, G)`."""
    distances = torch.zeros(thoughts.mask.shape[:3], dtype=torch.float64)
    token_ids, mask, plain = thoughts.token_ids.tolist(), thoughts.mask.tolist(), continuation.tolist()
    for b, j in thoughts.positions.mask.nonzero().tolist():
        for g, (thought, kept) in enumerate(zip(token_ids[b][j], mask[b][j], strict=True)):
            length = sum(kept)  # a thought that ended early is compared with a beginning of the continuation
            distances[b, j, g] = Levenshtein.normalized_distance(thought[:length], plain[b][j][:length])
    return to_device(distances, thoughts.mask.device)


def judge(sums: torch.Tensor, seed: int = 0) -> AntiTheaterReport:
    """
    Computes every statistic over all texts, with its interval. The interval's bounds are percentiles of the statistic over
    2,000 draws of the texts with replacement.

    Args:
        sums (`torch.Tensor` of shape `(texts, len(SUMS))`):
            The rows that [`text_sums`] gives.
        seed (`int`):
            Seeds the draws.

    Returns:
        [`AntiTheaterReport`].

    Raises:
        `ValueError`: for fewer than two texts, from which no interval can be estimated.
    """
    rows = sums.cpu().double().numpy()
    check_texts(len(rows))
    total = rows.sum(0, keepdims=True)
    # a draw of texts with replacement is a count for each text, so all resamples are one product of matrices
    draws = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"):  # undefined statistics are NaN
        values, resampled = _statistics(total), _statistics(draws @ rows)
    estimates = {}
    for name, value in values.items():
        defined = resampled[name][~np.isnan(resampled[name])]  # a draw may lack what a statistic needs to vary
        low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (math.nan, math.nan)
        estimates[name] = Estimate(float(value[0]), float(low), float(high))
    return AntiTheaterReport(len(rows), int(total[0, SUMS.index("thoughts")]), estimates)


def check_texts(count: int) -> None:
    """
    Checks that a validation has enough texts.

    Raises:
        `ValueError`: for fewer than two.
    """
    if count < LEAST_TEXTS:
        raise ValueError(
            f"Anti-theater validation compares texts and needs at least {LEAST_TEXTS} of them, got {count}; give a "
            "larger `eval_dataset`."
        )


def _statistics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Computes every statistic, of shape `(resamples,)`, from sums of shape `(resamples, len(SUMS))`."""
    column = dict(zip(SUMS, sums.T, strict=True))
    accuracy = {name: column[f"correct_{name}"] / column["tokens"] for name in CONDITIONS}
    nll = {name: column[f"nll_{name}"] / column["tokens"] for name in CONDITIONS}
    return {
        "divergence": column["distance"] / column["thoughts"],
        "ablation": accuracy["real"] - accuracy["none"],
        "correlation": _pearson(column),
        "content_gain": accuracy["real"] - accuracy["shuffled"],
        "compute_gain": accuracy["filler"] - accuracy["none"],
        "content_gain_nll": nll["shuffled"] - nll["real"],
        "compute_gain_nll": nll["none"] - nll["filler"],
        **{f"accuracy_{name}": values for name, values in accuracy.items()},
        **{f"nll_{name}": values for name, values in nll.items()},
    }


def _pearson(column: dict[str, np.ndarray]) -> np.ndarray:
    """
    Pearson's correlation of coherence (x) and correctness (y), NaN where either does not vary:
    `r = (E[xy] - E[x]E[y]) / sqrt(Var[x] Var[y])`.
    """
    count = column["thoughts"]
    mean_x, mean_y = column["coherence"] / count, column["correctness"] / count
    covariance = column["product"] / count - mean_x * mean_y
    variance_x = column["coherence_squared"] / count - mean_x**2
    variance_y = column["correctness_squared"] / count - mean_y**2
    # rounding leaves a constant a variance of almost 0, which must not become a correlation
    product = np.where((variance_x > 1e-12) & (variance_y > 1e-12), variance_x * variance_y, np.nan)
    return covariance / np.sqrt(product)
