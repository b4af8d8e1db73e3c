"""Run several trainings from one configuration file and collect their metrics in one table.

    python -m stoa_jax.sweep --config=configs/paper_tables.py --workdir=runs/tables --parallel=2
    python -m stoa_jax.sweep --config=… --workdir=… --slurm   # writes arrays, submits nothing

The file's `sweep()` (or `sweep(argument)`, for FILE.py:argument) returns a list of runs. A run is

    {"optim.weight_decay": 0.1}                       # overrides of this file's configuration
    {"name": "no actions", "stages": [                # or stages, one after the other
        {"name": "pretrain", "config": "configs/pretrain.py:synthetic",
         "overrides": {"model.actions": False}},
        {"name": "retrieval", "config": "configs/retrieval.py:synthetic",
         "overrides": {"model.actions": False, "init.path": "{pretrain}", "seed": 1}}]}

`{pretrain}` stands for the work directory of the stage of that name, and `{cache}` for a directory
that all stages share, for `data.live_dir`. A stage may also convert the
weights of an earlier one: {"name": "hf", "convert": "{pretrain}", "to": "hugging_face"}. Stages
that several runs share are run once. Running the command again continues where it stopped.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stoa_jax.errors import UserError

SHOWN = r"^(eval/|loss$)"  # metrics of a result that the table shows
CACHE = "cache"  # the directory of files that all stages share, in the sweep's directory


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command: a run of `stoa_jax.main` or of `stoa_jax.convert`."""

    name: str
    config: str
    overrides: tuple[tuple[str, Any], ...]
    workdir: Path
    after: Path | None  # the work directory of the stage before it
    convert: tuple[str, str] | None = None  # (weights, format), in place of a config

    @property
    def command(self) -> list[str]:
        """The command line, as a user would write it."""
        if self.convert:
            source, to = self.convert
            return [
                *(sys.executable, "-m", "stoa_jax.convert", source, str(self.workdir)),
                f"--to={to}",
            ]
        return [
            *(sys.executable, "-m", "stoa_jax.main"),
            f"--config={self.config}",
            f"--workdir={self.workdir}",
            *(f"--config.{key}={value}" for key, value in self.overrides),
        ]

    @property
    def done(self) -> bool:
        """Whether the stage has finished."""
        if self.convert:  # its directory appears when it is complete
            return self.workdir.exists()
        return (self.workdir / "result.json").exists()


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of the table: stages that run one after the other."""

    name: str
    stages: tuple[Stage, ...]
    settings: tuple[tuple[str, Any], ...]  # the overrides of all stages


def load(config: str) -> list[Mapping[str, Any]]:
    """Call the file's `sweep()` and return its description of the runs."""
    path, _, argument = config.partition(":")
    module = load_module(path)
    if not hasattr(module, "sweep"):
        raise UserError(f"--config: {path} defines no sweep(); write one that returns overrides")
    wants = inspect.signature(module.sweep).parameters
    return list(module.sweep(*([argument] if argument and wants else [])))


def load_module(path: str | Path) -> Any:
    """Import a configuration file as a module."""
    if not Path(path).is_file():
        raise UserError(f"--config={path}: no such file")
    spec = importlib.util.spec_from_file_location("sweep_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_runs(config: str, described: Sequence[Mapping[str, Any]], root: Path) -> list[Run]:
    """Derive names, commands and work directories of all runs."""
    runs = []
    for number, one in enumerate(described):
        stages = one.get("stages", [{"overrides": one}])
        made: dict[str, Stage] = {}
        settings: dict[str, Any] = {}
        for index, stage in enumerate(stages):
            name = stage.get("name", f"stage{index}" if len(stages) > 1 else "run")
            if name in made:
                raise UserError(f"sweep(): run {number} has two stages named {name!r}")
            if name == CACHE:
                raise UserError(f"sweep(): run {number} has a stage named {name!r}; rename it")
            before = {n: str(s.workdir) for n, s in made.items()} | {CACHE: str(root / CACHE)}
            given = dict(stage.get("overrides", {}))
            overrides = tuple(
                (key, _filled(value, before, number)) for key, value in sorted(given.items())
            )
            of, conversion = stage.get("config", config), None
            if "convert" in stage:
                if "to" not in stage:
                    raise UserError(f"sweep(): stage {name!r} of run {number} wants a format, 'to'")
                conversion = _filled(stage["convert"], before, number), stage["to"]
            # The cache changes no result, so it is not part of the stage's identity.
            cached = {key for key, value in given.items() if value == f"{{{CACHE}}}"}
            what = conversion or (of, tuple(o for o in overrides if o[0] not in cached))
            digest = hashlib.sha256(repr(what).encode()).hexdigest()[:10]
            folder = root / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}-{digest}"
            last = list(made.values())[-1].workdir if made else None
            made[name] = Stage(name, of, overrides, folder, last, conversion)
            settings |= {k: v for k, v in given.items() if not _refers(v)}
        name = one.get("name") if "stages" in one else None
        spelled = ", ".join(f"{k}={v}" for k, v in settings.items()) or f"run {number}"
        runs.append(Run(name or spelled, tuple(made.values()), tuple(settings.items())))
    return runs


