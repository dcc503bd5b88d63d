"""`trl-quietstar compare`: runs of several settings and seeds, in one table and one plot.

    trl-quietstar compare out/a-seed0 out/a-seed1 out/b-seed0 out/b-seed1

Runs whose options differ in nothing but the seed and in what is written where are one setting. A value is that of the last evaluation of
a run or, without any, of its last logging window. Intervals are Student's, over the seeds.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from ..evaluation.plots import panels_of, write_plot
from ..evaluation.report import printable
from ..learning.rewards import UNITS
from ..training.history import HISTORY, read_history
from .arguments import argument, check_output
from .parser import CommandParser


# options in which runs of one setting may differ: what seeds are, where things go, and what is shown
ASIDE = frozenset(
    "seed data_seed output_dir run_name logging_dir project trackio_space_id report_to disable_tqdm log_level log_level_replica "
    "logging_first_step save_strategy save_steps save_total_limit save_only_model push_to_hub hub_model_id hub_strategy "
    "resume_from_checkpoint log_thoughts num_thoughts_to_print report_thoughts dataloader_num_workers".split()
)
SHOWN = 60  # characters of a value in the name of a setting
# 97.5% quantile of Student's distribution by degrees of freedom; more seeds take the last
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# rows of the table: what they are called, and how they are written
ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "reward": ("reward", "{:+.4f}".format),
    "nll_with": ("NLL with thoughts", "{:.4f}".format),
    "nll_without": ("NLL without", "{:.4f}".format),
    "exact_match_with": ("right with", "{:.1%}".format),
    "exact_match_without": ("right without", "{:.1%}".format),
    "thought_length": ("thought length", "{:.1f}".format),
}


@dataclass
class CompareArguments:
    """What to draw. What each field means stands in its `help`."""

    output: str = argument("compare.svg", "SVG file to write the plot to.")


class Run(NamedTuple):
    """A run by its folder: its settings, and the entries of its log."""

    folder: str
    settings: dict
    log: list[dict]


def run(argv: list[str]) -> None:
    """Compares runs: `RUN RUN ...`, then flags."""
    count = next((i for i, part in enumerate(argv) if part.startswith("-")), len(argv))
    (args,) = CommandParser((CompareArguments,), "compare").parse_args_and_config(argv[count:])
    if count == 0:
        raise ValueError("No run is given; give the output directories of runs: `trl-quietstar compare RUN RUN ...`.")
    check_output("output", args.output)
    runs = [Run(folder, *read_history(Path(folder))) for folder in dict.fromkeys(argv[:count])]
    for one in runs:
        if not one.log:
            raise ValueError(
                f"{one.folder!r} has logged nothing yet ({HISTORY} is empty); leave it out, or wait for its first log."
            )
    groups = by_setting(runs)
    Console().print(table(groups))
    write_plot(
        Path(args.output), "Runs", panels_of({name: [one.log for one in group] for name, group in groups.items()})
    )
    print(f"The plot is in {args.output}")


def by_setting(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs with equal settings, by the options in which settings differ."""
    groups: dict[str, list[Run]] = {}
    for one in runs:
        groups.setdefault(repr({name: x for name, x in one.settings.items() if name not in ASIDE}), []).append(one)
    firsts = [group[0].settings for group in groups.values()]
    names = list(dict.fromkeys(name for settings in firsts for name in settings if name not in ASIDE))
    differing = [name for name in names if len({repr(settings.get(name)) for settings in firsts}) > 1]
    named = [", ".join(f"{name}={_short(settings.get(name))}" for name in differing) for settings in firsts]
    return {name or "one setting": group for name, group in zip(named, groups.values(), strict=True)}


def _short(value) -> str:
    text = printable(str(value))
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def table(groups: dict[str, list[Run]]) -> Table:
    """Settings by columns: the number of seeds, and the mean of each value with its 95% interval."""
    logs = [[one.log for one in group] for group in groups.values()]
    has_evaluations = any("eval_loss" in entry for group in logs for log in group for entry in log)
    source = "last evaluation" if has_evaluations else "last logging window"
    found = Table("", title=f"Runs: {source}, mean (95% interval) over seeds")
    for setting in groups:
        found.add_column(setting, justify="right")
    found.add_row("seeds", *(str(len(group)) for group in logs))
    found.add_row("steps", *(_range([max(entry["step"] for entry in log) for log in group]) for group in logs))
    for name, (label, written) in ROWS.items():
        values = [[x for log in group if (x := last(log, name)) is not None] for group in logs]
        if any(values):
            if name == "reward":
                label = f"reward ({unit_of([one for group in groups.values() for one in group])})"
            found.add_row(label, *(_cell(some, written) for some in values))
    return found


def unit_of(runs: list[Run]) -> str:
    """What the rewards of runs are counted in."""
    units = set()
    for one in runs:
        has_functions = any("rewards/" in key for entry in one.log for key in entry)
        units.add("of functions" if has_functions else UNITS[one.settings["reward_type"]])
    return units.pop() if len(units) == 1 else "units differ"


def _range(numbers: list[int]) -> str:
    return " to ".join(map(str, dict.fromkeys([min(numbers), max(numbers)])))


def last(log: list[dict], name: str) -> float | None:
    """The last value of a metric in evaluation, or in training where it was not evaluated."""
    for key in (f"eval_{name}", f"rl/{name}"):
        value = next((entry[key] for entry in reversed(log) if entry.get(key) is not None), None)
        if value is not None:
            return value
    return None


def interval(values: list[float]) -> tuple[float, float] | None:
    """The 95% interval of the mean; None for a single value."""
    if len(values) < 2:
        return None
    half = QUANTILES[min(len(values) - 2, len(QUANTILES) - 1)] * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.fmean(values)
    return mean - half, mean + half


def _cell(values: list[float], written: Callable[[float], str]) -> str:
    if not values:
        return "–"
    around = interval(values)
    return written(statistics.fmean(values)) + ("" if around is None else f" ({' to '.join(map(written, around))})")
