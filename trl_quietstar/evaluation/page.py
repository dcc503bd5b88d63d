"""The report page: one HTML file that needs neither a network nor a server.

Text from the model or the data enters the page as JSON, which is written so that nothing in it can end the script
element. The page's script puts that text in place as text, never as markup. A content security policy allows this
script and the style sheet by their hashes, and nothing else.
"""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from .inspection import summarize


# a plot: its title, and for each line the key in the log history, the label and the CSS classes
CHARTS = (
    ("Reward (gain of thoughts)", (("rl/reward", "training", "with"), ("eval_reward", "held-out", "with held-out"))),
    (
        "NLL, nats",
        (
            ("rl/nll_without", "training, without thoughts", "without"),
            ("rl/nll_with", "training, with", "with"),
            ("eval_nll_without", "held-out, without", "without held-out"),
            ("eval_nll_with", "held-out, with", "with held-out"),
        ),
    ),
    ("Entropy of thoughts, nats", (("rl/entropy", "training", "with"),)),
)
WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 340, 190, 58, 34, 10  # of a plot, in units of its view box

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; base-uri 'none'; \
form-action 'none'; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{notes}
<dl class="summary">{summary}</dl>
</header>
<div class="reader">
<main id="texts"><div id="legend"></div><noscript><p>This page needs JavaScript.</p></noscript></main>
<aside id="details" aria-live="polite" aria-label="Thoughts after the chosen token"></aside>
</div>
<section id="extremes" aria-label="Most and least helpful thoughts"></section>
{charts}
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def render_page(title: str, texts: list[dict], notes: Sequence[str] = (), history: Sequence[dict] = ()) -> str:
    """
    Renders the report page as one string of HTML.

    Args:
        title (`str`):
            Title of the page.
        texts (`list[dict]`):
            The result of [`~evaluation.inspection.inspect_texts`].
        notes (`Sequence[str]`):
            Paragraphs below the title.
        history (`Sequence[dict]`):
            Log history of a training run, from which plots are drawn. Without entries there are no plots.

    Raises:
        `ValueError`: if a number in `texts` is NaN or infinite.
    """
    style, script = (files(__package__).joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    summary = summarize(texts)
    # the page's script puts thoughts and texts in place; title, notes and numbers are put in place here
    data = {"texts": texts, "helped": summary.pop("helped"), "hurt": summary.pop("hurt")}
    return PAGE.format(
        title=escape(title),
        notes="\n".join(f"<p>{escape(note)}</p>" for note in notes),
        summary="".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _summary_rows(summary)),
        charts=_charts(history),
        style=style,
        script=script,
        data=script_json(data),
        style_hash=_source_hash(style),
        script_hash=_source_hash(script),
    )


def write_page(
    path: Path, title: str, texts: list[dict], notes: Sequence[str] = (), history: Sequence[dict] = ()
) -> None:
    """Writes the page that [`render_page`] makes of the other arguments into a file."""
    path.write_text(render_page(title, texts, notes, history), encoding="utf-8", errors="replace")


def script_json(data: object) -> str:
    """
    JSON for a script element: in ASCII and without `<`, `>` and `&`, so that an HTML parser finds no markup in it.

    Raises:
        `ValueError`: if `data` holds NaN or infinity.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _source_hash(source: str) -> str:
    """The hash by which a content security policy names a script or a style sheet."""
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _summary_rows(summary: dict) -> list[tuple[str, str]]:
    """Names and values at the top of the page."""
    rows = [("thoughts", f"{summary['thoughts']:,} after {summary['positions']:,} tokens")]
    if summary["nll_with"] is not None and summary["nll_without"] is not None:
        rows += [
            ("NLL without thoughts", f"{summary['nll_without']:.3f} nats"),
            ("NLL with thoughts", f"{summary['nll_with']:.3f} nats"),
            ("mean gain", f"{summary['nll_without'] - summary['nll_with']:+.4f} nats"),
            ("mean mixing weight", f"{summary['weight']:.3f}"),
        ]
    return rows


# Plots


def _charts(history: Sequence[dict]) -> str:
    """All plots that the history has numbers for; empty if there are none."""
    drawn = [_chart(title, lines, history) for title, lines in CHARTS]
    if not any(drawn):
        return ""
    return f'<section class="charts" aria-label="Training so far">{"".join(drawn)}</section>'


def _is_measured(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _chart(title: str, lines: tuple, history: Sequence[dict]) -> str:
    """One plot over steps as a `figure` with a legend; empty if none of its lines was logged."""
    series = [
        (label, kind, [(entry["step"], entry[key]) for entry in history if _is_measured(entry.get(key))])
        for key, label, kind in lines
    ]
    series = [(label, kind, points) for label, kind, points in series if points]
    if not series:
        return ""
    # a single point, or equal values, have no extent: the scale is then 1, so that nothing is divided by 0
    steps, values = zip(*(point for *_, points in series for point in points), strict=True)
    first, last, low, high = min(steps), max(steps), min(values), max(values)

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (step - first) / ((last - first) or 1) * (WIDTH - LEFT - MARGIN)
        y = HEIGHT - BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - BOTTOM - MARGIN)
        return round(x, 1), round(y, 1)

    parts = [_grid(first, last, low, high, place)]
    for label, kind, points in series:
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
        for step, value in points:  # a mark each, whose title is read by pointing at it
            x, y = place(step, value)
            tip = f"<title>{label}, step {step}: {value:.4g}</title>"
            parts.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="2.5">{tip}</circle>')
    spoken = "; ".join(f"{label} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for label, _, points in series)
    keys = "".join(
        f'<li><svg viewBox="0 0 24 8" aria-hidden="true"><polyline class="{kind}" points="0,4 24,4"/></svg>{label}</li>'
        for label, kind, _ in series
    )
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}: {spoken}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{title}</figcaption><ul>{keys}</ul>{svg}</figure>"


def _grid(
    first: float, last: float, low: float, high: float, place: Callable[[float, float], tuple[float, float]]
) -> str:
    """Grid lines and labels of the axes; `place` maps a step and a value to x and y."""
    parts = []
    for value in sorted({low, (low + high) / 2, high}):  # one line if all values are equal
        _, y = place(first, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - MARGIN}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.3g}</text>')
    for step in sorted({first, last}):
        x, _ = place(step, low)
        anchor = "end" if step == last and last > first else "start"  # labels stay within the plot
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{anchor}">{step:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    return "".join(parts)
