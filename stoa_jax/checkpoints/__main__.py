"""Pack a training of the task `joint` as the checkpoint that ships.

    python -m stoa_jax.checkpoints WORKDIR OUT [--how=TEXT_FILE]

Writes `model.safetensors` (float16), `config.json`, `answers.json`, the training curve, and a card,
`README.md`, with the metrics of WORKDIR's `results.json`.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stoa_jax import convert, weights
from stoa_jax.checkpoint import load_params
from stoa_jax.errors import UserError
from stoa_jax.files import write_json
from stoa_jax.inference import sidecars

MAX_BYTES = 12 * 2**20
CURVE, POINTS = "curve.json", 100  # the training curve that the demonstration draws

# Metrics on the card, in order: name in results.json, label.
SHOWN = (
    ("qa/accuracy", "question answering, %"),
    ("qa/kind/way/accuracy", "… “which way does … move”, %"),
    ("qa/kind/does/accuracy", "… “what does … do”, %"),
    ("qa/kind/what/accuracy", "… what does something, %"),
    ("qa/kind/colour/accuracy", "… the color of what does something, %"),
    ("qa/kind/order/accuracy", "… which comes first or last, %"),
    ("qa/kind/many/accuracy", "… “how many”, %"),
    ("qa/kind/looks/accuracy", "… the color of a thing, %"),
    ("qa/majority/accuracy", "… always the most frequent answer, %"),
    ("multiple_choice/accuracy", "multiple choice of 5, %"),
    ("multiple_choice/dual_encoder/accuracy", "… by the dual encoder, %"),
    ("captioning/greedy/CIDEr", "captioning, greedy, CIDEr"),
    ("captioning/most_frequent/CIDEr", "… always the most frequent caption, CIDEr"),
    ("retrieval/t2v/R@1", "text to video, dual encoder, R@1"),
    ("retrieval/reranked/t2v/R@1", "text to video, re-ranked, R@1"),
)


def pack(workdir: Path, out: Path, how: str = "") -> None:
    """Write the checkpoint directory `out`, which must not exist."""
    if out.exists():
        raise UserError(f"{out}: already exists; name a new directory")
    _, _, meta = load_params(workdir)
    answers = meta.get("extras", {}).get("answers")
    if not answers:
        raise UserError(f"{workdir}: its checkpoint lists no answers; train the task `joint`")
    out.mkdir(parents=True)
    convert.convert(workdir, out / "model.safetensors", "safetensors", dtype="float16")
    # The card says how it was trained; the run's settings name files of this machine.
    (out / sidecars.RUN).unlink(missing_ok=True)
    size = (out / "model.safetensors").stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{out}: {size / 2**20:.1f} MiB; at most {MAX_BYTES >> 20} ship")
    c, _ = weights.config_of(out / "model.safetensors")
    write_json(out / "config.json", {"model": dataclasses.asdict(c), "step": meta.get("step")})
    write_json(out / "answers.json", list(answers))
    if (calibration := sidecars.read(workdir, sidecars.CALIBRATION)) is not None:
        write_json(out / sidecars.CALIBRATION, {**calibration, "checkpoint": out.name})
    if curve := training_curve(workdir):
        write_json(out / CURVE, curve)
    results = workdir / "results.json"
    rows = json.loads(results.read_text()) if results.exists() else []
    (out / "README.md").write_text(card(rows, how, size), encoding="utf-8")


def training_curve(workdir: Path) -> dict[str, list[float]]:
    """Return accuracy on training questions, in percent, by step over all stages of a training.

    A stage follows the work directory that its `init.path` names. There are at most `POINTS`
    points, each the mean of its range of steps; none if no stage logged an accuracy.
    """
    stages: list[list[tuple[float, float]]] = []
    folder: Path | None = workdir
    while folder is not None and (folder / "metrics.jsonl").is_file():
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        stages.insert(0, [(r["step"], 100 * r["accuracy"]) for r in rows if "accuracy" in r])
        settings = folder / "config.json"
        before = json.loads(settings.read_text())["init"]["path"] if settings.is_file() else ""
        folder = Path(before) if before else None
    points, passed = [], 0.0
    for stage in stages:
        points += [(passed + step, value) for step, value in stage]
        passed = points[-1][0] if stage else passed
    if not points:
        return {}
    parts = np.array_split(np.array(points), min(POINTS, len(points)))
    steps, values = zip(*(part.mean(0).round(2).tolist() for part in parts), strict=True)
    return {"steps": list(steps), "values": list(values)}


def card(rows: Sequence[dict[str, Any]], how: str, size: int) -> str:
    """Return the model card."""
    found = {row["metric"]: row for row in rows}
    lines = [
        '# `stoa_jax.load("synthetic")`',
        "",
        f"A small STOA-VLP of the synthetic world with all heads ({size / 2**20:.1f} MiB).",
        "It knows coloured shapes and fifteen motions, and nothing of real videos.",
        "",
        "| metric | value | of |",
        "|---|---|---|",
    ]
    for name, label in SHOWN:
        if row := found.get(name):
            lines.append(
                f"| {label} | {row['value']:.{2 if 'CIDEr' in name else 1}f} | {row['n']} |"
            )
    split = next(iter(rows), {}).get("split", "")
    note = f"Split `{split}`; every row's protocol is printed by `--mode=eval`." if split else ""
    return "\n".join([*lines, "", note, "", how.strip(), ""])


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stoa_jax.checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--how", type=Path, help="file with a text for the card: how it was trained"
    )
    args = parser.parse_args()
    try:
        pack(args.workdir, args.out, args.how.read_text() if args.how else "")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
