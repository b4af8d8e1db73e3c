"""The paper's Table 4 and Figure 3: each model pre-trained, fine-tuned and tested, three seeds.

    python -m stoa_jax.sweep --config=configs/paper_tables.py:synthetic --workdir=runs/tables

Sets: synthetic (CPU sizes), msrvtt (the paper's data: WebVid, then MSR-VTT and MSVD), and joint:
Table 4's rows and `plus` in one joint training on the live world, where nothing is built.
Run one part with `:synthetic,table4`, `:synthetic,trajectories` or `:synthetic,actions`. `joint`
has the same parts and one more, `ablations`: rows between full and `plus`. Its curves are those of
`plus`, and it runs only `table4` unless other parts are named. Further words after a comma:
`seeds=1` for that many seeds, `longer=10` to make every training ten times as long, and for
`joint`, `more=2` for two more seeds of base, full and `plus`, and `clip=1500` for the steps of its
CLIP. Running the command again continues where it stopped. The work directory gets `tables.md`,
plots and `index.html`.

synthetic, on two CPU cores with --parallel=2: 99 stages in 2 h 33 min. The values are in
benchmarks/RESULTS.md. Memory: not measured. msrvtt: not measured.
"""

from pathlib import Path

from stoa_jax import paper_tables as tables
from stoa_jax.errors import UserError
from stoa_jax.sweep import load_module

PARTS = ("table4", "trajectories", "actions")
JOINT_PARTS = (*PARTS, "ablations")
# Further words of the argument, with their defaults.
NUMBERS = {"seeds": 3, "longer": 1, "more": 0, "clip": 5000}
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
JOINT_N = (0, 1, 2, 4, 8)  # a clip of the joint world shows at most three classes
# The full model's N and A; in the synthetic world a clip shows few classes.
FULL = {"synthetic": (10, 4), "msrvtt": (20, 4)}

PRETRAIN = {"synthetic": "synthetic", "msrvtt": "webvid"}
# The rows of `joint`: overrides of configs/joint.py:heads, and the stage that a row starts from.
# Every row learns answers and the paper's four losses that need no trajectories or actions.
NO_ADJECTIVES = {"model.trajectory_adjectives": False, "loss.adjective": 0.0}
PAPER_LOSSES = {**NO_ADJECTIVES, "model.trajectory_verbs": False, "loss.verb": 0.0}
PAPER = {
    **PAPER_LOSSES,
    "loss.none_weight": 1.0,
    "model.alignment_target": "sentence",
    "loss.match_names": False,
}
BASE = {**PAPER, "model.objects": False, "model.actions": False, "loss.ota": 0.0, "loss.asp": 0.0}
# Parameters that a stage initialises: the encoders that `words` lacks, and the positions of
# fusion, whose number depends on theirs.
MOVED = r"^fusion/(positions|more_positions)"
FRESH = rf"{MOVED}|^(regions|trajectory|action)/"
JOINT = {
    "plus": ({"init.reinit": MOVED}, "motion"),
    "base": ({**BASE, "init.reinit": MOVED}, "words"),
    "full": ({**PAPER, "init.reinit": FRESH}, "words"),
    "+ objects": ({**BASE, "model.objects": True, "init.reinit": FRESH}, "words"),
    "+ OTA": (
        {**PAPER, "model.actions": False, "loss.asp": 0.0, "init.reinit": FRESH},
        "words",
    ),
    "+ actions": ({**PAPER, "loss.asp": 0.0, "init.reinit": FRESH}, "words"),
}
# The learning rates of configs/joint.py:heads, but OTA and ASP regress toward a fixed text tower.
HEADS = load_module(HERE / "joint.py").get_config("heads")
FROZEN_TEXT = ((r"^text/(?!mask_embedding)", 0.0), *HEADS.optim.groups)
# Which part of `plus` helps? Full with the targets and matches of `plus` but only the paper's
# losses; `plus` with one part removed; full with a frozen text tower, or with a stage before in
# which trajectories and actions learn OTA and ASP alone.
ABLATIONS = {
    "full, targets of plus": ({**PAPER_LOSSES, "init.reinit": FRESH}, "words"),
    "plus, no motion stage": ({"init.reinit": FRESH}, "words"),
    "plus, no adjectives": ({**NO_ADJECTIVES, "init.reinit": MOVED}, "motion_no_adjectives"),
    "full, text frozen": (
        {**PAPER, "optim.groups": FROZEN_TEXT, "init.reinit": FRESH},
        "words",
    ),
    "full, alignment stage": ({**PAPER, "init.reinit": MOVED}, "alignment"),
    "full, targets of plus, alignment stage": (
        {**PAPER_LOSSES, "init.reinit": MOVED},
        "alignment_targets_of_plus",
    ),
}
# Stages between `words` and the heads, by name: `motion` of configs/joint.py with these overrides.
# In `alignment`, trajectories and actions learn OTA and ASP alone, and nothing else learns.
ALIGNMENT = {"optim.groups": ((r"^(regions|trajectory|action)/", 2e-3), (r".*", 0.0))}
MIDDLE = {
    "motion": {},
    "motion_no_adjectives": NO_ADJECTIVES,
    "alignment": {**PAPER, **ALIGNMENT, "loss.asp": 0.5},
    "alignment_targets_of_plus": {**PAPER_LOSSES, **ALIGNMENT, "loss.asp": 0.5},
}
MAIN = ("base", "full", "plus")  # rows with additional seeds, if asked
JOINT_STEPS = {"words": 700, "motion": 1200, "heads": 500}

