"""What every run leaves on disk of its course, whatever is saved or evaluated: `history.jsonl`, `history.svg` and `run.json`.

`trl-quietstar compare` reads them. They stand in the output directory, and the main process writes them.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from ..evaluation.plots import panels_of, write_plot
from .progress import RunCallback


logger = logging.get_logger(__name__)

HISTORY, PLOT, RUN = "history.jsonl", "history.svg", "run.json"


class HistoryCallback(RunCallback):
    """
    Appends what is logged to `history.jsonl` as it comes, a line for each entry with its `step`, so that a run that is killed leaves
    it too. A run that is resumed begins with the entries of its checkpoint. The plot is drawn at the end.

    Args:
        model (`str`):
            Name of the base model, for `run.json`.
    """

    def __init__(self, model: str):
        self.model = model
        self.entries: list[dict] = []
        self.has_begun = self.has_ended = False

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        # an evaluation before training belongs to it; what an earlier run of this trainer logged does not
        before = [] if self.has_ended else [entry for entry in self.entries if entry["step"] == 0]
        self.entries = list(state.log_history) if state.global_step else before
        self.has_begun, self.has_ended = True, False
        folder = Path(args.output_dir)
        with _bearing_a_full_disk():
            folder.mkdir(parents=True, exist_ok=True)
            # where a run goes on, a stage of a curriculum may hold
            if state.global_step == 0 or not (folder / RUN).is_file():
                (folder / RUN).write_text(
                    json.dumps({"model": self.model, "args": args.to_dict()}, indent=1, default=str)
                )
            (folder / HISTORY).write_text("".join(map(_line, self.entries)))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        entry = {"step": state.global_step, **logs}
        self.entries.append(entry)
        if self.has_begun:  # which wrote what came before
            with _bearing_a_full_disk(), Path(args.output_dir, HISTORY).open("a") as lines:
                lines.write(_line(entry))

    def end_run(self) -> None:
        self.has_ended = True

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            name = Path(args.output_dir).name
            with _bearing_a_full_disk():
                write_plot(Path(args.output_dir, PLOT), name, panels_of({name: [self.entries]}))


@contextmanager
def _bearing_a_full_disk() -> Iterator[None]:
    """Inside, a file that cannot be written is warned about: a run does not end for its history."""
    try:
        yield
    except OSError as error:
        logger.warning_once(f"The history of the run cannot be written ({error}); training goes on.")


def _line(entry: dict) -> str:
    return json.dumps(entry, default=str) + "\n"


def read_history(folder: Path) -> tuple[dict, list[dict]]:
    """
    What a run left.

    Args:
        folder (`Path`):
            Its output directory.

    Returns:
        `tuple[dict, list[dict]]`: its settings, with the model's name as `model`, and the entries of its log. A last line that was
            cut off is left out.

    Raises:
        `FileNotFoundError`: if the folder is none of a run.
        `ValueError`: if a file is broken.
    """
    for name in (RUN, HISTORY):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} is no run: it has no {name}. Give the `output_dir` of a run that has begun."
            )
    try:
        run = json.loads((folder / RUN).read_text())
        settings = {"model": run["model"], **run["args"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{RUN} of {str(folder)!r} is broken ({error}).") from None
    entries = []
    lines = (folder / HISTORY).read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"Line {number} of {HISTORY} of {str(folder)!r} is broken ({error}).") from None
    return settings, entries
