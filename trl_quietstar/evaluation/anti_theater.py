"""Anti-theater validation: are the thoughts used, or decoration?

Four tests on held-out text decide. Three ask whether thoughts differ from what the model would say anyway (divergence),
whether they help (ablation), and whether the coherent ones are those that help (correlation). A model can pass these
without thinking: a thought's format alone can tell the reader that an answer follows. So the fourth asks whether the
model's own thought helps more than one that belongs elsewhere (content gain). The other controls are reported beside.

Everything here is a function of sums over the thoughts of each text, so a bootstrap over texts, which keeps the
conditions paired and a text's thoughts together, gives an interval to every number.
"""

import math
from dataclasses import dataclass

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
THRESHOLDS = {"divergence": 0.30, "ablation": 0.02, "correlation": 0.5, "content_gain": 0.0}
# of each text, over its thoughts and, in each condition, over its talk tokens
SUMS = (
    *("thoughts", "distance", "coherence", "correctness", "coherence_squared", "correctness_squared", "product"),
    *("tokens", *(f"nll_{name}" for name in CONDITIONS), *(f"correct_{name}" for name in CONDITIONS)),
)
RESAMPLES = 2_000
LEAST_TEXTS = 2


@dataclass(frozen=True)
class Estimate:
    """A statistic, and the bounds of its 95% interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class AntiTheaterReport:
    """
    What a validation found.

    Parameters:
        texts, thoughts (`int`):
            How many were examined.
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
        """Names of the tests that failed. An undefined statistic fails; the content gain must be above its threshold
        with its whole interval."""
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
        """Flat, for logging: `passed` (1 or 0), each estimate, and the bounds of the tests' and gains' intervals."""
        flat: dict[str, float | None] = {"passed": float(self.passed)}
        for name, estimate in self.estimates.items():
            flat[name] = _defined(estimate.value)
            if not name.startswith(("accuracy", "nll")):
                flat[f"{name}_low"], flat[f"{name}_high"] = _defined(estimate.low), _defined(estimate.high)
        return flat


