"""What a run shows of itself in a notebook: a table with a row for each step, with the numbers that a terminal's lines have."""

from transformers.utils.notebook import NotebookProgressCallback  # imports IPython

from .progress import OF_WINDOWS, RunCallback, line_of, prefix_of


# the heading and the format of each column, by the metrics without `rl/` or `eval_`
COLUMNS = {
    "loss": ("loss", "{:.4g}"),
    "reward": ("reward", "{:+.4f}"),
    "nll_with": ("NLL with thoughts", "{:.3f}"),
    "nll_without": ("NLL without", "{:.3f}"),
    "exact_match_with": ("right with thoughts", "{:.1%}"),
    "exact_match_without": ("right without", "{:.1%}"),
    "thought_length": ("thought length", "{:.1f}"),
}
OF_TRAINING = [heading for heading, _ in COLUMNS.values()]


class ThoughtTable(NotebookProgressCallback, RunCallback):
    """
    The Trainer's bar and table for notebooks. Its own table has the loss alone, or all metrics of evaluations, and it takes times out
    of what `evaluate` returns.
    """

    def __init__(self):
        super().__init__()
        self.rows: dict[int, dict[str, str]] = {}  # by step: what each column shows

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.training_tracker.inner_table, self.rows = None, {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        prefix = prefix_of(logs)
        if self.training_tracker is None or not ("loss" in logs or prefix):
            line = line_of(logs, state)
            if line is not None:
                print(line)
        elif "loss" in logs:
            found = {"loss": logs["loss"], **{name: logs.get(f"rl/{name}") for name in OF_WINDOWS}}
            self._write(state.global_step, "", found)
        else:
            found = {name: logs.get(prefix + name) for name in COLUMNS if name != "loss"}
            self._write(state.global_step, f"{prefix.removeprefix('eval_').strip('_') or 'eval'} ", found)

    def _write(self, step: int, of: str, found: dict[str, float | None]) -> None:
        """Shows numbers in the row of a step; `of` stands before their headings."""
        formats = {name: COLUMNS[name] for name, value in found.items() if value is not None}
        shown = {of + heading: form.format(found[name]) for name, (heading, form) in formats.items()}
        self.rows[step] = self.rows.get(step, {}) | shown
        headings = list(dict.fromkeys(heading for row in self.rows.values() for heading in row))
        headings.sort(key=lambda heading: heading not in OF_TRAINING)  # stable: evaluations come after it
        table = [[step, *(row.get(heading, "") for heading in headings)] for step, row in self.rows.items()]
        self.training_tracker.inner_table = [["step", *headings], *table]
        self.training_tracker.display()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.on_predict(args, state, control)  # closes the bar of the evaluation
        if self.training_tracker is not None:
            self.training_tracker.remove_child()

    def end_run(self) -> None:
        self.training_tracker = self.prediction_bar = None
