"""The paper's Table 4 and Figure 3 from the runs of a sweep: Markdown, plots and a page.

The name of a run is `part | row | task:set | seed=…`, as in `configs/paper_tables.py`.
"""

import html
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Metrics of each task that the paper's tables show, by the evaluators' names.
SHOWN = {
    "captioning": ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr"),
    "qa": ("qa/accuracy",),
    # Trajectories and actions affect the dual encoder only through training; fusion reads them, so
    # the re-ranked metrics show what they add to a pair.
    "retrieval": (
        "retrieval/t2v/R@1",
        "retrieval/reranked/t2v/R@1",
        "retrieval/reranked/t2v/R@5",
        "retrieval/reranked/t2v/R@10",
    ),
}
# Metrics of the task `joint`, with short names.
JOINT = {
    "qa/accuracy": "questions",
    "qa/kind/way/accuracy": "which way",
    "qa/kind/does/accuracy": "what does it do",
    "qa/kind/what/accuracy": "what does it",
    "qa/kind/colour/accuracy": "color of what does it",
    "qa/kind/looks/accuracy": "color of a thing",
    "qa/kind/order/accuracy": "order",
    "qa/kind/many/accuracy": "how many",
    "multiple_choice/accuracy": "choice of five",
    "retrieval/t2v/R@1": "R@1, dual encoder",
    "captioning/greedy/CIDEr": "CIDEr",
    "captioning/verb_nll": "NLL of verbs",
}
# Rows of `joint` in the order of the table; the others are compared with the first.
JOINT_ROWS = (
    "base",
    "+ objects",
    "+ OTA",
    "+ actions",
    "full",
    "full, text frozen",
    "full, alignment stage",
    "full, targets of plus",
    "full, targets of plus, alignment stage",
    "plus, no motion stage",
    "plus, no adjectives",
    "plus",
)
PLOTTED = ("questions", "which way", "what does it do")  # of `JOINT`, in the curves
TITLES = {"table4": "Table 4", "joint": "Rows of one joint training"}
CURVES = {
    "trajectories": "N, trajectory tokens",
    "actions": "A, action tokens",
}
# 97.5 % points of Student's t by degrees of freedom; 1.96 beyond.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}


class Value(NamedTuple):
    """The mean of a metric over seeds, with its 95 % interval."""

    mean: float
    half: float  # half the width of the interval; NaN if it is not known
    values: Mapping[str, float]  # by seed
    questions: int = 0  # that one seed's interval is about, an accuracy's binomial one; 0: none

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f"{self.mean:.3g} (one seed)"
        mean = round(self.mean, 9) + 0.0  # differences that cancel are 0, not 2e-15
        return f"{mean:.3g} ± {self.half:.2g}"


def mean_value(values: Mapping[str, float], questions: int = 0) -> Value:
    """Compute the mean and 95 % interval over seeds, by Student's t.

    The interval of one seed is the binomial one of an accuracy in percent over so many `questions`.
    """
    n, mean = len(values), statistics.fmean(values.values())
    if n < 2:
        p = mean / 100
        half = 196 * math.sqrt(p * (1 - p) / questions) if questions else math.nan
        return Value(mean, half, values, questions)
    half = STUDENT.get(n - 1, 1.96) * statistics.stdev(values.values()) / math.sqrt(n)
    return Value(mean, half, values)


