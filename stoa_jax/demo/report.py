"""The demonstration's table and page, from what the runs left in their directories."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from stoa_jax.demo import explain, page

# (what, the model's metric, its baselines by name): how each figure stands beside the trivial.
LINES: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (
        "retrieval",
        "text to video R@1, dual encoder",
        "retrieval/t2v/R@1",
        {"chance": "retrieval/chance/t2v/R@1", "one frame": "retrieval/single_frame/t2v/R@1"},
    ),
    (
        "retrieval",
        "video to text R@1, dual encoder",
        "retrieval/v2t/R@1",
        {"chance": "retrieval/chance/v2t/R@1", "one frame": "retrieval/single_frame/v2t/R@1"},
    ),
    (
        "retrieval",
        "text to video R@1, re-ranked",
        "retrieval/reranked/t2v/R@1",
        {
            "chance": "retrieval/chance/t2v/R@1",
            "one frame": "retrieval/single_frame/reranked/t2v/R@1",
        },
    ),
    (
        "captioning",
        "CIDEr, greedy",
        "captioning/greedy/CIDEr",
        {
            "most frequent caption": "captioning/most_frequent/CIDEr",
            "text only": "captioning/text_only/greedy/CIDEr",
            "one frame": "captioning/single_frame/greedy/CIDEr",
        },
    ),
    (
        "captioning",
        "BLEU-4, greedy",
        "captioning/greedy/BLEU-4",
        {
            "most frequent caption": "captioning/most_frequent/BLEU-4",
            "text only": "captioning/text_only/greedy/BLEU-4",
            "one frame": "captioning/single_frame/greedy/BLEU-4",
        },
    ),
    (
        "qa",
        "question answering, accuracy",
        "qa/accuracy",
        {
            "majority answer": "qa/majority/accuracy",
            "text only": "qa/text_only/accuracy",
            "one frame": "qa/single_frame/accuracy",
        },
    ),
    (
        "multiple_choice",
        "multiple choice, accuracy",
        "multiple_choice/accuracy",
        {
            "chance": "multiple_choice/chance/accuracy",
            "text only": "multiple_choice/text_only/accuracy",
            "one frame": "multiple_choice/single_frame/accuracy",
        },
    ),
)
HEADER = ("figure (test split)", "n", "model", "trivial", "text only", "one frame")

Results = Mapping[str, Sequence[Mapping[str, Any]]]  # by task


def table(results: Results) -> list[tuple[str, ...]]:
    """Each figure beside its baselines; the trivial one names itself."""
    rows = []
    for task, what, metric, baselines in LINES:
        found = {row["metric"]: row for row in results[task]}

        digits = 3 if task == "captioning" else 1  # scores, or percent

        def number(name: str, found=found, digits=digits) -> str:
            value = found[name]["value"] if name in found else None
            return f"{value:.{digits}f}" if isinstance(value, int | float) else "–"

        trivial = next(name for name in baselines if name not in ("text only", "one frame"))
        rows.append(
            (
                what,
                str(found[metric]["n"]),
                number(metric),
                f"{number(baselines[trivial])} ({trivial})",
                number(baselines.get("text only", "")),
                number(baselines.get("one frame", "")),
            )
        )
    return rows


def markdown(results: Results) -> str:
    """The table for a terminal and a file."""
    rows = [HEADER, tuple("---" for _ in HEADER), *table(results)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(
    workdir: Path,
    configs: Mapping[str, ConfigDict],
    results: Results,
    seconds: Mapping[str, float],
    clips: int = 10,
) -> None:
    """`results.md` and `index.html` in the work directory."""
    (workdir / "results.md").write_text(markdown(results) + "\n")
    took = page.table(("part", "seconds"), [(k, f"{v:.0f}") for k, v in seconds.items()])
    losses = page.curves(training_curves(workdir / "pretrain"))
    sections = [
        ("Figures", page.table(HEADER, table(results))),
        (
            "Clips of the test split",
            "\n".join(map(page.clip_section, views(workdir, configs, clips))),
        ),
        ("Pre-training", f'<img alt="Losses by step" style="max-width:100%" src="{losses}">'),
        ("Time", took),
    ]
    lead = (
        "The tiny model, pre-trained and fine-tuned on a synthetic world on this machine. Boxes "
        "are the detector's, coloured by trajectory; each trajectory is shown with the noun it "
        "was matched to, each action token with its verb."
    )
    (workdir / "index.html").write_text(
        page.page("STOA-VLP in JAX: the demonstration", lead, sections)
    )


def training_curves(workdir: Path) -> dict[str, tuple[list[float], list[float]]]:
    """The losses and the retrieval accuracy in the batch, from `metrics.jsonl`."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = sorted({k for row in rows for k in row if k.startswith("loss_") or k == "batch_r1"})
    return {
        name: (
            [row["step"] for row in rows if name in row],
            [row[name] for row in rows if name in row],
        )
        for name in names
    }


def views(workdir: Path, configs: Mapping[str, ConfigDict], clips: int) -> list[page.ClipView]:
    """Test clips with what the model made of them, right and wrong ones as they come."""
    from stoa_jax import evaluate, sharding
    from stoa_jax.data import pipeline
    from stoa_jax.tasks import make_task
    from stoa_jax.text import Tokenizer

    c = configs["pretrain"]
    task = make_task(c)
    mesh = sharding.make_mesh(c)
    model, *_ = evaluate.load(c, (workdir / "pretrain").absolute(), task, mesh)
    dataset, split_name = c.data.sets[0][0], c.data.eval_split
    split = pipeline.open_split(c.data.dir, dataset, split_name)
    loader = pipeline.Loader(
        split, task.batch_spec(train=False), clips, train=False, max_examples=clips
    )
    batch = loader.batch(0)
    explanations = explain.explain(
        model, batch, split.class_names, Tokenizer(model.config.vocab_size)
    )
    said = {name: predictions(workdir / name) for name in ("captioning", "qa", "multiple_choice")}
    questions = by_video(said["qa"].get("qa", {}))
    captions = said["captioning"].get("captioning/greedy", {})
    out = []
    for b in range(int(batch["valid"].sum())):
        about = split.metadata(int(batch["index"][b]))
        facts: list[tuple[str, str, bool | None]] = [
            ("reference", about.texts[0], None),
            ("caption", captions.get(about.video_id, "–"), None),
        ]
        facts += [
            (
                question,
                f"{answer}" if answer == right else f"{answer} (it is {right})",
                answer == right,
            )
            for question, answer, right in questions.get(about.video_id, [])[:4]
        ]
        classes = batch["classes"][b]
        names = [match.name for match in explanations[b].trajectories]
        out.append(
            page.ClipView(
                title=about.video_id,
                pixels=batch["pixels"][b],
                boxes=batch["boxes"][b],
                classes=classes,
                trajectories=[split.class_names.index(name) for name in names],
                explanation=explanations[b],
                facts=facts,
            )
        )
    return out


def predictions(workdir: Path) -> dict[str, Any]:
    """What an evaluation said of each clip, by row name."""
    path = workdir / "predictions.json"
    return json.loads(path.read_text()) if path.exists() else {}


def by_video(rows: Mapping[str, Mapping[str, str]]) -> dict[str, list[tuple[str, str, str]]]:
    """(question, answer, right answer) of each video, from keys `number: video: question`."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for key, row in rows.items():
        _, video, question = key.split(": ", 2)
        found.setdefault(video, []).append((question, row["answer"], row["right"]))
    return found
