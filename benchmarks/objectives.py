"""Which objective learns to think, and how soon: the learning benchmark by each, on each of its tasks.

    python -m benchmarks.objectives --output out/objectives
    python -m benchmarks.objectives --group weightings --tasks easy hard --output out/objectives
    python -m benchmarks.objectives --group critic --tasks easy rare --output out/objectives
    python -m benchmarks.objectives --group candidates --tasks easy rare --output out/objectives
    python -m benchmarks.objectives --table-only --output out/objectives

Each run leaves a file `OUTPUT/TASK-SEED-NAME.json`, and each pretrained model a folder. What is there already is not run
again, so a command that was ended goes on where it was. Training ends at 95% with thoughts, or after the task's number of steps;
accuracy is looked at every 20 steps on 200 problems, and in the end on 500, with controls. A table of each task goes to
`OUTPUT/TASK.md`. Look first at its right chains before training: a seed without any has nothing to reinforce.
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .ablations import summary
from .learning import PROBLEMS, TASKS, THOUGHTS, Task, benchmark_parser, pretrain, recipe_options, run


RECIPES = Path(__file__).parent.parent / "recipes"
STEPS = {"easy": 300, "rare": 300, "hard": 1_000, "short": 300}
ENOUGH = 0.95

# a setting is a recipe's method, fields of QuietStarConfig, or fields that change a recipe's method
NO_NLL = {"reward_prediction": "thought", "nll_coefficient": 0.0, "reader_nll_coefficient": 0.0}
ONE_THOUGHT = {"num_thoughts": 1, "per_device_train_batch_size": PROBLEMS * (THOUGHTS + 1)}
GROUPS: dict[str, dict[str, str | dict]] = {
    "objectives": {
        "defaults": {},
        "verifree": "verifree",
        "rlpr": "rlpr",
        "jepo": "jepo",
        "latro": "latro",
        "rlp": "rlp",
        "quietstar": "quietstar",
        # what learns `hard`: a reward that is 1 however unsure the reader is, which learns from what earned it
        "accuracy, gain": {
            "reward_type": "accuracy",
            "reward_prediction": "thought",
            "nll_weighting": "gain",
            "reader_nll_coefficient": 0.0,
            "advantage_baseline": "leave_one_out",
            "policy_coefficient": 10.0,
        },
        "rewards alone": {**NO_NLL, "advantage_baseline": "leave_one_out", "policy_coefficient": 10.0},
    },
    "weightings": {"defaults": {}, **{name: {"nll_weighting": name} for name in ("gain", "probability", "share")}},
    # the defaults but for one or two fields
    "candidates": {
        "defaults": {},
        "log-likelihood": {"reward_type": "log_likelihood"},
        "policy 10": {"policy_coefficient": 10.0},
        "share": {"nll_weighting": "share"},
        "log-likelihood, share": {"reward_type": "log_likelihood", "nll_weighting": "share"},
        "log-likelihood, policy 10": {"reward_type": "log_likelihood", "policy_coefficient": 10.0},
        "policy 10, share": {"policy_coefficient": 10.0, "nll_weighting": "share"},
        "policy 10, probability": {"policy_coefficient": 10.0, "nll_weighting": "probability"},
        "no reader NLL": {"reader_nll_coefficient": 0.0},
        "leave-one-out, policy 10": {"advantage_baseline": "leave_one_out", "policy_coefficient": 10.0},
    },
    # a policy that finds right thoughts, and its reader: with an NLL after thoughts, which nothing but it trains
    "reader": {
        "rlp": "rlp",
        "rlp, NLL 0.1": {"recipe": "rlp", "nll_coefficient": 0.1},
        "rlp, NLL": {"recipe": "rlp", "nll_coefficient": 1.0},
        "rlp, NLL, temperature 1": {"recipe": "rlp", "nll_coefficient": 1.0, "temperature": 1.0},
        "rlp, NLL 0.1, temperature 0.5": {"recipe": "rlp", "nll_coefficient": 0.1, "temperature": 0.5},
        "verifree, temperature 0.7": {"recipe": "verifree", "temperature": 0.7},
        "rlp, NLL by share": {"recipe": "rlp", "nll_coefficient": 1.0, "nll_weighting": "share"},
        "rlp, NLL by gain": {"recipe": "rlp", "nll_coefficient": 1.0, "nll_weighting": "gain"},
    },
    # the same number of thoughts, and so of thought tokens, in a step; the defaults have eight with the value head
    "critic": {
        "defaults": {},
        "least variance": {"advantage_baseline": "least_variance"},
        "leave-one-out": {"advantage_baseline": "leave_one_out"},
        "one thought, least variance": {**ONE_THOUGHT, "advantage_baseline": "least_variance"},
        "one thought, value head": {**ONE_THOUGHT, "advantage_baseline": "value"},
        "one thought, no baseline": {**ONE_THOUGHT, "advantage_baseline": "none"},
    },
}


def options_of(setting: str | dict, task: Task, steps: int) -> dict:
    """The fields that a setting changes, on a task."""
    changes = {"recipe": setting} if isinstance(setting, str) else dict(setting)
    recipe = changes.pop("recipe", None)
    return changes if recipe is None else recipe_options(RECIPES / f"{recipe}.yaml", task, steps) | changes


def pretrained(folder: Path, name: str, seed: int, steps: int) -> PreTrainedModel:
    """A model that knows the language of a task: from its folder, or made and kept there."""
    path = folder / f"pretrained-{name}-{seed}"
    if not path.exists():
        unfinished = path.with_name(path.name + ".part")
        pretrain(TASKS[name], seed, steps).save_pretrained(unfinished)
        unfinished.rename(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def file_of(folder: Path, task: str, seed: int, name: str) -> Path:
    """Where a run leaves its numbers."""
    return folder / f"{task}-{seed}-{name.replace(' ', '_')}.json"


def share(value: float | None) -> str:
    """In percent; thoughts too short to hold a chain have none."""
    return "–" if value is None else f"{value:.1%}"


def table(folder: Path, task: str, names: list[str]) -> str:
    """Markdown, of the runs that are there; accuracy is a mean with its range over seeds."""
    lines = []
    for name in names:
        pattern = file_of(folder, task, 0, name).name.replace(f"{task}-0-", f"{task}-*-")
        runs = [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]
        if not runs:
            continue
        cells = {"seeds": ", ".join(str(run["seed"]) for run in runs)}
        # what a task is named for; rounding in pretraining decides it, and differs from processor to processor
        cells["right chains before"] = ", ".join(share(run["before"]["right_chains"]) for run in runs)
        cells |= summary(runs)
        cells["seconds to 90%"] = ", ".join(
            "–" if x["steps_to_90"] is None else f"{x['seconds_to_90']:.0f}" for x in runs
        )
        cells["steps in all"] = ", ".join(str(run["steps"]) for run in runs)
        if not lines:
            lines = [f"| setting | {' | '.join(cells)} |", f"|{' --- |' * (len(cells) + 1)}"]
        lines.append(f"| {name} | {' | '.join(cells.values())} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.set_defaults(output=Path("out/objectives"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["easy", "rare", "hard"])
    parser.add_argument("--group", choices=GROUPS, default="objectives")
    parser.add_argument(
        "--settings", nargs="+", metavar="NAME", help="those of the group that are run; all by default"
    )
    parser.add_argument("--steps", type=int, help=f"in place of {STEPS}")
    parser.add_argument("--table-only", action="store_true", help="no runs")
    arguments = parser.parse_args()
    folder, group = arguments.output, GROUPS[arguments.group]
    names = arguments.settings or list(group)
    folder.mkdir(parents=True, exist_ok=True)
    for seed in [] if arguments.table_only else arguments.seeds:
        for task in arguments.tasks:
            for name in names:
                path = file_of(folder, task, seed, name)
                if path.exists():
                    continue
                steps = arguments.steps or STEPS[task]
                model = pretrained(folder, task, seed, arguments.pretraining_steps)
                options = options_of(group[name], TASKS[task], steps)
                result = run(TASKS[task], model, seed, steps, options, enough=ENOUGH)
                path.write_text(json.dumps({"task": task, "name": name, "options": options, **result}, indent=1))
                print(f"{task}, seed {seed}, {name}: {result['after']['accuracy']['with']:.3f}", flush=True)
    for task in arguments.tasks:
        text = table(folder, task, names)
        (folder / f"{task}.md").write_text(text)
        print(f"\n{task}\n\n{text}")


if __name__ == "__main__":
    main()
