"""Reward collapse: gains that are zero or all alike, and gains that come from a worse prediction without thoughts.

The reward is with minus without, so it rises too when *without* gets worse. Three measurements, over logging windows and
evaluations, say when a reward means nothing; each warns once when it begins, and again only after it had gone away.

- **No gain.** `rl/reward_std` below `ZERO_STD` for `WINDOWS` logging windows in a row: all thoughts earn the same, and the
  policy has nothing to learn from. A gate closed to its least weight of 0.01 leaves about 1e-3 with the probability reward;
  the learning benchmark starts at 2e-3, and with accuracy rewards at 0 for the first window or two, and learns.
- **No mixed groups.** `rl/mixed_groups` below `MIXED` for `WINDOWS` logging windows in a row, after as many in a row in which it
  was not: there were useful and useless thoughts at the same position to tell apart, and there are no more. Texts on which
  thoughts only ever gain a little have no mixed groups from the start, and are not warned about.
- **Drift.** `rl/no_thought_drift` and `eval_no_thought_drift` are the NLL without thoughts minus its lowest so far, in nats;
  for training, of means over `WINDOWS` logging windows. It warns above `DRIFT` where the prediction with thoughts has not
  gained as much in the meantime. Harder texts raise both NLLs, so training windows must also show a risen gain, by half of
  `DRIFT`; evaluations have the same texts each time. Held out, healthy runs of tiny models stay below 0.1 or gain several
  times as much with thoughts; trained on the policy term alone they reach 0.9 (docs/findings.md).
"""

import math
from collections.abc import Mapping

from transformers.utils import logging


logger = logging.get_logger(__name__)

WINDOWS = 5  # logging windows
ZERO_STD = 1e-4  # in the reward's units
MIXED = 0.02  # share of the groups
DRIFT = 0.2  # nats a token


def advice(useful: float) -> str:
    """
    What to do where groups of thoughts are not mixed.

    Args:
        useful (`float`):
            Share of the thoughts that are useful.
    """
    if useful > 0.9:
        return "these problems are settled. Take harder ones, or stop here."
    if useful < 0.1:
        return (
            "the model finds hardly any here. Give it written thoughts first (a column `thought` in the data), easier problems, "
            "more thoughts at each position (`num_thoughts`), or another `temperature`: a lower one if its likeliest thoughts are "
            "the useful ones, else a higher one."
        )
    return (
        "each problem is either settled or out of reach. Raise `temperature` or `num_thoughts`, or take problems in between; "
        "written thoughts (a column `thought` in the data) bring harder ones into reach."
    )


