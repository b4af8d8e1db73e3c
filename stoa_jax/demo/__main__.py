"""From nothing to a trained and evaluated model, a table and a page.

    python -m stoa_jax.demo [--workdir=runs/demo] [--data-dir=DIR] [--steps=1.0] [--clips=1.0]

Builds the synthetic sets, trains a small CLIP, starts `tiny` from it and pre-trains it with all
six losses, fine-tunes and evaluates retrieval, captioning, question answering and multiple choice,
and writes `results.md` and `index.html` in the work directory. A run that was stopped goes on
where it was.
"""

import argparse
import functools
import importlib.util
import json
import sys
import time
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

from stoa_jax.demo import report
from stoa_jax.errors import UserError

ROOT = Path(__file__).parents[2]
SIZE, FRAMES, OBJECTS = 48, 4, 6  # what `tiny` reads: nothing is stored that it does not see
SETS = {
    "synthetic/pictures": {"train": 12000, "validation": 40, "test": 200},
    "synthetic/captions": {"train": 6000, "validation": 40, "test": 200},
    "synthetic/qa": {"train": 3000, "validation": 40, "test": 200},
    "synthetic/multiple_choice": {"train": 3000, "validation": 40, "test": 200},
}
FEWEST = 40  # clips of a split, however short the try
TASKS = ("retrieval", "captioning", "qa", "multiple_choice")


def main() -> None:
    """Build, train, evaluate, report."""
    parser = argparse.ArgumentParser(
        prog="python -m stoa_jax.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--data-dir", type=Path, help="default: WORKDIR/data")
    parser.add_argument("--processes", type=int, default=2, help="that build the data sets")
    parser.add_argument(
        "--steps", type=float, default=1.0, help="scales the length of all training; 0.01 for a try"
    )
    parser.add_argument(
        "--clips", type=float, default=1.0, help="scales the data sets; 0.01 for a try"
    )
    arguments = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    try:
        run(
            arguments.workdir,
            arguments.data_dir or arguments.workdir / "data",
            arguments.processes,
            arguments.steps,
            arguments.clips,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(
    workdir: Path, data_dir: Path, processes: int = 2, steps: float = 1.0, clips: float = 1.0
) -> None:
    """The whole demonstration; prints each command that does the same by hand."""
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
    results = {name: json.loads((workdir / name / "results.json").read_text()) for name in TASKS}
    timed("the page", report.write, workdir, configs, results, seconds)
    print(report.markdown(results))
    print(f"{(time.monotonic() - began) / 60:.1f} minutes; look at {workdir / 'index.html'}")


def build(data_dir: Path, processes: int, clips: float) -> None:
    """The synthetic sets, where they are not there yet."""
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
                # A picture is one frame, and nothing is matched to its words.
                frames=1 if dataset == "synthetic/pictures" else FRAMES,
                objects=OBJECTS,
                short_side=SIZE,
                tagger="none" if dataset == "synthetic/pictures" else "default",
            ),
            run=functools.partial(builder.encode_parts, processes=processes, progress=True),
        )


def stage(name: str, workdir: Path, data_dir: Path, steps: float) -> ConfigDict:
    """The shipped configuration of a task on the synthetic world, from this checkout."""
    path = ROOT / "configs" / f"{name}.py"
    if not path.exists():
        raise UserError(f"{path} is missing; run the demo from a checkout of the project")
    spec = importlib.util.spec_from_file_location(f"demo_config_{name}", path)
    assert spec is not None and spec.loader is not None  # the file exists
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config("synthetic")
    c.data.dir = str(data_dir)
    c.train.steps = max(2, round(c.train.steps * steps))
    c.data.eval_split = "test"
    c.eval.every_steps = -1  # evaluated once, from the checkpoint
    c.log.tensorboard = False
    if name == "pretrain":
        c.init.path = str(workdir / "clip-hf")
    elif name in TASKS:
        c.init.path = str(workdir / "pretrain")
        c.eval.beam = 1
        blind = () if name == "retrieval" else ("text_only",)  # nothing to rank without clips
        c.eval.variants = ("single_frame", *blind)
    return c


def train(name: str, c: ConfigDict, workdir: Path) -> None:
    """One run of the loop; a task is then evaluated on the test split."""
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
        raise UserError("stopped; run the same command again to go on")
    if name in TASKS:
        say(f"{command} --mode=eval")
        evaluate.run(c, workdir / name, task=task, verbose=False)


def convert(workdir: Path, out: Path) -> None:
    """The small CLIP in Hugging Face's names: what a downloaded one would be."""
    from stoa_jax import convert

    say(f"python -m stoa_jax.convert {workdir} {out} --to=hugging_face")
    if not out.exists():
        convert.convert(workdir, out, to="hugging_face")


def say(command: str) -> None:
    """A command that does by hand what comes next."""
    print(f"\n$ {command}", flush=True)


if __name__ == "__main__":
    main()
