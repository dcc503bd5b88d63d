"""Plots of runs as one SVG file, which browsers and GitHub show; no library is needed to draw them.

A plot is a row of panels. Each panel has lines over optimizer steps; the same name has the same colour in all of them.
"""

import math
from html import escape
from pathlib import Path
from typing import NamedTuple


# told apart by the colour-blind too
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
WIDTH, HEIGHT, LEFT, TOP, GAP = 300, 190, 58, 34, 30  # of a panel, in pixels, and what is around it
TICKS = 4


class Line(NamedTuple):
    """Points `(step, value)` under a name; a dashed line is another quantity of the same thing."""

    name: str
    points: list[tuple[float, float]]
    is_dashed: bool = False


# what of a log is drawn, by panel: the metrics of training, and those of evaluation where a panel has none of training
PANELS = {
    "reward (gain of thoughts)": ("reward",),
    "NLL, nats: with thoughts, dashed without": ("nll_with", "nll_without"),
    "entropy of thoughts, nats": ("entropy",),
    "thought length, tokens": ("thought_length",),
}


def panels_of(logs: dict[str, list[list[dict]]]) -> dict[str, list[Line]]:
    """
    The panels of [`PANELS`] for some runs.

    Args:
        logs (`dict[str, list[list[dict]]]`):
            By the name of what they have in common, the logs of runs.

    Returns:
        `dict[str, list[Line]]`: Lines by panel. A panel that training has nothing for takes evaluations.
    """
    panels = {}
    for title, metrics in PANELS.items():
        lines = []
        for name, runs in logs.items():
            for log in runs:
                for number, metric in enumerate(metrics):
                    points = _points(log, f"rl/{metric}") or _points(log, f"eval_{metric}")
                    lines.append(Line(name, points, is_dashed=number > 0))
        panels[title] = [line for line in lines if line.points]
    return panels


def _points(log: list[dict], name: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[name]) for entry in log if _is_number(entry.get(name))]


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def write_plot(path: Path, title: str, panels: dict[str, list[Line]]) -> None:
    """
    Writes panels side by side.

    Args:
        path (`Path`):
            An SVG file.
        title (`str`):
            Above them.
        panels (`dict[str, list[Line]]`):
            Lines by the title of their panel.
    """
    names = list(dict.fromkeys(line.name for lines in panels.values() for line in lines))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    width, height = GAP + len(panels) * (LEFT + WIDTH + GAP), TOP + 24 + HEIGHT + 46 + 18 * len(names)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(GAP, 22, title, 'font-size="15" font-weight="bold"'),
    ]
    for number, (heading, lines) in enumerate(panels.items()):
        parts += _panel(GAP + LEFT + number * (LEFT + WIDTH + GAP), TOP + 24, heading, lines, colors)
    for number, name in enumerate(names if len(names) > 1 else ()):
        y = TOP + 24 + HEIGHT + 52 + 18 * number
        parts.append(f'<rect x="{GAP + LEFT}" y="{y - 9}" width="14" height="4" fill="{colors[name]}"/>')
        parts.append(_text(GAP + LEFT + 22, y - 3, name))
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _panel(x: float, y: float, heading: str, lines: list[Line], colors: dict[str, str]) -> list[str]:
    """The elements of a panel whose upper left corner is at (x, y)."""
    parts = [
        _text(x, y - 8, heading),
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>',
    ]
    if not lines:
        return [*parts, _text(x + 12, y + HEIGHT / 2, "nothing was logged", 'fill="#777"')]
    steps, values = zip(*(point for line in lines for point in line.points), strict=True)
    (low, high), (first, last) = _range(values), _range(steps)

    def place(step: float, value: float) -> tuple[float, float]:
        return x + (step - first) / (last - first) * WIDTH, y + (high - value) / (high - low) * HEIGHT

    for tick in range(TICKS + 1):
        value, step = low + (high - low) * tick / TICKS, first + (last - first) * tick / TICKS
        parts.append(_text(x - 6, place(first, value)[1] + 4, f"{value:.3g}", 'text-anchor="end" fill="#555"'))
        parts.append(_text(place(step, low)[0], y + HEIGHT + 16, f"{step:.4g}", 'text-anchor="middle" fill="#555"'))
    parts.append(_text(x + WIDTH / 2, y + HEIGHT + 32, "step", 'text-anchor="middle" fill="#555"'))
    for line in lines:
        points = [place(*point) for point in line.points]
        dash = ' stroke-dasharray="5 3"' if line.is_dashed else ""
        if len(points) == 1:
            parts.append(f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" fill="{colors[line.name]}"/>')
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colors[line.name]}" stroke-width="1.6"{dash}/>')
    return parts


def _range(values: tuple[float, ...]) -> tuple[float, float]:
    """From the least to the greatest of values; around them where they are one."""
    low, high = min(values), max(values)
    margin = max(abs(low) * 0.05, 1e-6) if low == high else 0.0
    return low - margin, high + margin


def _text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'
