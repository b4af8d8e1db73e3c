"""Curves of a run as small SVG plots that follow the page's colours."""

import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from stoa_jax.errors import UserError

# (heading, regex of its metrics), in the order of the page.
GROUPS: tuple[tuple[str, str], ...] = (
    ("Losses", r"^loss"),
    ("Evaluations during training", r"^eval/"),
    ("Optimization", r"^(grad_norm|schedule|lr|param_norm|update)"),
    ("Training metrics", r""),
)
FOLDED = ("Optimization", "Training metrics")  # headings that start collapsed
LEFT_OUT = ("time/", "memory/", "weight/", "nonfinite/", "step")
POINTS = 400  # per curve; longer ones are averaged over bins
# Placeholders for the page's colours, which depend on light and dark mode.
INK, LINE = "#010203", "#040506"


def series(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return steps and finite values of every logged metric."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(LEFT_OUT) or isinstance(value, bool):
                continue
            if isinstance(value, int | float) and math.isfinite(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    return {name: (np.array(s), np.array(v)) for name, (s, v) in sorted(found.items())}


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Group metric names by heading, each under the first that matches."""
    groups: dict[str, list[str]] = {heading: [] for heading, _ in GROUPS}
    for name in names:
        groups[next(heading for heading, regex in GROUPS if re.search(regex, name))].append(name)
    return {heading: names for heading, names in groups.items() if names}


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a curve to at most `POINTS` points, each the mean of its bin."""
    if len(steps) <= POINTS:
        return steps, values
    bins = np.array_split(np.arange(len(steps)), POINTS)
    return (
        np.array([steps[b].mean() for b in bins]),
        np.array([values[b].mean() for b in bins]),
    )


def plot(
    name: str,
    steps: Sequence[float] | np.ndarray,
    values: Sequence[float] | np.ndarray,
    mark: str = "p",
) -> str:
    """Plot one curve as an inline SVG element with real text; `mark` prefixes its ids."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "the report draws with matplotlib, which is not installed; "
            "pip install 'matplotlib>=3.9'"
        ) from None

    x, y = thinned(np.asarray(steps), np.asarray(values))
    settings: dict[Any, Any] = {
        **{"svg.fonttype": "none", "svg.hashsalt": "stoa", "font.family": "sans-serif"},
        **{"font.sans-serif": ["system-ui", "DejaVu Sans", "sans-serif"], "font.size": 9},
        **{key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor")},
        **{key: INK for key in ("xtick.color", "ytick.color")},
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(3.6, 2.1), layout="constrained")
        axis = figure.subplots()
        axis.plot(x, y, color=LINE, linewidth=1.4, marker="o" if len(x) < 12 else "", markersize=3)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        axis.margins(x=0.02)
        axis.locator_params(nbins=5)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(LINE, "var(--curve)")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids must be unique on a page with several plots.
    svg = re.sub(r'\bid="', f'id="{mark}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\g<1>#{mark}-", svg)
    said = f"{name}: {values[0]:.4g} at step {steps[0]:g}, {values[-1]:.4g} at step {steps[-1]:g}"
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(said, quote=True)}" ', 1)
