"""Write the report of `stoa report WORKDIR`: curves, results, examples, matches and cost."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stoa_jax import film
from stoa_jax.errors import UserError
from stoa_jax.files import write_text
from stoa_jax.report import curves, examples, page, tables
from stoa_jax.report.clips import Clips, open_clips
from stoa_jax.report.matches import matched_clips
from stoa_jax.report.run_files import Run, read_run

NAME = "report.html"


def write_report(
    workdir: str | Path, output: str | Path | None = None, *, clips: int = 6
) -> tuple[Path, list[str]]:
    """Write the report of a run; return its path and notes on what could not be shown.

    `output` is a file, by default `report.html` in the work directory. `clips` is the number of
    clips of the evaluated split that are shown with their matches.
    """
    run = read_run(workdir)
    output = Path(output) if output else run.workdir / NAME
    content = render(run, clips)
    try:
        write_text(output, content)
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror}); name another file with --output"
        ) from None
    return output, run.notes


def render(run: Run, clips: int = 6) -> str:
    """Return the report of a run as one HTML page."""
    at_hand = open_clips(run) if run.results or run.predictions else None
    sections = [
        ("Results", _results(run)),
        ("Curves", _curves(run)),
        ("Examples", _examples(run, at_hand)),
        ("Matches", _matches(run, at_hand, clips)),
        ("Cost", _cost(run)),
        ("Configuration", _configuration(run)),
    ]
    name = run.workdir.resolve().name
    lead = f"Run {name}, task {run.task}"
    if step := run.last.get("step") or (run.steps and run.steps[-1]["step"]):
        lead += f", step {step}"
    return page.document(
        f"Report: {name}", lead + ".", run.notes, [(head, body) for head, body in sections if body]
    )


def _results(run: Run) -> str:
    if not run.results:
        run.notes.append("results.json is missing: evaluate the run with --mode=eval")
        return ""
    lines = tables.lines(run.results)
    return page.results(lines) + page.definitions(tables.facts(run.results))


def _curves(run: Run) -> str:
    found = curves.series(run.steps)
    if not found:
        run.notes.append("metrics.jsonl is missing or empty: no curves")
        return ""
    parts, number, single = [], 0, []
    for heading, names in curves.grouped(found).items():
        plots = []
        for name in names:
            steps, values = found[name]
            if len(steps) == 1:  # one point is not a curve
                single.append((name, f"{values[0]:.4g} at step {steps[0]}"))
                continue
            number += 1
            plots.append(page.figure(name, curves.plot(name, steps, values, f"plot{number}")))
        if not plots:
            continue
        grid = f'<div class="grid">{"".join(plots)}</div>'
        if heading in curves.FOLDED:
            parts.append(page.folded(f"{heading}: {len(plots)} plots", grid))
        else:
            parts.append(f"<h3>{heading}</h3>{grid}")
    if single:
        parts.append(page.folded("Logged once", page.definitions(single)))
    return "\n".join(parts)


def _examples(run: Run, clips: Clips | None) -> str:
    if not run.predictions:
        return ""
    predictions: dict[str, Any] = dict(run.predictions)
    references: Mapping[str, Sequence[str]] = {}
    if clips is not None:
        references = clips.captions()
        predictions = _with_options(predictions, clips)
    groups, notes = examples.groups(predictions, references)
    run.notes += notes
    return "\n".join(page.group(_filmed(group, clips)) for group in groups)


def _with_options(predictions: Mapping[str, Any], clips: Clips) -> dict[str, Any]:
    """Return predictions whose choices include their video and options."""
    found = dict(predictions)
    for name, rows in predictions.items():
        if not all(isinstance(v, dict) and "chosen" in v for v in rows.values()):
            continue
        choices = clips.options()
        found[name] = {
            key: {**row, "video": choices[int(key)][0], "options": list(choices[int(key)][1])}
            if key.isdigit() and int(key) < len(choices)
            else row
            for key, row in rows.items()
        }
    return found


def _filmed(group: examples.Group, clips: Clips | None) -> examples.Group:
    """Return the group with film strips, if the clips are available."""
    if clips is None:
        return group

    def filmed(item: examples.Example) -> examples.Example:
        if (i := clips.index.get(item.video)) is None:
            return item
        address = film.data_address(film.strip(clips.frames(i), height=96))
        return dataclasses.replace(item, film=address)

    return dataclasses.replace(
        group,
        **{k: tuple(map(filmed, getattr(group, k))) for k in ("good", "bad", "unjudged")},
    )


def _matches(run: Run, clips: Clips | None, count: int) -> str:
    if clips is None or count < 1:
        return ""
    cards = matched_clips(run, clips, count)
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _cost(run: Run) -> str:
    rows = run.steps
    last: dict[str, Any] = {}
    for row in rows:
        last.update(row)
    facts: list[tuple[str, str]] = []
    timed = [row for row in rows if isinstance(row.get("time/step"), int | float)]
    if timed:
        mean = sum(row["time/step"] for row in timed) / len(timed)
        facts.append(("time per step", f"{mean:.3g} s"))
        steps = max(row["step"] for row in rows)
        facts.append(("training time", _duration(mean * steps) + ", without compilation"))
    evaluations = [r["time/eval"] for r in rows if isinstance(r.get("time/eval"), int | float)]
    if evaluations:
        facts.append(("evaluation time", _duration(sum(evaluations))))
    for key, label, form in (
        ("time/clips_per_second", "clips per second", "{:.4g}"),
        ("time/data_wait", "waiting for data, per step", "{:.3g} s"),
        ("time/goodput", "share of wall-clock time spent in steps", "{:.0%}"),
        ("memory/host", "host memory", "{:.2f} GiB"),
        ("memory/device_peak", "peak device memory", "{:.2f} GiB"),
        ("nonfinite/total", "steps with a non-finite loss", "{:.0f}"),
    ):
        if isinstance(last.get(key), int | float):
            facts.append((label, form.format(last[key])))
    return page.definitions(facts) if facts else ""


def _duration(seconds: float) -> str:
    """Format a time for reading."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds % 60:02d} s" if minutes else f"{seconds} s"


def _configuration(run: Run) -> str:
    flat = _flat(run.config)
    if not flat:
        return ""
    rows = [(page.text(key), page.text(value)) for key, value in flat.items()]
    return page.folded(f"{len(rows)} settings", page.table(("key", "value"), rows))


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
