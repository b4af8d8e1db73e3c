"""Results beside their baselines, from the rows of `results.json`."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TRIVIAL = {"chance": "chance", "majority": "majority answer", "most_frequent": "most frequent"}
ABLATED = {"text_only": "text only", "single_frame": "one frame"}
# Protocols for which a trivial baseline of another protocol is not comparable.
OWN_SCALE = ("authors",)
RANKS = ("MedR", "MeanR")  # lower is better


@dataclasses.dataclass
class Line:
    """One metric of the model with its baselines."""

    metric: str
    value: float | str
    n: int
    protocol: str
    partial: bool = False
    trivial: float | None = None
    trivial_name: str = ""
    ablated: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by ABLATED's values

    @property
    def beats_trivial(self) -> bool | None:
        """Whether the value is better than the trivial baseline; None if either is missing."""
        if self.trivial is None or isinstance(self.value, str):
            return None
        if self.metric.rpartition("/")[2] in RANKS:
            return self.value < self.trivial
        return self.value > self.trivial


def lines(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Return one line for each metric of the full model, in the order of `rows`."""
    split = [(_split(str(row["metric"])), row) for row in rows]
    models = {key: row for (key, kind), row in split if not kind}
    trivial: dict[tuple[str, ...], tuple[float, str]] = {}
    ablated: dict[tuple[str, ...], dict[str, float]] = {}
    for (key, kind), row in split:
        value = row["value"]
        if kind in TRIVIAL and isinstance(value, int | float):
            trivial[key] = value, TRIVIAL[kind]
        elif kind in ABLATED and isinstance(value, int | float):
            ablated.setdefault(key, {})[ABLATED[kind]] = value
    found = []
    for key, row in models.items():
        value, name = _baseline(key, trivial) or (None, "")
        found.append(
            Line(
                metric="/".join(key),
                value=row["value"],
                n=int(row.get("n") or 0),
                protocol=str(row.get("protocol", "")),
                partial=bool(row.get("partial")),
                trivial=value,
                trivial_name=name,
                ablated=ablated.get(key, {}),
            )
        )
    return found


def _split(metric: str) -> tuple[tuple[str, ...], str]:
    """Split a metric's name into the metric and its baseline or ablation."""
    parts = metric.split("/")
    kind = next((p for p in parts[1:] if p in TRIVIAL or p in ABLATED), "")
    return tuple(p for p in parts if p != kind), kind


def _baseline(
    key: tuple[str, ...], trivial: Mapping[tuple[str, ...], tuple[float, str]]
) -> tuple[float, str] | None:
    """Return the trivial baseline of the same metric for any decoding or ranking method."""
    if any(part in OWN_SCALE for part in key):
        return None
    for size in range(len(key) - 1, 0, -1):
        if (found := trivial.get((key[0], *key[-size:]))) is not None:
            return found
    return None


def number(value: float | str | None) -> str:
    """Format a value with its significant digits; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:.3f}" if abs(value) < 2 else f"{value:.1f}"


def facts(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return what all rows share: split, checkpoint, seed, devices, versions, date."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for key in ("split", "split_hash", "checkpoint", "seed", "devices", "date"):
            if row.get(key) not in (None, ""):
                found.setdefault(key.replace("_", " "), {})[str(row[key])] = None
        for name, version in (row.get("versions") or {}).items():
            found.setdefault("versions", {})[f"{name} {version}"] = None
    return [(key, ", ".join(values)) for key, values in found.items()]