def _refers(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"\{[^{}]+\}", value))


def _filled(value: Any, before: Mapping[str, str], number: int) -> Any:
    if not _refers(value):
        return value
    if value[1:-1] not in before:
        raise UserError(
            f"sweep(): run {number} refers to stage {value}; before it there is "
            f"{', '.join(name for name in before if name != CACHE) or 'none'}"
        )
    return before[value[1:-1]]


def unique_stages(runs: Sequence[Run]) -> list[Stage]:
    """List every stage once, after the stage that it needs."""
    found: dict[Path, Stage] = {}
    for run in runs:
        for stage in run.stages:
            found.setdefault(stage.workdir, stage)
    return list(found.values())


def execute(
    stages: Sequence[Stage], parallel: int, say: Callable[[str], None] = print
) -> dict[Path, int]:
    """Run stages on this machine, `parallel` at a time; return exit codes by work directory."""
    codes = {stage.workdir: 0 for stage in stages if stage.done}
    waiting = [stage for stage in stages if not stage.done]
    say(f"{len(codes)} of {len(stages)} stages are done")
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        running: dict[concurrent.futures.Future, Stage] = {}
        while waiting or running:
            for stage in list(waiting):
                before = 0 if stage.after is None else codes.get(stage.after)
                if before is None or (before == 0 and len(running) >= parallel):
                    continue
                waiting.remove(stage)
                if before:
                    codes[stage.workdir] = before
                    say(f"{stage.workdir.name}: left out, the stage before it failed")
                else:
                    running[pool.submit(run_stage, stage)] = stage
                    say(f"{stage.workdir.name}: {shlex.join(stage.command)}")
            if not running:
                continue
            ended, _ = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in ended:
                stage = running.pop(future)
                code = codes[stage.workdir] = future.result()
                how = f"exit {code}, see {log_of(stage)}" if code else "done"
                at = sum(not code for code in codes.values())
                say(f"{stage.workdir.name}: {how} ({at} of {len(stages)} done)")
    return codes


def log_of(stage: Stage) -> Path:
    """Return the log file of a stage, beside its work directory."""
    return stage.workdir.with_name(stage.workdir.name + ".log")


