"""What a model keeps of the run that made it: configuration, step and measured metrics.

A work directory has it in its own files. A saved model has it in `run.json` beside the weights, so
that it is kept however often the model is saved and loaded.
"""

import json
from pathlib import Path
from typing import Any

from stoa_jax.errors import UserError
from stoa_jax.inference import sidecars

CHECKPOINTS = "checkpoints"  # the directory that makes a directory a run's
CARD = "README.md"
_KEPT = ("metric", "value", "n", "split", "split_hash", "partial", "protocol", "seed", "date")


def read(weights: Path) -> dict[str, Any]:
    """Return the record of the weights at a path; empty where nothing is known.

    It has some of the keys `config`, `step`, `results`, `card` (the text of a card that came with
    weights of another origin) and `unreadable` (files that could not be read).
    """
    kept = sidecars.read(weights, sidecars.RUN) or {}
    if not isinstance(kept, dict):
        where = sidecars.path_of(weights, sidecars.RUN)
        raise UserError(f"{where}: it must be a JSON object; delete it, or save the model again")
    if (weights / CHECKPOINTS).is_dir():
        return kept | _of_run(weights)
    if kept or not weights.is_dir():
        return kept
    card = weights / CARD
    try:
        return {"card": card.read_text(encoding="utf-8")} if card.is_file() else {}
    except (OSError, ValueError):
        return {"unreadable": [CARD]}


def _of_run(workdir: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    steps = [int(p.name) for p in (workdir / CHECKPOINTS).iterdir() if p.name.isdigit()]
    if steps:
        found["step"] = max(steps)
    for key, name, kind in (("config", "config.json", dict), ("results", "results.json", list)):
        if not (workdir / name).is_file():
            continue
        try:
            value = json.loads((workdir / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            value = None
        if isinstance(value, kind):
            found[key] = value
        else:
            found.setdefault("unreadable", []).append(name)
    if "results" in found:
        rows = [row for row in found["results"] if isinstance(row, dict) and "metric" in row]
        found["results"] = [{k: row[k] for k in _KEPT if k in row} for row in rows]
    return found
