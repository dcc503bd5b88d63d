"""What the numbers of an evaluation say: what each of them is, with its unit, and why some seem to contradict others."""

import math
import re
from typing import TYPE_CHECKING

from ..learning.rewards import UNITS


if TYPE_CHECKING:
    from ..config import QuietStarConfig


SHOWN = 5e-5  # what a table with four digits does not round to 0


def card_name(name: str) -> str:
    """A name that is safe in a table and a model card: without characters that Markdown, HTML or YAML would interpret."""
    return re.sub(r"[^\w./ -]+", "-", name).strip("- ") or "model"


def evaluation_rows(metrics: dict[str, float], args: "QuietStarConfig") -> dict[str, str]:
    """
    The rows of the tables of an evaluation.

    Args:
        metrics (`dict[str, float]`):
            Metrics that `evaluate` returned.
        args ([`QuietStarConfig`]):
            Tells what the reward is.

    Returns:
        `dict`: for what each number is, in words with its unit, the name of its metric; only those that are in `metrics`.
    """
    functions = [key for key in metrics if re.fullmatch(r"eval_rewards/.*/mean", key)]
    gain = "weighted sum of functions" if functions else f"gain, {UNITS[args.reward_type]}"
    if args.reward_clip_range is not None:
        gain += ", clipped to {:g} … {:g}".format(*args.reward_clip_range)
    rows = {f"reward ({gain})": "eval_reward"}
    if "eval_penalty" in metrics:
        rows = {
            "reward (gain − penalty)": "eval_reward",
            gain: "eval_gain",
            "penalty on unfinished thoughts": "eval_penalty",
        }
    rows |= {f"- {card_name(key.split('/', 1)[1].removesuffix('/mean'))}": key for key in functions}
    rows |= {
        "NLL without thoughts, nats a token": "eval_nll_without",
        "NLL with thoughts, nats a token": "eval_nll_with",
        "accuracy without thoughts": "eval_accuracy_without",
        "accuracy with thoughts": "eval_accuracy_with",
        "coherence": "eval_coherence",
        "exact match without thoughts": "eval_exact_match_without",
        "exact match with thoughts": "eval_exact_match_with",
    }
    return {label: key for label, key in rows.items() if key in metrics}


def contradictions(metrics: dict[str, float], args: "QuietStarConfig") -> list[str]:
    """
    Why reward, NLL and accuracy do not all say that thoughts help, or that they hurt, where they do not.

    Args:
        metrics (`dict[str, float]`):
            Metrics that `evaluate` returned.
        args ([`QuietStarConfig`]):
            Tells what the reward is.

    Returns:
        `list[str]`: sentences, none where the three agree.
    """
    missing = dict.fromkeys(("reward", "nll_with", "nll_without", "accuracy_with", "accuracy_without"), math.nan)
    found = {**missing, **{key.removeprefix("eval_"): value for key, value in metrics.items()}}
    gains = {
        "reward": found.get("gain", found["reward"]),
        "NLL": found["nll_without"] - found["nll_with"],
        "accuracy": found["accuracy_with"] - found["accuracy_without"],
    }
    notes = []
    if not math.isnan(found["reward"]) and math.isnan(found["accuracy_with"]):
        notes.append(
            "Nothing that rewards look at follows any thought, and what thoughts gain there is 0 by definition."
        )
    helps = [name for name, gain in gains.items() if gain > SHOWN]
    hurts = [name for name, gain in gains.items() if gain < -SHOWN]
    if helps and hurts:
        meanings = {
            "reward": _meaning(any(key.startswith("rewards/") for key in found), args.reward_type),
            "NLL": "NLL takes all tokens after thoughts, and one that a thought makes very unlikely outweighs many that it helps",
            "accuracy": "accuracy asks only whether a token is the likeliest",
        }
        reasons = "; ".join(meanings[name] for name in gains if name in helps + hurts)
        notes.append(f"Thoughts help by {' and '.join(helps)}, and hurt by {' and '.join(hurts)}: {reasons}.")
    return notes


def _meaning(has_functions: bool, reward_type: str) -> str:
    if has_functions:
        return "the reward is what its functions give"
    if reward_type in ("accuracy", "binary"):
        return "the reward asks only whether tokens are the likeliest"
    if "probability" in reward_type:
        return "the reward is of probabilities, where a token loses no more than the probability that it had"
    return "the reward is a mean over thoughts of the tokens that rewards look at"


def changes(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """
    Why the reward and the NLL with thoughts did not both get better, or both worse, where they did not.

    Args:
        before, after (`dict[str, float]`):
            Metrics that `evaluate` returned.
    """
    reward, with_thoughts, without = (
        after.get(key, math.nan) - before.get(key, math.nan)
        for key in ("eval_reward", "eval_nll_with", "eval_nll_without")
    )
    if reward < -SHOWN and without < with_thoughts < -SHOWN:
        return [
            "The reward fell although the prediction with thoughts got better: the one without them, which it is held against, "
            "got better by more."
        ]
    if reward > SHOWN and without > with_thoughts > SHOWN:
        return [
            "The reward rose although the prediction with thoughts got worse: the one without them, which it is held against, "
            "got worse by more."
        ]
    return []