def run_stage(stage: Stage) -> int:
    """Run a stage in a process and return its exit code.

    Stages share compiled programs through JAX's persistent cache, unless the user set its place.
    """
    root = stage.workdir.parent
    root.mkdir(parents=True, exist_ok=True)
    environment = {"JAX_COMPILATION_CACHE_DIR": str(root / CACHE / "programs"), **os.environ}
    with open(log_of(stage), "a") as log:
        run = subprocess.run(stage.command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        code = run.returncode
    # A run that was asked to stop exits with 0 although it is unfinished.
    return code or (0 if stage.done else 1)


def write_slurm(stages: Sequence[Stage], config: str, root: Path) -> list[Path]:
    """Write a job array for each depth of stages, and the script that submits them in order."""
    root.mkdir(parents=True, exist_ok=True)
    depth: dict[Path | None, int] = {None: -1}
    for stage in stages:
        depth[stage.workdir] = depth[stage.after] + 1
    files, submit = [], ["#!/bin/sh", "set -eu", "after="]
    for level in range(max(depth.values()) + 1):
        numbers = [str(i) for i, s in enumerate(stages) if depth[s.workdir] == level]
        path = root / f"sweep-{level}.sbatch"
        command = shlex.join(
            [
                *(sys.executable, "-m", "stoa_jax.sweep", f"--config={config}"),
                f"--workdir={root}",
            ]
        )
        path.write_text(
            f"#!/bin/sh\n#SBATCH --job-name=stoa-sweep-{level}\n"
            f"#SBATCH --array={','.join(numbers)}\n#SBATCH --output={root}/slurm-%A-%a.log\n"
            f'set -eu\nexec {command} --stage="$SLURM_ARRAY_TASK_ID"\n'
        )
        files.append(path)
        submit.append(
            f'after=$(sbatch --parsable ${{after:+--dependency=afterok:"$after"}} "$@" '
            f"{shlex.quote(str(path))})"
        )
    script = root / "submit.sh"
    script.write_text("\n".join([*submit, 'echo "last array: $after"', ""]))
    return [*files, script]


def collect(runs: Sequence[Run], shown: str = SHOWN) -> list[dict[str, Any]]:
    """Return one row for each run: its name, settings and the metrics of its last stage."""
    rows = []
    for run in runs:
        last = run.stages[-1]
        found = json.loads((last.workdir / "result.json").read_text()) if last.done else {}
        rows.append(
            {
                "name": run.name,
                "settings": dict(run.settings),
                "workdir": str(last.workdir),
                "done": last.done,
                "result": {k: v for k, v in found.items() if re.search(shown, k)},
            }
        )
    return rows


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Merge rows that differ only in the seed: means, deviations and counts."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        rest = {k: v for k, v in row["settings"].items() if k != "seed"}
        name = re.sub(r"(, )?\bseed=\S+?(?=,|$)", "", row["name"]).strip(", ")
        groups.setdefault(json.dumps([name, rest], default=str), []).append(row)
    found = []
    for key, members in groups.items():
        name, _ = json.loads(key)
        results = [m["result"] for m in members if m["done"]]
        names = [n for n in (results[0] if results else {}) if all(n in r for r in results)]
        found.append(
            {
                "name": name or "default",
                "runs": len(results),
                "of": len(members),
                "mean": {n: statistics.fmean(r[n] for r in results) for n in names},
                "deviation": {
                    n: statistics.stdev(r[n] for r in results) if len(results) > 1 else 0.0
                    for n in names
                },
            }
        )
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as Markdown: one for each setting, mean ± deviation over seeds."""
    groups = over_seeds(rows)
    names = sorted({name for group in groups for name in group["mean"]})
    head = ["run", "n", *(name.removeprefix("eval/") for name in names)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for group in groups:
        cells = []
        for name in names:
            if name not in group["mean"]:
                cells.append("")
                continue
            spread = f" ± {group['deviation'][name]:.2g}" if group["runs"] > 1 else ""
            cells.append(f"{group['mean'][name]:.4g}{spread}")
        count = (
            str(group["runs"])
            if group["runs"] == group["of"]
            else (f"{group['runs']} of {group['of']}")
        )
        lines.append("| " + " | ".join([group["name"].replace("|", "\\|"), count, *cells]) + " |")
    return "\n".join(lines)


def write_table(runs: Sequence[Run], root: Path, shown: str) -> str:
    """Write `sweep.md` and `sweep.json` into the root; return the table."""
    rows = collect(runs, shown)
    text = table(rows)
    root.mkdir(parents=True, exist_ok=True)
    (root / "sweep.md").write_text(text + "\n")
    (root / "sweep.json").write_text(
        json.dumps({"runs": rows, "over_seeds": over_seeds(rows)}, indent=2, default=str) + "\n"
    )
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="stoa_jax.sweep", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="a file that defines sweep()")
    parser.add_argument("--workdir", required=True, help="all runs' directories go under it")
    parser.add_argument("--parallel", type=int, default=1, help="stages at a time")
    parser.add_argument("--slurm", action="store_true", help="write arrays instead of running")
    parser.add_argument("--stage", type=int, help="run this one stage only (for the arrays)")
    parser.add_argument("--table", action="store_true", help="only collect the table")
    parser.add_argument("--metrics", default=SHOWN, help="regex of the metrics in the table")
    args = parser.parse_args(argv)
    root = Path(args.workdir).absolute()
    try:
        if args.parallel < 1:
            raise UserError(f"--parallel: {args.parallel}; it must be at least 1")
        runs = make_runs(args.config, load(args.config), root)
        stages = unique_stages(runs)
        if args.stage is not None:
            if not 0 <= args.stage < len(stages):
                raise UserError(f"--stage: {args.stage}; there are 0 to {len(stages) - 1}")
            return 0 if stages[args.stage].done else run_stage(stages[args.stage])
        if args.slurm:
            print("\n".join(str(path) for path in write_slurm(stages, args.config, root)))
            return 0
        codes = {} if args.table else execute(stages, args.parallel)
        text = write_table(runs, root, args.metrics)
        # A file may define its own `report(rows, workdir)`.
        if report := getattr(load_module(args.config.partition(":")[0]), "report", None):
            text = report(collect(runs, args.metrics), root)
        print(text)
        return 1 if any(codes.values()) else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
