"""Small files beside the weights: answer list, calibration, the library's settings, the run.

A work directory and a saved model keep them as `answers.json`, `calibration.json`, `library.json`
and `run.json`; weights in a file NAME.safetensors as `NAME.answers.json` and so on. A checkpoint
itself is never changed.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stoa_jax.errors import UserError
from stoa_jax.files import write_json

ANSWERS, CALIBRATION, SETTINGS = "answers.json", "calibration.json", "library.json"
RUN = "run.json"  # what `run_record` reads
CALIBRATION_VERSION = 1  # of the format of calibration.json
NAMES = (ANSWERS, CALIBRATION, SETTINGS, RUN)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How match logits become probabilities, and from which probability a pair is a match."""

    temperature: float = 1.0
    threshold: float | None = None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the whole file


def path_of(weights: Path, name: str) -> Path:
    """Return the path of the file `name` beside these weights."""
    if weights.is_dir():
        return weights / name
    beside = weights.with_name(f"{weights.stem}.{name}")
    if not beside.exists() and weights.name == "model.safetensors":
        return weights.with_name(name)
    return beside


def read(weights: Path, name: str) -> Any:
    """Return the JSON value of a file beside the weights, or None if there is no such file."""
    path = path_of(weights, name)
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON ({error}); write it again") from None


def write(weights: Path, name: str, value: Any) -> None:
    """Write a JSON value beside the weights, atomically."""
    write_json(path_of(weights, name), value)


def copy(source: Path, out: Path) -> None:
    """Copy the files beside the weights at `source` to those at `out`."""
    for name in NAMES:
        if (value := read(source, name)) is not None:
            write(out, name, value)


def read_answers(weights: Path) -> tuple[str, ...]:
    """Return the answers in the order of the answer head's classes; () if there is no file."""
    value = read(weights, ANSWERS)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
        raise UserError(f"{path_of(weights, ANSWERS)}: it must be a JSON list of strings")
    return tuple(value)


def read_calibration(weights: Path) -> Calibration | None:
    """Return the calibration of a model, or None if it was not calibrated."""
    value = read(weights, CALIBRATION)
    if value is None:
        return None
    where = path_of(weights, CALIBRATION)
    if not isinstance(value, dict):
        raise UserError(f"{where}: it must be a JSON object; calibrate the model again")
    if (version := value.get("version", CALIBRATION_VERSION)) != CALIBRATION_VERSION:
        raise UserError(
            f"{where}: format version {version!r}, and this release reads {CALIBRATION_VERSION}; "
            "calibrate the model again"
        )
    temperature, threshold = value.get("temperature", 1.0), value.get("threshold")
    if not _is_number(temperature) or temperature <= 0:
        raise UserError(f"{where}: temperature is {temperature!r}, not a number above 0")
    if threshold is not None and (not _is_number(threshold) or not 0 <= threshold <= 1):
        raise UserError(f"{where}: threshold is {threshold!r}, not a number from 0 to 1")
    return Calibration(float(temperature), None if threshold is None else float(threshold), value)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
