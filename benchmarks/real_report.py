"""Table, verdict and plot of what [`benchmarks.real`] found."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.real_measures import wilson


# in the order of the table; the cold start is no arm, but where `thinking` began
NAMES = {
    "thinking": "thinking: cold start, then reinforcement",
    "cold_start": "… at the end of its cold start",
    "supervised": "written thoughts alone",
    "no_cold_start": "reinforcement without cold start",
    "plain": "plain training on answers",
}
CONDITIONS = ("with", "without", "another's", "filler", "random")
TITLES = ("with its thought", "without", "another problem's", "filler", "random tokens")
LEAST = 0.6  # exact match with thoughts
TIMES = 3  # that of plain training

Results = dict[str, list[dict]]
Share = tuple[float, float, float]


def read(folder: Path) -> tuple[Results, list[str]]:
    """The finished runs by arm, one for each seed; and a line for each of the others."""
    results: Results = {name: [] for name in NAMES}
    others = []
    for path in sorted(folder.glob("seed-*/*.json")):
        values = json.loads(path.read_text())
        if "exact" in values:
            results[values["arm"]].append(values)
        else:
            used = f"{values['seconds'] / 60:.1f} of {values['minutes']:g} minutes"
            others.append(f"- not finished, and left out: {NAMES[values['arm']]}, seed {values['seed']}, {used}")
    return results, others


def pooled(runs: list[dict], condition: str) -> Share | None:
    """Exact match over the problems of all seeds, which differ, and its 95% interval; None where it was not measured."""
    solved = [x for run in runs for x in run["exact"].get(condition, [])]
    return (float(np.mean(solved)), *wilson(sum(solved), len(solved))) if solved else None


def verdict(results: Results) -> dict[str, bool | None]:
    """Whether each thing that must hold does; None where it was not measured."""
    own = pooled(results["thinking"], "with")
    plain, taught = pooled(results["plain"], "without"), pooled(results["supervised"], "with")
    controls = {name: pooled(results["thinking"], name) for name in CONDITIONS[2:]}

    def holds(test: Callable[..., bool], *needed: Share | None) -> bool | None:
        return None if None in needed else test(*needed)

    found = {
        f"with its thoughts, thinking solves at least {LEAST:.0%}": holds(lambda a: a[0] >= LEAST, own),
        f"at least {TIMES} times as many as plain training, intervals apart": holds(
            lambda a, b: a[0] >= TIMES * b[0] and a[1] > b[2], own, plain
        ),
        "more than written thoughts alone, intervals apart": holds(lambda a, b: a[1] > b[2], own, taught),
    }
    for name, title in list(zip(CONDITIONS, TITLES, strict=True))[2:]:
        found[f"{title} in place of a thought: not above plain training, intervals considered"] = holds(
            lambda a, b: a[1] <= b[2], controls[name], plain
        )
    passed = [run["anti_theater_passed"] for run in results["thinking"]]
    found["anti-theater validation passes for each seed"] = all(passed) if passed else None
    counts = [len(run["exact"]["with"]) for run in results["thinking"]]
    found["two seeds or more, each with at least 200 held-out problems"] = len(counts) > 1 and min(counts) >= 200
    return found


def table(results: Results) -> str:
    """Exact match of each arm in each condition in percent, pooled over seeds, with its interval; then that of each seed."""
    lines = [
        f"| arm | seeds | minutes | steps | {' | '.join(TITLES)} | right chains | mixed groups | anti-theater |",
        f"|{' --- |' * (len(TITLES) + 7)}",
    ]
    for name, runs in results.items():
        if not runs:
            continue
        cells = [NAMES[name], len(runs), _each(runs, lambda run: f"{run['seconds'] / 60:.1f}")]
        cells.append(
            _each(runs, lambda run: f"{run['cold_steps']} + {run['steps']}" if run["cold_steps"] else run["steps"])
        )
        cells += [_cell(runs, condition) for condition in CONDITIONS]
        cells.append(_each(runs, lambda run: f"{np.mean(run['right_chains']):.0%}" if "right_chains" in run else "–"))
        cells.append(_each(runs, lambda run: f"{run['mixed_groups']:.0%}" if "mixed_groups" in run else "–"))
        cells.append(_each(runs, lambda run: _yes(run.get("anti_theater_passed"))))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _cell(runs: list[dict], condition: str) -> str:
    share = pooled(runs, condition)
    if share is None:
        return "–"
    seeds = _each(runs, lambda run: f"{np.mean(run['exact'][condition]):.0%}")
    return f"{share[0]:.1%} [{share[1]:.1%}, {share[2]:.1%}]" + (f" ({seeds})" if len(runs) > 1 else "")


def _each(runs: list[dict], value: Callable[[dict], object]) -> str:
    return ", ".join(str(value(run)) for run in runs)


def _yes(passed: bool | None) -> str:
    return {True: "yes", False: "no", None: "–"}[passed]


def samples(results: Results) -> str:
    """A few thoughts on held-out problems."""
    lines = []
    for run in results["thinking"][:1]:
        lines = ["| problem | its thought | answer | solved |", "| --- | --- | --- | --- |"]
        for row in run["samples"]:
            cells = (f"`{' '.join(row[name].split())}`" for name in ("prompt", "thought", "completion"))
            lines.append(f"| {' | '.join(cells)} | {_yes(row['right'])} |")
    return "\n".join(lines)


def report(folder: Path, picture: Path | None = None) -> str:
    """
    What a folder of results says, as Markdown; and the plot of its learning curves.

    Raises:
        `ValueError`: if no run in the folder is finished.
    """
    results, others = read(folder)
    runs = [run for several in results.values() for run in several]
    if not runs:
        raise ValueError(f"No run in {folder} is finished; give it the command that began it once more.")
    if picture is not None:
        plot(results, picture)
    machine, minutes = runs[0]["machine"], runs[0]["minutes"]
    head = (
        f"{runs[0]['task']}, {minutes:g} minutes of training for each arm and seed, {len(runs[0]['exact']['without'])} "
        f"held-out problems for each seed, 95% intervals over problems; {machine['device']}, {machine['cpu']}, "
        f"{machine['threads']} thread(s)"
    )
    checks = [f"- {_yes(holds)}: {name}" for name, holds in verdict(results).items()]
    alike = min(run["generated_alike"] for run in runs)
    checks.append(
        f"- exact match as measured is what `generate` writes for at least {alike:.0%} of the problems tried"
    )
    return "\n\n".join([head, table(results), "\n".join(checks + others), samples(results)]).strip()


def plot(results: Results, path: Path) -> None:
    """Exact match on the way, over minutes of training: a line for each arm, a band from the worst to the best seed, and a
    mark where the cold start ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    colors = dict(zip(NAMES, ("C0", "", "C1", "C2", "C3"), strict=True))
    for name in ("supervised", "no_cold_start", "plain", "thinking"):  # what matters is drawn last
        if not results[name]:
            continue
        key = "without" if name == "plain" else "with"
        curves = [np.array([[point["minutes"], point[key]] for point in run["curve"]]) for run in results[name]]
        grid = np.linspace(0, max(curve[-1, 0] for curve in curves), 200)
        values = np.array([np.interp(grid, curve[:, 0], curve[:, 1]) for curve in curves])
        axes.plot(grid, 100 * values.mean(0), color=colors[name], label=NAMES[name])
        axes.fill_between(grid, 100 * values.min(0), 100 * values.max(0), color=colors[name], alpha=0.2, linewidth=0)
    for run in results["thinking"][:1]:
        axes.axvline(run["cold_seconds"] / 60, color="grey", linestyle=":", label="the cold start ends")
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("held-out problems solved, %")
    axes.set_ylim(0, 100)
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
