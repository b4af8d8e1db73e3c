"""The demonstration's table: each metric beside its trivial and ablated baselines."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Line(NamedTuple):
    """A row of the table: its label, the model's metric, and its baselines by name."""

    label: str
    metric: str
    trivial: tuple[str, str] | None = None  # name, metric
    text_only: str = ""
    one_frame: str = ""
    digits: int = 1


LINES = (
    Line(
        "text to video R@1, dual encoder",
        "retrieval/t2v/R@1",
        ("chance", "retrieval/chance/t2v/R@1"),
        one_frame="retrieval/single_frame/t2v/R@1",
    ),
    Line(
        "text to video R@1, re-ranked",
        "retrieval/reranked/t2v/R@1",
        ("chance", "retrieval/chance/t2v/R@1"),
        one_frame="retrieval/single_frame/reranked/t2v/R@1",
    ),
    Line(
        "CIDEr, greedy",
        "captioning/greedy/CIDEr",
        ("most frequent caption", "captioning/most_frequent/CIDEr"),
        "captioning/text_only/greedy/CIDEr",
        "captioning/single_frame/greedy/CIDEr",
        digits=3,
    ),
    Line(
        "BLEU-4, greedy",
        "captioning/greedy/BLEU-4",
        ("most frequent caption", "captioning/most_frequent/BLEU-4"),
        "captioning/text_only/greedy/BLEU-4",
        "captioning/single_frame/greedy/BLEU-4",
        digits=3,
    ),
    Line(
        "question answering, accuracy",
        "qa/accuracy",
        ("majority answer", "qa/majority/accuracy"),
        "qa/text_only/accuracy",
        "qa/single_frame/accuracy",
    ),
    Line(
        "… “which way does …”",
        "qa/kind/way/accuracy",
        text_only="qa/text_only/kind/way/accuracy",
        one_frame="qa/single_frame/kind/way/accuracy",
    ),
    Line(
        "… “what does … do”",
        "qa/kind/does/accuracy",
        text_only="qa/text_only/kind/does/accuracy",
        one_frame="qa/single_frame/kind/does/accuracy",
    ),
    Line(
        "multiple choice, accuracy",
        "multiple_choice/accuracy",
        ("chance", "multiple_choice/chance/accuracy"),
        "multiple_choice/text_only/accuracy",
        "multiple_choice/single_frame/accuracy",
    ),
)
HEADER = ("metric (test split)", "n", "model", "trivial", "text only", "one frame")


def rows(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the table rows that the results cover, with a dash for a missing number."""
    found = {row["metric"]: row for row in results}
    table = []
    for line in LINES:
        if line.metric not in found:
            continue

        def number(name: str, digits: int = line.digits) -> str:
            value = found[name]["value"] if name in found else None
            return f"{value:.{digits}f}" if isinstance(value, int | float) else "–"

        trivial = "–"
        if line.trivial is not None:
            trivial = f"{number(line.trivial[1])} ({line.trivial[0]})"
        table.append(
            (
                line.label,
                str(found[line.metric]["n"]),
                number(line.metric),
                trivial,
                number(line.text_only),
                number(line.one_frame),
            )
        )
    return table


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Format the table for a terminal and a file."""
    lines = [HEADER, tuple("---" for _ in HEADER), *rows(results)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