def _defined(value: float) -> float | None:
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
    Examines the thoughts of a batch: scores them and every control, and compares them with what the model would say.

    Args:
        model ([`ThinkingModel`]):
            A model with heads, in `eval()` mode.
        text ([`Text`]):
            The batch.
        thoughts ([`Thoughts`]):
            The model's own.
        talk_length (`int`):
            M.
        path ([`BranchPath`]):
            How to get hidden states.
        prediction (`str`):
            `"mixed"` or `"thought"`.
        generator (`torch.Generator`):
            Of the random control's tokens.
        plan ([`~branches.memory.Plan`], *optional*):
            How many branches run at once. Defaults to all.

    Returns:
        `torch.Tensor` of shape `(B, len(SUMS))`, in float64 where the device has it.
    """
    exact, plan = exact_dtype(text.input_ids.device), plan or Plan(False)
    cache = path.read(model, text)
    talk_mask = talk_after(text, thoughts.positions, talk_length).target_mask[:, :, None]
    exists = thoughts.positions.mask[..., None].expand(thoughts.mask.shape[:3])
    scored: dict[str, Scores] = {}
    for control in CONTROLS:
        other = controlled(thoughts, control, model.config.get_text_config().vocab_size, generator)
        request = ScoreRequest(
            text,
            other,
            talk_length,
            path,
            prediction=prediction,
            branch_batch_size=plan.scoring,
            cache=cache,
            whole_text=control == "real",
        )
        scored[control] = score(model, request)
    real = scored["real"]
    logps_without = at_talk(real.text_logps, thoughts, talk_length)
    plain = score_thoughts(model, text, thoughts, path, start=False, branch_batch_size=plan.scoring, cache=cache)
    coherent = coherence(
        real.similarity, plain.thought_logps, thoughts.mask, real.talk_logps, logps_without, talk_mask
    ).to(exact)
    correct = masked_mean(real.talk_correct.to(exact), talk_mask, dim=-1)
    continuation = _continuation(model, path, text, cache, thoughts, plan.sampling)
    said = talk_mask.expand_as(real.talk_logps)
    per_thought = {
        "thoughts": torch.ones_like(correct),
        "distance": _edit_distances(thoughts, continuation),
        "coherence": coherent,
        "correctness": correct,
        "coherence_squared": coherent.square(),
        "correctness_squared": correct.square(),
        "product": coherent * correct,
    }
    sums = {name: (values * exists).sum((1, 2)) for name, values in per_thought.items()}
    sums["tokens"] = said.sum((1, 2, 3))
    correct_without = at_talk(real.text_correct, thoughts, talk_length)
    for name in CONDITIONS:
        logps = logps_without if name == "none" else scored[name].talk_logps
        top1 = correct_without if name == "none" else scored[name].talk_correct
        sums[f"nll_{name}"] = -(logps.to(exact) * said).sum((1, 2, 3))
        sums[f"correct_{name}"] = (top1.to(exact) * said).sum((1, 2, 3))
    return torch.stack([sums[name].to(exact) for name in SUMS], dim=1)


def _continuation(
    model: ThinkingModel, path: BranchPath, text: Text, cache: BranchCache, thoughts: Thoughts, batch_size: int | None
) -> torch.Tensor:
    """What the model would say in place of its thoughts, `(B, J, L)`, at `batch_size` positions of each row at once."""
    positions, length, device = thoughts.positions.host, thoughts.mask.shape[-1], thoughts.mask.device
    size = positions.index.shape[1] if batch_size is None else batch_size
    groups = zip(positions.index.split(size, dim=1), positions.mask.split(size, dim=1), strict=True)
    said = [greedy_continuation(model, cache.again(), Positions(*group).to(device), length) for group in groups]
    return torch.cat(said, dim=1)


def _edit_distances(thoughts: Thoughts, continuation: torch.Tensor) -> torch.Tensor:
    """Normalised edit distance, shape `(B, J, G)`, of each thought and as much of the continuation `(B, J, L)`."""
    distances = torch.zeros(thoughts.mask.shape[:3], dtype=torch.float64)
    token_ids, mask, plain = thoughts.token_ids.tolist(), thoughts.mask.tolist(), continuation.tolist()
    for b, j in thoughts.positions.mask.nonzero().tolist():
        for g, (thought, kept) in enumerate(zip(token_ids[b][j], mask[b][j], strict=True)):
            length = sum(kept)
            distances[b, j, g] = Levenshtein.normalized_distance(thought[:length], plain[b][j][:length])
    return to_device(distances, thoughts.mask.device)


def judge(sums: torch.Tensor, seed: int = 0) -> AntiTheaterReport:
    """
    The statistics of all texts, with intervals: percentiles of the same statistics over texts drawn with replacement.

    Args:
        sums (`torch.Tensor` of shape `(texts, len(SUMS))`):
            As [`text_sums`] gives them.
        seed (`int`):
            Of the bootstrap.

    Returns:
        [`AntiTheaterReport`].

    Raises:
        `ValueError`: for fewer than two texts, which allow no interval.
    """
    rows = sums.cpu().double().numpy()
    check_texts(len(rows))
    total = rows.sum(0, keepdims=True)
    draws = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"):
        values, resampled = _statistics(total), _statistics(draws @ rows)
    estimates = {}
    for name, value in values.items():
        defined = resampled[name][~np.isnan(resampled[name])]
        low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (math.nan, math.nan)
        estimates[name] = Estimate(float(value[0]), float(low), float(high))
    return AntiTheaterReport(len(rows), int(total[0, SUMS.index("thoughts")]), estimates)


def check_texts(count: int) -> None:
    """Refuses too few texts."""
    if count < LEAST_TEXTS:
        raise ValueError(
            f"Anti-theater validation compares texts and needs at least {LEAST_TEXTS} of them, got {count}; give a "
            "larger `eval_dataset`."
        )


def _statistics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Every statistic, of shape `(resamples,)`, from sums of shape `(resamples, len(SUMS))`."""
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
    """Correlation of coherence and correctness; NaN where either does not vary."""
    count = column["thoughts"]
    mean_x, mean_y = column["coherence"] / count, column["correctness"] / count
    covariance = column["product"] / count - mean_x * mean_y
    variance_x = column["coherence_squared"] / count - mean_x**2
    variance_y = column["correctness_squared"] / count - mean_y**2
    # what is left of a constant's variance after rounding is no variance
    product = np.where((variance_x > 1e-12) & (variance_y > 1e-12), variance_x * variance_y, np.nan)
    return covariance / np.sqrt(product)
