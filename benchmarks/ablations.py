"""What each part of the method is worth: the learning benchmark with one thing changed at a time.

    python -m benchmarks.ablations --task rare --seeds 0 --output docs/ablations

Writes `OUTPUT.json`, `OUTPUT.md` (a table) and `OUTPUT.png` (accuracy with thoughts against steps). All variants of a seed
start from the same pretrained model and see the same data in the same order. 60 s a run on one core; `--variants` chooses.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

from .learning import TASKS, benchmark_parser, pretrain, run


UNCALIBRATED = {"nll_coefficient": 0.0, "reader_nll_coefficient": 0.0}
GROUPS: dict[str, dict[str, dict]] = {
    "baseline": {
        "default: value head, GAE": {},
        "no baseline": {"advantage_baseline": "none"},
        "leave-one-out": {"advantage_baseline": "leave_one_out"},
        "both": {"advantage_baseline": "both"},
        "value head, no GAE": {"use_gae": False},
    },
    "reward": {
        "log-likelihood": {"reward_type": "log_likelihood"},
        "accuracy": {"reward_type": "accuracy"},
        "binary": {"reward_type": "binary"},
    },
    "prediction and terms": {
        "no mixing head": {"reward_prediction": "thought"},
        "no reader NLL": {"reader_nll_coefficient": 0.0},
        "policy weight 1 (3)": {"policy_coefficient": 1.0},
        "policy weight 10 (3)": {"policy_coefficient": 10.0},
        "no entropy bonus": {"entropy_coefficient": 0.0, "min_entropy_coefficient": 0.0},
    },
    "calibration": {
        "no NLL through thoughts": UNCALIBRATED,
        "the same, no mixing head": {**UNCALIBRATED, "reward_prediction": "thought"},
        "the same, log-likelihood": {
            **UNCALIBRATED,
            "reward_prediction": "thought",
            "reward_type": "log_likelihood",
        },
    },
    "thoughts a position (8)": {
        "two thoughts": {"num_thoughts": 2},
        "one thought": {"num_thoughts": 1},
    },
}
VARIANTS = {name: options for group in GROUPS.values() for name, options in group.items()}
CONTROLS = ("none", "shuffled", "filler")


def summary(runs: list[dict]) -> dict[str, str]:
    """The table's cells for one variant: mean, range over seeds, and steps."""
    after = [run["after"]["accuracy"] for run in runs]
    best = [accuracy["with"] for accuracy in after]
    return {
        "with thoughts": f"{_mean(best):.3f}" + (f" ({min(best):.3f} to {max(best):.3f})" if len(best) > 1 else ""),
        **{name: f"{_mean([accuracy[name] for accuracy in after]):.3f}" for name in CONTROLS},
        "steps to 90%": ", ".join(str(run["steps_to_90"] or "–") for run in runs),
        "anti-theater passed": f"{sum(run['after']['anti_theater_passed'] for run in runs)} of {len(runs)}",
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(results: dict[str, list[dict]]) -> str:
    """Markdown."""
    rows = {name: summary(runs) for name, runs in results.items()}
    columns = list(next(iter(rows.values())))
    lines = [f"| variant | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 1)}"]
    lines += [f"| {name} | {' | '.join(cells.values())} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, list[dict]], path: Path) -> None:
    """Accuracy with thoughts against steps, mean of the seeds; a panel for each group, with the default in all."""
    figure, axes = plt.subplots(1, len(GROUPS), figsize=(4 * len(GROUPS), 3.4), sharey=True)
    default = next(iter(VARIANTS))
    for axis, (title, group) in zip(axes, GROUPS.items(), strict=True):
        for name in dict.fromkeys([default, *group]):
            if name not in results:
                continue
            curves = [run["curve"] for run in results[name]]
            steps = [step for step, _ in curves[0]]
            means = [_mean([curve[i][1] for curve in curves]) for i in range(len(steps))]
            style = dict(color="black", linewidth=2) if name == default else {}
            axis.plot(steps, means, label=name, **style)
        axis.set(title=title, xlabel="optimizer steps", ylim=(0, 1))
        axis.legend(fontsize=7, loc="lower right")
    axes[0].set_ylabel("answer accuracy with thoughts")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.set_defaults(output=Path("docs/ablations"))
    parser.add_argument("--task", choices=TASKS, default="easy")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    results: dict[str, list[dict]] = {name: [] for name in arguments.variants}
    for seed in arguments.seeds:
        model = pretrain(task, seed, arguments.pretraining_steps)
        for name in arguments.variants:
            results[name].append(run(task, model, seed, arguments.steps, VARIANTS[name]))
            print(f"seed {seed}, {name}: {results[name][-1]['after']['accuracy']['with']:.3f}", flush=True)
        arguments.output.with_suffix(".json").write_text(json.dumps(results, indent=1))
    text = table(results)
    arguments.output.with_suffix(".md").write_text(text)
    plot(results, arguments.output.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
