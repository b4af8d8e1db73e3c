"""Predictions of a run as examples, the worst and the best of each kind."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from stoa_jax.report.tables import ABLATED

KEPT = 6  # good and bad examples of each evaluation


@dataclasses.dataclass(frozen=True)
class Example:
    """The model's output for one clip."""

    video: str
    said: tuple[tuple[str, str], ...]  # (label, text)
    good: bool | None  # whether it is in the better half; None if it cannot be judged
    score: str = ""
    film: str = ""  # a data address of the clip's frames


@dataclasses.dataclass(frozen=True)
class Group:
    """Examples of one evaluation."""

    name: str
    kind: str  # "captions", "answers", "choices" or "retrieved"
    total: int
    good: tuple[Example, ...]
    bad: tuple[Example, ...]
    unjudged: tuple[Example, ...] = ()

    @property
    def headings(self) -> tuple[str, str]:
        """Headings of the good and of the bad examples."""
        if self.kind == "captions":
            return "Best by ROUGE-L", "Worst by ROUGE-L"
        return "Right", "Wrong"


def groups(
    predictions: Mapping[str, Any], references: Mapping[str, Sequence[str]]
) -> tuple[list[Group], list[str]]:
    """Return examples of each evaluation of the full model, and a note on each unknown one.

    `references` has the true captions of a video, if the data set is available.
    """
    found, notes = [], []
    for name, rows in predictions.items():
        if any(part in ABLATED for part in name.split("/")):
            continue  # an ablated model
        examples, kind = _examples(rows, references)
        if not examples:
            notes.append(f"predictions.json: {name!r} has an unknown form; left out")
            continue
        judged = [e for e in examples if e.good is not None]
        found.append(
            Group(
                name,
                kind,
                len(examples),
                tuple([e for e in judged if e.good][:KEPT]),
                tuple([e for e in reversed(judged) if not e.good][:KEPT]),
                () if judged else tuple(examples[: 2 * KEPT]),
            )
        )
    return found, notes


def _examples(rows: Mapping[str, Any], references: Mapping[str, Sequence[str]]):
    """Return the examples of one evaluation, best first, and their kind."""
    values = list(rows.values())
    if not values:
        return [], ""
    if all(isinstance(v, str) for v in values):
        return _captions(rows, references), "captions"
    if not all(isinstance(v, dict) for v in values):
        return [], ""
    if all({"answer", "right"} <= set(v) for v in values):
        return [_answer(key, v) for key, v in rows.items()], "answers"
    if all({"chosen", "right"} <= set(v) for v in values):
        return [_choice(key, v) for key, v in rows.items()], "choices"
    if all({"rank", "retrieved"} <= set(v) for v in values):
        ordered = sorted(rows.items(), key=lambda row: row[1]["rank"])
        return [_retrieved(key, v) for key, v in ordered], "retrieved"
    return [], ""


def _captions(rows: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> list[Example]:
    known = [video for video in rows if references.get(video)]
    if not known:
        return [Example(video, (("caption", text),), None) for video, text in rows.items()]
    from stoa_jax.metrics import captions, ptb

    scored = []
    for video in known:
        said, *true = ptb.caption_words([rows[video], *references[video]])
        scored.append((captions.rouge_l([said], [true]), video))
    scored.sort(key=lambda pair: -pair[0])
    median = scored[len(scored) // 2][0]
    return [
        Example(
            video,
            (("caption", rows[video]), *(("reference", t) for t in references[video][:3])),
            score > median or score == 1,
            f"ROUGE-L {100 * score:.0f}",
        )
        for score, video in scored
    ]


def parts_of(key: str) -> tuple[str, str]:
    """Split a key `number: video: text` into (video, text); return other keys whole."""
    parts = key.split(": ", 2)
    return (parts[1], parts[2]) if len(parts) == 3 else (key, "")


def _answer(key: str, row: Mapping[str, Any]) -> Example:
    video, question = parts_of(key)
    good = row["answer"] == row["right"]
    said = [("question", question), ("answer", str(row["answer"]))]
    if not good:
        said.append(("right answer", str(row["right"])))
    return Example(video, tuple(said), good)


def _choice(key: str, row: Mapping[str, Any]) -> Example:
    good = row["chosen"] == row["right"]
    said = [("chosen option", _option(row, row["chosen"]))]
    if not good:
        said.append(("right option", _option(row, row["right"])))
    return Example(str(row.get("video") or f"choice {key}"), tuple(said), good)


def _option(row: Mapping[str, Any], which: Any) -> str:
    options = row.get("options")
    if isinstance(options, list) and isinstance(which, int) and 0 <= which < len(options):
        return str(options[which])
    return json.dumps(which)


def _retrieved(key: str, row: Mapping[str, Any]) -> Example:
    video, text = parts_of(key)
    first = ", ".join(map(str, row["retrieved"][:3]))
    said = (("query", text), ("retrieved first", first))
    return Example(video, said, row["rank"] == 1, f"rank {row['rank']}")