def gather(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Value]]]:
    """Group finished runs: part -> row -> `task:set metric` -> value over seeds."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    questions: dict[str, int] = {}
    for row in rows:
        part, name, task, seed = row["name"].split(" | ")
        cells = found.setdefault(part, {}).setdefault(name, {})
        values = chosen(task.split(":")[0], row["result"])
        is_joint = task.startswith("joint:")
        if is_joint:
            questions = questions or asked(row.get("workdir"))
            values = {JOINT[metric]: value for metric, value in values.items()}
        for metric, value in values.items():
            cells.setdefault(metric if is_joint else f"{task} {metric}", {})[seed] = value
    return {
        part: {
            name: {
                metric: mean_value(values, questions.get(metric, 0))
                for metric, values in cells.items()
            }
            for name, cells in names.items()
        }
        for part, names in found.items()
    }


def asked(workdir: str | Path | None) -> dict[str, int]:
    """Count the questions behind each accuracy of a run of the task `joint` on the live world."""
    path = Path(workdir or "") / "config.json"
    if workdir is None or not path.is_file():
        return {}
    c = json.loads(path.read_text())
    if not c["data"]["live"]:
        return {}
    from stoa_jax.data.synthetic import live, reading

    split, m = c["data"]["eval_split"], c["model"]
    sizes = c["data"]["world"], m["frames"], m["objects_per_frame"]
    qa = live.open_split("synthetic/qa", split, *sizes)
    kinds = Counter(
        reading.question_kind(text) for i in range(len(qa)) for text in qa.metadata(i).texts
    )
    counts = {JOINT[f"qa/kind/{k}/accuracy"]: n for k, n in kinds.items() if k != "other"}
    return {
        **counts,
        JOINT["qa/accuracy"]: kinds.total(),
        JOINT["multiple_choice/accuracy"]: len(qa),  # one of each clip
    }


def chosen(task: str, result: Mapping[str, float]) -> dict[str, float]:
    """Select the metrics of a run that the paper shows."""
    values = {key.removeprefix("eval/").removeprefix("partial/"): v for key, v in result.items()}
    if task == "joint":
        return {key: values[key] for key in JOINT if key in values}
    if task != "captioning":
        return {key.split("/", 1)[1]: values[key] for key in SHOWN[task] if key in values}
    # Beam search if it was run, else greedy.
    ways = sorted({key.split("/")[1] for key in values if key.count("/") == 2})
    way = next((way for way in ways if way.startswith("beam")), "greedy")
    keys = {metric: f"captioning/{way}/{metric}" for metric in SHOWN[task]}
    return {metric: values[key] for metric, key in keys.items() if key in values}


def markdown(found: Mapping[str, Mapping[str, Mapping[str, Value]]]) -> str:
    """Format every part as a table."""
    lines = ["# Tables", "", "Mean over seeds and 95 % interval (Student's t)."]
    if any(v.questions for n in found.values() for cells in n.values() for v in cells.values()):
        lines.append("With one seed, the binomial interval of the questions that were asked.")
    lines.append("")
    for part, names in found.items():
        if part == "joint":  # what matters most is trained first
            names = dict(sorted(names.items(), key=lambda item: _place(item[0])))
        title = TITLES[part] if part in TITLES else f"Figure 3: {CURVES[part]}"
        metrics = list(dict.fromkeys(metric for cells in names.values() for metric in cells))
        lines += [f"## {title}", "", "| model | " + " | ".join(metrics) + " | seeds |"]
        lines += ["|---" * (len(metrics) + 2) + "|"]
        for name, cells in names.items():
            texts = [str(cells[m]) if m in cells else "" for m in metrics]
            seeds = max((cell.n for cell in cells.values()), default=0)
            lines.append("| " + " | ".join([name, *texts, str(seeds)]) + " |")
        lines.append("")
        if part == "table4":
            lines += [*verdicts(names), ""]
        if len(names) > 1:
            lines += [*paired(names), ""]
    return "\n".join(lines)


def _place(row: str) -> int:
    return JOINT_ROWS.index(row) if row in JOINT_ROWS else len(JOINT_ROWS)


def verdicts(names: Mapping[str, Mapping[str, Value]]) -> list[str]:
    """Say for each metric whether the full model is above the base beyond the intervals."""
    lines = []
    order = list(names)
    base, full = names[order[0]], names[order[-1]]
    for metric in base:
        if metric not in full:
            continue
        a, b = base[metric], full[metric]
        if a.n < 2 or b.n < 2:
            said = "one seed has no interval"
        elif b.mean - b.half > a.mean + a.half:
            said = "above, beyond the intervals"
        elif b.mean + b.half < a.mean - a.half:
            said = "below, beyond the intervals"
        else:
            said = "no difference beyond the intervals"
        lines.append(f"- {metric}: {order[-1]} {b} against {order[0]} {a}: {said}.")
    return lines


def paired(names: Mapping[str, Mapping[str, Value]]) -> list[str]:
    """Format each model's difference from the first one, seed by seed.

    Runs of one seed start from the same weights and see the same clips, so the variation between
    seeds cancels.
    """
    base, *others = names
    metrics = list(names[base])
    lines = [
        f"Difference from {base}, seed by seed:",
        "",
        "| model | " + " | ".join(metrics) + " |",
    ]
    lines += ["|---" * (len(metrics) + 1) + "|"]
    for name in others:
        texts = []
        for metric in metrics:
            ours = names[name][metric].values if metric in names[name] else {}
            theirs = names[base][metric].values
            differences = {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}
            texts.append(str(mean_value(differences)) if differences else "")
        lines.append("| " + " | ".join([name, *texts]) + " |")
    return lines


def plot(part: str, names: Mapping[str, Mapping[str, Value]], path: Path) -> None:
    """Plot one curve for each metric, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    metrics = list(dict.fromkeys(metric for cells in names.values() for metric in cells))
    if set(metrics) & set(JOINT.values()):
        metrics = [metric for metric in PLOTTED if metric in metrics]
    for metric in metrics:
        points = [(float(name), cells[metric]) for name, cells in names.items() if metric in cells]
        points.sort(key=lambda point: point[0])
        x = [at for at, _ in points]
        means = [point.mean for _, point in points]
        halves = [0 if math.isnan(point.half) else point.half for _, point in points]
        label = metric if metric in PLOTTED else metric.split(" ", 1)[-1]
        axes.errorbar(x, means, yerr=halves, marker="o", markersize=4, capsize=3, label=label)
    axes.set_xlabel(CURVES[part])
    axes.set_ylabel("percent")
    axes.set_xticks(sorted({float(name) for name in names}))
    axes.grid(alpha=0.3)
    fig.legend(loc="outside upper center", ncols=2)
    fig.savefig(path, dpi=150)
    pyplot.close(fig)


