"""The paper's Table 4 and Figure 3: each model pre-trained, fine-tuned and tested, three seeds.

    python -m stoa_jax.sweep --config=configs/paper_tables.py:synthetic --workdir=runs/tables

Sets: synthetic (CPU sizes), msrvtt (the paper's data: WebVid, then MSR-VTT and MSVD).
Run one part with `:synthetic,table4`, `:synthetic,trajectories` or `:synthetic,actions`. Further
words after a comma: `seeds=1` for that many seeds, `longer=10` to make every training ten times as
long. Running the command again continues where it stopped. The work directory gets `tables.md`,
plots and `index.html`.

synthetic, on two CPU cores with --parallel=2: 99 stages in 2 h 33 min. The values are in
benchmarks/RESULTS.md. Memory: not measured. msrvtt: not measured.
"""

from pathlib import Path

from stoa_jax import paper_tables as tables
from stoa_jax.errors import UserError
from stoa_jax.sweep import load_module

SETS = ("synthetic", "msrvtt")
PARTS = ("table4", "trajectories", "actions")
NUMBERS = {"seeds": 3, "longer": 1}  # further words of the argument, with their defaults
HERE = Path(__file__).resolve().parent

# The switches of each row of Table 4, in the paper's order.
TABLE_4 = {
    "base": {"objects": False, "actions": False, "ota": False, "asp": False},
    "+ objects": {"objects": True, "actions": False, "ota": False, "asp": False},
    "+ OTA": {"objects": True, "actions": False, "ota": True, "asp": False},
    "+ actions": {"objects": True, "actions": True, "ota": True, "asp": False},
    "+ ASP (full)": {"objects": True, "actions": True, "ota": True, "asp": True},
}
N, A = (0, 5, 10, 20, 30), (0, 1, 2, 4, 8)
# The full model's N and A; in the synthetic world a clip shows few classes.
FULL = {"synthetic": (10, 4), "msrvtt": (20, 4)}

PRETRAIN = {"synthetic": "synthetic", "msrvtt": "webvid"}
TABLE_TASKS = {
    "synthetic": (("captioning", "synthetic"), ("qa", "synthetic")),
    "msrvtt": (("captioning", "msrvtt"), ("captioning", "msvd"), ("qa", "msrvtt"), ("qa", "msvd")),
}


def sweep(argument: str = "synthetic"):
    """List one run for each model, task and seed; equal pre-trainings are shared."""
    dataset, *words = argument.split(",")
    if dataset not in SETS:
        raise UserError(f"configs/paper_tables.py:{dataset}: the sets are {', '.join(SETS)}")
    numbers, parts = dict(NUMBERS), []
    for word in words:
        name, given, value = word.partition("=")
        if given and name in NUMBERS and value.isdecimal() and int(value):
            numbers[name] = int(value)
        elif word in PARTS:
            parts.append(word)
        else:
            known = ", ".join((*PARTS, *(f"{name}=NUMBER" for name in NUMBERS)))
            raise UserError(f"configs/paper_tables.py: no part {word!r}; there are {known}")
    parts = parts or PARTS
    n, a = FULL[dataset]
    retrieval = (("retrieval", dataset),)
    runs = []
    for seed in range(numbers["seeds"]):
        if "table4" in parts:
            for row, on in TABLE_4.items():
                switches = {**on, "n": n, "a": a}
                runs += described("table4", row, switches, dataset, TABLE_TASKS[dataset], seed)
        full = {**TABLE_4["+ ASP (full)"], "n": n, "a": a}
        if "trajectories" in parts:
            for count in N:
                switches = {**full, "n": count or n, "objects": count > 0}
                runs += described("trajectories", count, switches, dataset, retrieval, seed)
        if "actions" in parts:
            for count in A:
                switches = {**full, "a": count or a, "actions": count > 0}
                runs += described("actions", count, switches, dataset, retrieval, seed)
    if numbers["longer"] > 1:
        for run in runs:
            for stage in run["stages"]:
                lengthen(stage, numbers["longer"])
    return runs


def lengthen(stage, factor):
    """Multiply a stage's steps, or its epochs if it counts those, by `factor`."""
    if "config" not in stage:
        return  # a conversion
    path, _, of = stage["config"].partition(":")
    train = load_module(path).get_config(of).train
    name = "epochs" if train.epochs else "steps"
    stage["overrides"] = {**stage["overrides"], f"train.{name}": train[name] * factor}


def described(part, row, switches, dataset, tasks, seed):
    """Yield the runs of one model, with the same switches in pre-training and fine-tuning.

    A loss that is on keeps the weight of its configuration.
    """
    overrides = {
        "model.objects": switches["objects"],
        "model.actions": switches["actions"],
        "model.trajectories": switches["n"],
        "model.action_tokens": switches["a"],
        "seed": seed,
    }
    for loss, needs in (("ota", "objects"), ("asp", "actions")):
        if not (switches[loss] and switches[needs]):
            overrides[f"loss.{loss}"] = 0.0
    first, start, tested = [], {}, {}
    if dataset == "synthetic":  # trains its own CLIP first
        config = f"{HERE}/clip.py:synthetic"
        first = [
            {"name": "clip", "config": config, "overrides": {"seed": seed}},
            {"name": "clip_hf", "convert": "{clip}", "to": "hugging_face"},
        ]
        start = {"init.path": "{clip_hf}"}
        tested = {"data.eval_split": "test"}
    for task, of in tasks:
        yield {
            "name": f"{part} | {row} | {task}:{of} | seed={seed}",
            "stages": [
                *first,
                {
                    "name": "pretrain",
                    "config": f"{HERE}/pretrain.py:{PRETRAIN[dataset]}",
                    "overrides": {**overrides, **start},
                },
                {
                    "name": task,
                    "config": f"{HERE}/{task}.py:{of}",
                    "overrides": {**overrides, **tested, "init.path": "{pretrain}"},
                },
            ],
        }


def report(rows, workdir):
    """Write the tables; the sweep calls this with the metrics of every run."""
    return tables.write(rows, workdir)