TABLE_TASKS = {
    "synthetic": (("captioning", "synthetic"), ("qa", "synthetic")),
    "msrvtt": (("captioning", "msrvtt"), ("captioning", "msvd"), ("qa", "msrvtt"), ("qa", "msvd")),
}
SETS = tuple(TABLE_TASKS)


def sweep(argument: str = "synthetic"):
    """List one run for each model, task and seed; equal pre-trainings are shared."""
    dataset, *words = argument.split(",")
    if dataset not in (*SETS, "joint"):
        known = ", ".join((*SETS, "joint"))
        raise UserError(f"configs/paper_tables.py:{dataset}: the sets are {known}")
    known_parts = JOINT_PARTS if dataset == "joint" else PARTS
    numbers, parts = dict(NUMBERS), []
    for word in words:
        name, given, value = word.partition("=")
        if given and name in NUMBERS and value.isdecimal() and int(value):
            numbers[name] = int(value)
        elif word in known_parts:
            parts.append(word)
        else:
            known = ", ".join((*known_parts, *(f"{name}=NUMBER" for name in NUMBERS)))
            raise UserError(f"configs/paper_tables.py: no part {word!r}; there are {known}")
    if dataset == "joint":
        runs = list(joint(parts or ("table4",), numbers["seeds"], numbers["more"], numbers["clip"]))
    else:
        runs = paper(dataset, parts or PARTS, numbers["seeds"])
    if numbers["longer"] > 1:
        for run in runs:
            for stage in run["stages"]:
                lengthen(stage, numbers["longer"])
    return runs


def paper(dataset, parts, seeds):
    """List the runs of Table 4's rows and of Figure 3's curves."""
    n, a = FULL[dataset]
    retrieval = (("retrieval", dataset),)
    runs = []
    for seed in range(seeds):
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
    return runs


def joint(parts, seeds, more, clip_steps):
    """List the runs of `joint`, whose rows differ only after a common start.

    All rows share the stage `words`, which trains the base. So trajectories, actions and the
    positions of fusion, which depend on their number, start from scratch in every row; those of
    `plus` learn motion first. The rows of `MAIN` have `more` additional seeds.
    """
    live, conf = f"{HERE}/clip.py:live", f"{HERE}/joint.py"
    steps = {name: {"train.steps": count} for name, count in JOINT_STEPS.items()}
    # The stages render the same clips and run the same frozen vision tower: do both once.
    shared = {"data.live_dir": "{cache}"}
    words = {**BASE, **steps["words"], **shared, "init.path": "{clip_hf}"}
    start = [
        {"name": "clip", "config": live, "overrides": {"train.steps": clip_steps}},
        {"name": "clip_hf", "convert": "{clip}", "to": "hugging_face"},
        {"name": "words", "config": f"{conf}:words", "overrides": words},
    ]
    motion = {**steps["motion"], **shared, "init.path": "{words}", "init.reinit": FRESH}
    middle = {
        name: {"name": name, "config": f"{conf}:motion", "overrides": {**motion, **switches}}
        for name, switches in MIDDLE.items()
    }
    heads = {
        "loss.vtm": 1.0,
        "loss.mlm": 1.0,
        "loss.choice": 0.0,  # VTM trains the match head, in every row
        "data.questions_per_clip": 2,
        "eval.every_steps": 0,  # at the end
        "eval.rerank": 0,
        **steps["heads"],
        **shared,
    }
    rows = [("joint", name, *row) for name, row in JOINT.items() if "table4" in parts]
    if "ablations" in parts:
        rows += [("joint", name, *row) for name, row in ABLATIONS.items()]
    plus, after_motion = JOINT["plus"]
    if "trajectories" in parts:
        none = {"model.objects": False, "loss.ota": 0.0, "loss.verb": 0.0, "loss.adjective": 0.0}
        rows.append(("trajectories", 0, {**plus, **none, "init.reinit": FRESH}, "words"))
        for count in JOINT_N[1:]:
            rows.append(
                ("trajectories", count, {**plus, "model.trajectories": count}, after_motion)
            )
    if "actions" in parts:
        # No earlier stage trains the action encoder, so initializing it again loses nothing.
        fresh = {**plus, "init.reinit": rf"{MOVED}|^action/"}
        none = {"model.actions": False, "loss.asp": 0.0}
        rows.append(("actions", 0, {**fresh, **none}, after_motion))
        for count in A[1:]:
            rows.append(("actions", count, {**fresh, "model.action_tokens": count}, after_motion))
    for seed in range(seeds + more):
        for part, row, switches, before in rows:
            if seed >= seeds and not (part == "joint" and row in MAIN):
                continue
            overrides = {**heads, **switches, "init.path": f"{{{before}}}", "seed": seed}
            last = {"name": "heads", "config": f"{conf}:heads", "overrides": overrides}
            between = [middle[before]] if before in middle else []
            yield {
                "name": f"{part} | {row} | joint:synthetic | seed={seed}",
                "stages": [*start, *between, last],
            }


def lengthen(stage, factor):
    """Multiply a stage's steps, or its epochs if it counts those, by `factor`."""
    if "config" not in stage:
        return  # a conversion
    path, _, of = stage["config"].partition(":")
    train = load_module(path).get_config(of).train
    name = "epochs" if train.epochs else "steps"
    before = stage.get("overrides", {})
    steps = before.get(f"train.{name}", train[name])
    stage["overrides"] = {**before, f"train.{name}": steps * factor}


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