def write(rows: Sequence[Mapping[str, Any]], workdir: str | Path) -> str:
    """Write `tables.md`, the plots and `index.html`; return the Markdown."""
    workdir = Path(workdir)
    done = [row for row in rows if row["done"]]
    found = gather(done)
    text = markdown(found)
    if len(done) < len(rows):
        text += f"\n{len(done)} of {len(rows)} runs are done.\n"
    (workdir / "tables.md").write_text(text, encoding="utf-8")
    pictures = []
    for part in CURVES:
        if found.get(part):
            picture = workdir / f"{part}.png"
            plot(part, found[part], picture)
            pictures.append(picture.name)
    (workdir / "index.html").write_text(page(text, pictures), encoding="utf-8")
    return text


def page(text: str, pictures: Sequence[str]) -> str:
    """Format the Markdown's tables and the plots as an HTML page."""
    body: list[str] = []
    rows: list[list[str]] = []

    def flush() -> None:
        if rows:
            head, *rest = rows
            cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
            body.append(f"<table><tr>{cells}</tr>")
            for row in rest:
                cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
                body.append(f"<tr>{cells}</tr>")
            body.append("</table>")
            rows.clear()

    for line in text.splitlines():
        if line.startswith("|---"):
            continue
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        flush()
        if line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            body.append(f"<h{level}>{html.escape(line.lstrip('# '))}</h{level}>")
        elif line:
            body.append(f"<p>{html.escape(line)}</p>")
    flush()
    body += [f'<img src="{html.escape(name)}" alt="{html.escape(name)}">' for name in pictures]
    style = (
        "body{font:15px/1.5 system-ui;margin:2em auto;max-width:70em;padding:0 1em}"
        "table{border-collapse:collapse;display:block;overflow-x:auto}"
        "td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left}img{max-width:100%}"
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Tables</title>'
        f"<style>{style}</style><body>{''.join(body)}</body></html>\n"
    )