class CollapseWatch:
    """
    Follows the metrics of a run.

    Args:
        warns (`bool`):
            Whether to warn, which one process should.
    """

    def __init__(self, warns: bool = True):
        self.warns = warns
        self._recent: dict[str, list[list[float]]] = {}  # by prefix: NLL without and with thoughts of the last windows
        self._best: dict[str, list[float]] = {}  # by prefix: their means where that without was lowest
        self._flat = 0  # windows in a row without gain
        self._mixed = 0  # windows in a row with mixed groups, or, below 0, without
        self._was_mixed = False  # as long as `WINDOWS` of them, in this run
        self._on: dict[str, bool] = {}  # what has been warned about and lasts

    def begin_run(self) -> None:
        """Forgets the logging windows of the run before; evaluations are still held against the model's best."""
        self._flat = self._mixed = 0
        self._was_mixed = False
        for memory in (self._recent, self._best):
            memory.pop("rl/", None)
        for name in ("no gain", "no mixed groups", "rl/drift"):
            self._on.pop(name, None)

    def training(self, metrics: Mapping[str, float | None], step: int) -> dict[str, float]:
        """
        Takes in a logging window.

        Args:
            metrics (`Mapping[str, float | None]`):
                With `rl/reward_std`, `rl/mixed_groups`, `rl/useful_thoughts`, `rl/nll_without` and `rl/nll_with`, as far as they
                were measured.
            step (`int`):
                The optimizer step, for the warning.

        Returns:
            `dict`: `rl/no_thought_drift` in nats, where it can be told.
        """
        std = metrics.get("rl/reward_std")
        if std is not None:
            self._flat = self._flat + 1 if std < ZERO_STD else 0
            self._warn(
                "no gain",
                self._flat >= WINDOWS,
                f"All thoughts have earned the same for {self._flat} logging windows up to step {step} (`rl/reward_std` "
                f"{std:.1e}), so the policy has nothing to learn from. Look at `rl/mixing_weight` (a closed gate scales the "
                "reward down), at `temperature` (thoughts that are all alike), and at `reward_type` (`accuracy` and "
                "`binary` are 0 until a thought changes the likeliest token).",
            )
        self._watch_groups(metrics.get("rl/mixed_groups"), metrics.get("rl/useful_thoughts"), step)
        return self._drift("rl/", metrics, step, WINDOWS)

    def _watch_groups(self, mixed: float | None, useful: float | None, step: int) -> None:
        if mixed is None or useful is None:
            return
        name = "no mixed groups"
        self._mixed = max(self._mixed, 0) + 1 if mixed >= MIXED else min(self._mixed, 0) - 1
        self._was_mixed |= self._mixed >= WINDOWS
        lasts = self._on.get(name, False) and self._mixed < WINDOWS
        self._warn(
            name,
            lasts or (self._was_mixed and self._mixed <= -WINDOWS),
            f"For {WINDOWS} logging windows up to step {step} hardly any position had both useful and useless thoughts "
            f"(`rl/mixed_groups` {mixed:.1%}), so that there is little left to reinforce. {useful:.0%} of the thoughts are "
            f"useful (`rl/useful_thoughts`): {advice(useful)}",
        )

    def evaluation(self, metrics: dict[str, float], prefix: str, step: int, data: str = "") -> dict[str, float]:
        """
        Takes in an evaluation.

        Args:
            metrics (`dict[str, float]`):
                With `{prefix}_nll_without` and `{prefix}_nll_with`.
            prefix (`str`):
                Of the evaluation data.
            step (`int`):
                The optimizer step, for the warning.
            data (`str`, *optional*, defaults to `""`):
                Name of the data, where the prefix does not tell: drift is followed for each data set by itself.

        Returns:
            `dict`: `{prefix}_no_thought_drift` in nats, where it can be told.
        """
        return self._drift(f"{prefix}_", metrics, step, 1, data)

    def _drift(self, prefix: str, metrics, step: int, windows: int, data: str = "") -> dict[str, float]:
        pair = [metrics.get(f"{prefix}nll_without"), metrics.get(f"{prefix}nll_with")]
        if any(nll is None or not math.isfinite(nll) for nll in pair):
            return {}
        name = prefix + data
        recent = self._recent[name] = [*self._recent.get(name, []), pair][-windows:]
        if len(recent) < windows:
            return {}
        without, with_thoughts = (sum(nlls) / windows for nlls in zip(*recent, strict=True))
        best = self._best.setdefault(name, [without, with_thoughts])
        if without < best[0]:
            best[:] = without, with_thoughts
        drift, gained = without - best[0], best[1] - with_thoughts
        same_texts = windows == 1
        self._warn(
            f"{name}drift",
            drift > DRIFT and gained < drift and (same_texts or drift + gained > DRIFT / 2),
            f"At step {step} the prediction without thoughts is {drift:.2f} nats worse than at its best "
            f"(`{prefix}nll_without`), while that with thoughts has changed by {-gained:+.2f}: a reward that rises like this "
            "is none of the thoughts' doing. Raise `base_nll_coefficient`, lower `learning_rate`, or set "
            "`no_thought_model='reference'`.",
        )
        return {f"{prefix}no_thought_drift": drift}

    def _warn(self, name: str, on: bool, complaint: str) -> None:
        """Once for as long as it lasts."""
        if on and not self._on.get(name) and self.warns:
            logger.warning(complaint)
        self._on[name] = on

    def state(self) -> dict:
        """For a checkpoint."""
        groups = {"mixed": self._mixed, "was_mixed": self._was_mixed}
        return {"recent": self._recent, "best": self._best, "flat": self._flat, "on": self._on, **groups}

    def load(self, state: dict) -> None:
        """Takes back what [`CollapseWatch.state`] gave."""
        self._recent, self._best, self._flat, self._on = (state[name] for name in ("recent", "best", "flat", "on"))
        # which checkpoints of earlier versions do not have
        self._mixed, self._was_mixed = state.get("mixed", 0), state.get("was_mixed", False)
