"""The full pipeline on built data sets: a small CLIP, pre-training, four fine-tunings, a page."""

import functools
import json
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from stoa_jax.data.sources import DATA_SETS
from stoa_jax.demo import page, tables
from stoa_jax.demo.commands import say, shipped_config
from stoa_jax.errors import UserError
from stoa_jax.files import write_text

SIZE, FRAMES, OBJECTS = 48, 4, 6  # the sizes that `tiny` reads
TRAIN_CLIPS = {"pictures": 12000, "captions": 6000}  # of the other sets, 3000
SETS = {
    d.name: {"train": TRAIN_CLIPS.get(d.configuration, 3000), "validation": 40, "test": 200}
    for d in DATA_SETS.values()
    if d.set == "synthetic"
}
FEWEST = 40  # smallest number of clips in a split
TASKS = ("retrieval", "captioning", "qa", "multiple_choice")
SHOWN = 10  # clips on the page


def run(
    workdir: Path, data_dir: Path, processes: int = 2, steps: float = 1.0, clips: float = 1.0
) -> None:
    """Build, train, evaluate and report; print each command that does the same by hand."""
    began = time.monotonic()
    seconds: dict[str, float] = {}

    def timed(name: str, work, *arguments):
        at = time.monotonic()
        work(*arguments)
        seconds[name] = time.monotonic() - at

    timed("build the data", build, data_dir, processes, clips)
    stages = ("clip", "pretrain", *TASKS)
    configs = {name: stage(name, workdir, data_dir, steps) for name in stages}
    for name, c in configs.items():
        timed(name, train, name, c, workdir)
        if name == "clip":
            timed("convert", convert, workdir / name, Path(configs["pretrain"].init.path))
    results = [row for name in TASKS for row in read(workdir / name / "results.json")]
    write_text(workdir / "results.md", tables.markdown(results) + "\n")
    write_text(workdir / "index.html", document(workdir, configs["pretrain"], results, seconds))
    print(tables.markdown(results))
    print(f"{(time.monotonic() - began) / 60:.1f} minutes; open {workdir / 'index.html'}")


def document(
    workdir: Path, c: ConfigDict, results: list[dict[str, Any]], seconds: dict[str, float]
) -> str:
    """Return the page: clips of the test split, the table, curves of pre-training, times."""
    from stoa_jax.data import pipeline

    split = pipeline.open_split(c.data.dir, c.data.sets[0][0], c.data.eval_split)
    predictions: dict[str, Any] = {}
    for name in TASKS:
        predictions |= read(workdir / name / "predictions.json")
    lines = (workdir / "pretrain" / "metrics.jsonl").read_text().splitlines()
    return page.full_document(
        results,
        page.cards(workdir / "pretrain", split, predictions, SHOWN),
        [*map(json.loads, lines)],
        seconds,
    )


def read(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def build(data_dir: Path, processes: int, clips: float) -> None:
    """Build the synthetic sets that do not exist yet."""
    from stoa_jax.data import builders
    from stoa_jax.data.build import run as builder

    for dataset, whole in SETS.items():
        counts = {split: min(n, max(FEWEST, round(n * clips))) for split, n in whole.items()}
        sizes = " ".join(f"{split}={n}" for split, n in counts.items())
        say(f"python -m stoa_jax.data.build {dataset} --data-dir={data_dir} …  # {sizes}")
        builder.build(
            dataset,
            data_dir,
            options={"size": SIZE, "siblings": 1, "max_objects": 3, **counts},
            settings=builders.Settings(
                # A picture is one frame, and no token is matched to its words.
                frames=1 if dataset == "synthetic/pictures" else FRAMES,
                objects=OBJECTS,
                short_side=SIZE,
                tagger="none" if dataset == "synthetic/pictures" else "default",
            ),
            run=functools.partial(builder.encode_parts, processes=processes, progress=True),
        )


def stage(name: str, workdir: Path, data_dir: Path, steps: float) -> ConfigDict:
    """Return the shipped configuration of a task on the synthetic world, from this checkout."""
    c = shipped_config(name)
    c.data.dir = str(data_dir)
    c.train.steps = max(2, round(c.train.steps * steps))
    if name == "pretrain":
        c.init.path = str(workdir / "clip-hf")
    elif name in TASKS:
        c.init.path = str(workdir / "pretrain")
        blind = () if name == "retrieval" else ("text_only",)  # no clips, no ranks
        c.eval.variants = ("single_frame", *blind)
    return c


def train(name: str, c: ConfigDict, workdir: Path) -> None:
    """Run one training; evaluate a task on the test split afterwards."""
    from stoa_jax import evaluate, train
    from stoa_jax.tasks import make_task

    start = f" --config.init.path={c.init.path}" if c.init.path else ""
    command = (
        f"python -m stoa_jax.main --config=configs/{name}.py:synthetic --workdir={workdir / name} "
        f"--config.data.dir={c.data.dir}{start}"
    )
    say(command)
    task = make_task(c)
    if train.train(c, workdir / name, task=task)["stopped"]:
        raise UserError("stopped; run the same command again to continue")
    if name in TASKS:
        say(f"{command} --mode=eval")
        evaluate.run(c, workdir / name, task=task, verbose=False)


def convert(workdir: Path, out: Path) -> None:
    """Convert the small CLIP to Hugging Face's names, like a downloaded one."""
    from stoa_jax import convert

    say(f"python -m stoa_jax.convert {workdir} {out} --to=hugging_face")
    if not out.exists():
        convert.convert(workdir, out, to="hugging_face")
