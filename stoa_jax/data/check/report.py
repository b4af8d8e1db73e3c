"""Findings of a check, by split of the experiment, as readable lines and as JSON."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHOWN = 10  # names printed per list; check.json has all of them


@dataclasses.dataclass(frozen=True)
class Part:
    """A split and its role in the experiment."""

    dataset: str
    split: str
    evaluated: bool  # False: trained on

    def __str__(self) -> str:
        return f"{self.dataset}:{self.split}"


@dataclasses.dataclass
class Report:
    """Findings. `problems` make metrics incomparable; `notes` do not."""

    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    parts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    sheets: list[str] = dataclasses.field(default_factory=list)

    def of(self, part: Part) -> dict[str, Any]:
        """Return the findings on a split."""
        return self.parts.setdefault(str(part), {"role": "eval" if part.evaluated else "train"})

    def add(self, part: Part, text: str) -> None:
        """Add a problem of an evaluated split, or a note if the split is only trained on."""
        (self.problems if part.evaluated else self.notes).append(f"{part}: {text}")


def names_of(names: Iterable[str]) -> str:
    """Format the first few names and the number of the others."""
    names = list(names)
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def write(report: Report, out: Path) -> None:
    """Write all findings to `out`/check.json."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False)
    (out / "check.json").write_text(text + "\n")


def show(report: Report) -> str:
    """Format the report as readable lines."""
    lines = []
    for name, found in report.parts.items():
        if "role" not in found:
            continue
        due = found.get("expected_clips")
        counts = [f"{found[k]:,} {k}" for k in ("listed", "built") if k in found]
        published = f"{due:,} published" if due is not None else "no published count"
        lines.append(f"{name} ({found['role']}): {', '.join(counts) or 'not found'}; {published}")
        if s := found.get("statistics"):
            lines.append(
                f"  texts: {s['texts_per_clip']:.1f} per clip, {s['words_per_text']:.1f} words "
                f"(longest {s['longest_text_words']}), {s['nouns_per_text']:.1f} nouns, "
                f"{s['verbs_per_text']:.1f} verbs; {s['texts_cut']:.1%} longer than the model reads"
            )
            top = ", ".join(f"{c} {n}" for c, n in s["top_classes"].items())
            lines.append(
                f"  objects: {s['objects_per_frame']:.1f} per frame, of {s['classes']} classes, "
                f"{s['frames_without_objects']:.1%} of the frames have none"
                + (f"; {top}" if top else "")
            )
    lines += [f"note: {n}" for n in report.notes]
    lines += [f"NOT COMPARABLE: {p}" for p in report.problems]
    lines += [f"contact sheet: {s}" for s in report.sheets]
    if not report.problems:
        lines.append("comparable: found nothing that makes metrics incomparable")
    return "\n".join(lines)
