"""Read the files of a work directory, and note what is damaged or missing."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stoa_jax.errors import UserError

CONFIG, METRICS, RESULT = "config.json", "metrics.jsonl", "result.json"
RESULTS, PREDICTIONS = "results.json", "predictions.json"
FILES = (CONFIG, METRICS, RESULT, RESULTS, PREDICTIONS)


@dataclasses.dataclass
class Run:
    """The files of one run. Missing parts are empty."""

    workdir: Path
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # metrics.jsonl
    last: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # result.json
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    predictions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)  # what could not be read

    @property
    def task(self) -> str:
        """Name of the task, or "run" if no file states it."""
        return str(self.config.get("task") or self.last.get("task") or "run")


def read_run(workdir: str | Path) -> Run:
    """Read the files of a run; a damaged file becomes a note, an unreadable run a `UserError`."""
    workdir = Path(workdir)
    if not workdir.exists():
        raise UserError(f"{workdir}: no such directory; name the work directory of a run")
    if not workdir.is_dir():
        raise UserError(f"{workdir}: not a directory; name the work directory of a run")
    run = Run(workdir)
    if not any((workdir / name).is_file() for name in FILES):
        inside = sorted(p.parent.name for p in workdir.glob(f"*/{CONFIG}"))
        hint = (
            f"it holds the runs {', '.join(inside)}: name one, for example {workdir / inside[0]}"
            if inside
            else f"expected at least one of {', '.join(FILES)}"
        )
        raise UserError(f"{workdir}: not the work directory of a run; {hint}")
    run.config = _mapping(run, CONFIG)
    run.last = _mapping(run, RESULT)
    run.predictions = _predictions(run)
    run.steps = _lines(run)
    run.results = _results(run)
    if not run.config and run.results and isinstance(run.results[0].get("config"), dict):
        run.config = run.results[0]["config"]  # weights that were evaluated and never trained
    if not (run.config or run.last or run.predictions or run.steps or run.results):
        reason = "; ".join(run.notes) or "all its files are empty"
        raise UserError(f"{workdir}: nothing to report ({reason}); train or evaluate the run again")
    return run


def _json(run: Run, name: str) -> Any:
    path = run.workdir / name
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        run.notes.append(f"{name} cannot be read ({' '.join(str(error).split())[:120]})")
        return None


def _mapping(run: Run, name: str) -> dict[str, Any]:
    value = _json(run, name)
    if value is None or isinstance(value, dict):
        return value or {}
    run.notes.append(f"{name} holds a {type(value).__name__}, not an object; left out")
    return {}


def _predictions(run: Run) -> dict[str, Any]:
    found = {}
    for name, rows in _mapping(run, PREDICTIONS).items():
        if isinstance(rows, dict):
            found[name] = rows
        else:
            run.notes.append(f"{PREDICTIONS}: {name!r} is not an object; left out")
    return found


def _results(run: Run) -> list[dict[str, Any]]:
    value = _json(run, RESULTS)
    if value is None:
        return []
    rows = value if isinstance(value, list) else []
    good = [
        r
        for r in rows
        if isinstance(r, dict)
        and isinstance(r.get("metric"), str)
        and isinstance(r.get("value"), int | float | str)
    ]
    if len(good) < len(rows) or not isinstance(value, list):
        bad = len(rows) - len(good) or 1
        run.notes.append(f"{RESULTS}: {bad} entries without a metric and a value; left out")
    return good


def _lines(run: Run) -> list[dict[str, Any]]:
    path = run.workdir / METRICS
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        run.notes.append(f"{METRICS} cannot be read ({error.strerror})")
        return []
    rows, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row["step"], int):
                raise ValueError("no step")
            rows.append(row)
        except (ValueError, KeyError, RecursionError):
            if line.strip():
                bad.append(number)
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        run.notes.append(f"{METRICS}: {len(bad)} damaged lines left out (line {shown})")
    return rows
