"""Every shipped configuration with every argument: parsed, and its model built in shape."""

import collections
import re
from pathlib import Path

import jax
import pytest
from clip_tiny import FOLDER
from flax import nnx
from shipped_configs import CONFIGS, load

from stoa_jax import config, optim, paper_tables, sweep, weights
from stoa_jax.data.sources import DATA_SETS, sets_for
from stoa_jax.errors import UserError
from stoa_jax.models.parameters import named_parameters
from stoa_jax.models.stoa import Stoa
from stoa_jax.tasks import make_task

ARGUMENTS = {
    "clip": ("synthetic", "live"),
    "joint": ("words", "motion", "heads", "match"),  # stages on the live synthetic world
    **{
        task: tuple(sets_for(task))
        for task in ("pretrain", "retrieval", "captioning", "qa", "multiple_choice")
    },
    "folder": tuple(f"{t},from=synthetic" for t in ("retrieval", "captioning", "pretrain")),
}
PAIRS = [(name, argument) for name, arguments in ARGUMENTS.items() for argument in arguments]


def test_every_file_is_listed_here():
    assert {path.stem for path in CONFIGS.glob("*.py")} == {*ARGUMENTS, "paper_tables"}


def test_every_data_set_has_a_configuration_that_trains_on_it():
    assert {task for d in DATA_SETS.values() for task in d.tasks} <= set(ARGUMENTS)
    assert all(d.tasks for d in DATA_SETS.values())
    assert ("retrieval", "didemo") in PAIRS and ("qa", "msvd") in PAIRS


@pytest.mark.parametrize(("name", "argument"), PAIRS)
def test_it_builds_its_model(name, argument):
    c = load(name).get_config(argument)
    task = make_task(c)
    assert task.name == c.task
    expected = {"clip": "pretrain", "folder": argument.partition(",")[0]}
    assert c.task == expected.get(name, name)
    model = jax.eval_shape(lambda: Stoa(task.model_config(), rngs=nnx.Rngs(0)))
    named = named_parameters(model)
    rates, unused = optim.learning_rates(c, named)
    assert set(rates) == set(named) and not unused
    if argument in ("synthetic", *ARGUMENTS["joint"], *ARGUMENTS["folder"], "live"):
        assert c.model.vision_width < 200
    else:
        assert c.model.vision_width == 768 and c.data.sets[0][0].split("/")[0] == argument


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_unknown_set_is_named(name):
    known = {"joint": "the stages are words", "folder": "the tasks are retrieval"}
    known = known.get(name, "the sets are .*synthetic")
    with pytest.raises(UserError, match=rf"{name}.py:msrvt: {known}"):
        load(name).get_config("msrvt")


def test_a_folder_takes_its_sizes_from_the_weights():
    c = load("folder").get_config(f"retrieval,from={FOLDER}")
    assert (c.model.vision_width, c.model.text_width) == (24, 24) and c.init.path == str(FOLDER)
    assert c.loss.vtm == 1 and c.loss.plm == 0
    with pytest.raises(UserError, match=r"name the weights to start from, for example .*,from="):
        load("folder").get_config("captioning")
    with pytest.raises(UserError, match="no such file or directory"):
        load("folder").get_config("captioning,from=nowhere")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_docstring_shows_the_command(name):
    assert f"python -m stoa_jax.main --config=configs/{name}.py:" in load(name).__doc__


@pytest.mark.parametrize(("name", "argument"), PAIRS)
def test_it_has_no_key_of_its_own(name, argument):
    c = load(name).get_config(argument)
    assert c.is_locked
    assert set(c) == set(config.default())


@pytest.mark.parametrize("argument", ["synthetic", "msrvtt", "synthetic,table4"])
def test_the_paper_tables_are_runs_of_the_shipped_configurations(argument, tmp_path):
    config_file = f"{CONFIGS / 'paper_tables.py'}:{argument}"
    runs = sweep.make_runs(config_file, sweep.load(config_file), tmp_path)
    parts = {run.name.split(" | ")[0] for run in runs}
    assert parts == ({"table4"} if "," in argument else {"table4", "trajectories", "actions"})
    stages = sweep.unique_stages(runs)
    # Five in the table. The curves share the full model with it, and A = 0 is its "+ OTA".
    models = 5 if "," in argument else 5 + 4 + 3
    assert sum(stage.name == "pretrain" for stage in stages) == 3 * models
    clips = sum(stage.name == "clip" for stage in stages)
    assert clips == (0 if argument == "msrvtt" else 3)  # one per seed, shared by all models
    assert sum(stage.name == "clip_hf" for stage in stages) == clips
    for stage in [stage for stage in stages if not stage.name.startswith("clip")][:12]:
        path, _, of = stage.config.partition(":")
        c = load(Path(path).stem).get_config(of)
        for key, value in stage.overrides:
            section, _, name = key.rpartition(".")
            (c[section] if section else c)[name] = value
        named = make_task(c).model_config()
        assert named.objects == dict(stage.overrides)["model.objects"]


@pytest.mark.parametrize(
    ("dataset", "name", "wanted"), [("synthetic", "steps", 4000), ("msrvtt", "epochs", 100.0)]
)
def test_the_paper_tables_with_fewer_seeds_and_longer(dataset, name, wanted):
    runs = load("paper_tables").sweep(f"{dataset},table4,seeds=1,longer=10")
    assert {run["name"].rpartition("=")[2] for run in runs} == {"0"}
    for run in runs:
        for stage in run["stages"]:
            assert ("convert" in stage) or f"train.{name}" in stage["overrides"]
            if stage["name"] == "pretrain":
                assert stage["overrides"][f"train.{name}"] == wanted


def test_rows_of_joint_share_their_start_and_differ_in_one_stage(tmp_path):
    config_file = f"{CONFIGS / 'paper_tables.py'}:joint,table4,ablations,seeds=2"
    runs = sweep.make_runs(config_file, sweep.load(config_file), tmp_path)
    stages = sweep.unique_stages(runs)
    counts = collections.Counter(stage.name for stage in stages)
    start = {"clip", "clip_hf", "words", *load("paper_tables").MIDDLE}
    assert counts == {"heads": 2 * (6 + 6), **dict.fromkeys(start, 1)}
    made = {}
    for run in runs:
        stage = run.stages[-1]
        c = load("joint").get_config("heads")
        with c.unlocked():
            c.update_from_flattened_dict(dict(stage.overrides))
        c.lock()
        assert c.model.objects or not c.loss.ota
        made[run.name.split(" | ")[1], c.seed] = c
    plus, base, full = (made[name, 1] for name in ("plus", "base", "full"))
    assert {c.train.steps for c in made.values()} == {plus.train.steps}
    paper = {"vtc", "vtm", "mlm", "plm", "ota", "asp"}
    on = {
        name: {k for k in (*paper, "verb", "adjective") if made[name, 0].loss[k]}
        for name, _ in made
    }
    assert on["full"] == paper and on["plus"] == paper | {"verb", "adjective"}
    assert on["plus, no adjectives"] == paper | {"verb"}
    assert on["plus, no motion stage"] == on["plus"] and on["full, targets of plus"] == paper
    assert on["base"] == on["+ objects"] == paper - {"ota", "asp"}
    assert on["+ OTA"] == on["+ actions"] == paper - {"asp"}
    assert made["+ objects", 0].model.objects and not base.model.objects
    assert made["+ actions", 0].model.actions and not made["+ OTA", 0].model.actions
    assert (full.model.alignment_target, full.loss.none_weight) == ("sentence", 1.0)
    for c in (plus, made["full, targets of plus", 0]):
        assert (c.model.alignment_target, c.loss.none_weight) == ("alone", 0.1)
        assert c.loss.match_names and not full.loss.match_names
    for name in ("full, text frozen", "full, alignment stage"):
        assert on[name] == paper and made[name, 0].model == full.model


def test_the_text_tower_is_frozen_where_the_tables_say_so(tmp_path):
    config_file = f"{CONFIGS / 'paper_tables.py'}:joint,ablations,seeds=1"
    learned = {}
    for run in sweep.make_runs(config_file, sweep.load(config_file), tmp_path):
        for stage in run.stages[-2:]:
            c = load("joint").get_config(stage.config.partition(":")[2])
            with c.unlocked():
                c.update_from_flattened_dict(dict(stage.overrides))
            names = weights.parameter_shapes(make_task(c).model_config())
            rates, _ = optim.learning_rates(c, names)
            row = run.name.split(" | ")[1] if stage.name == "heads" else stage.name
            learned[row] = optim.trainable(rates, rates), c.loss
    full, frozen = (learned[name][0] for name in ("full, targets of plus", "full, text frozen"))
    assert frozen.items() <= full.items()  # the other rates are the same
    full, frozen = set(full), set(frozen)
    text = {name for name in full if name.startswith("text/")}
    assert len(text) > 9 and full - frozen == text - {"text/mask_embedding"}
    for stage in ("alignment", "alignment_targets_of_plus"):
        names, loss = learned[stage]
        assert {name.split("/")[0] for name in names} == {"regions", "trajectory", "action"}
        losses = ("vtc", "vtm", "mlm", "plm", "ota", "asp", "verb", "adjective", "answer")
        assert [name for name in losses if loss[name]] == ["ota", "asp"]


def test_the_main_rows_of_joint_can_have_more_seeds():
    runs = load("paper_tables").sweep("joint,seeds=1,more=2")
    seeds = collections.Counter(run["name"].split(" | ")[1] for run in runs)
    assert {row for row, count in seeds.items() if count == 3} == {"base", "full", "plus"}
    assert len(seeds) == 6 and set(seeds.values()) == {1, 3}
    assert set(seeds) < set(paper_tables.JOINT_ROWS)


def test_the_curves_of_the_joint_training_change_one_size(tmp_path):
    config_file = f"{CONFIGS / 'paper_tables.py'}:joint,trajectories,actions,seeds=1"
    runs = sweep.make_runs(config_file, sweep.load(config_file), tmp_path)
    sizes = {"trajectories": {}, "actions": {}}
    for run in runs:
        part, value, *_ = run.name.split(" | ")
        c = load("joint").get_config("heads")
        with c.unlocked():
            c.update_from_flattened_dict(dict(run.stages[-1].overrides))
        c.lock()
        m = make_task(c).model_config()
        assert run.stages[-2].name == ("motion" if m.objects else "words")
        sizes[part][int(value)] = m.trajectories * m.objects, m.action_tokens * m.actions
    assert sizes["trajectories"] == {n: (n, 2) for n in (0, 1, 2, 4, 8)}
    assert sizes["actions"] == {a: (5, a) for a in (0, 1, 2, 4, 8)}


def test_every_row_of_joint_can_start_from_the_stage_before_it(tmp_path):
    parts = "table4,trajectories,actions,ablations"
    config_file = f"{CONFIGS / 'paper_tables.py'}:joint,{parts},seeds=1"
    runs = sweep.make_runs(config_file, sweep.load(config_file), tmp_path)
    shapes = {}  # by work directory: runs share stages
    checked = 0
    for run in runs:
        before = None
        for stage in run.stages:
            if stage.name.startswith("clip"):
                continue
            c = load("joint").get_config(stage.config.partition(":")[2])
            with c.unlocked():
                c.update_from_flattened_dict(dict(stage.overrides))
            if stage.workdir not in shapes:
                shapes[stage.workdir] = weights.parameter_shapes(make_task(c).model_config())
            if before is not None:
                report, reinit = weights.Report("", ""), re.compile(c.init.reinit)
                found, wanted = shapes[before], shapes[stage.workdir]
                weights._matching_names(run.name, found, wanted, report, reinit)
                checked += 1
            before = stage.workdir
    assert checked > 20


def test_the_paper_tables_name_a_wrong_set():
    for words in ("synthetic,ablations", "msrvtt,ablations"):  # only the joint training has them
        with pytest.raises(UserError, match="no part 'ablations'"):
            load("paper_tables").sweep(words)
    with pytest.raises(UserError, match=r"paper_tables.py:msrvt: the sets are synthetic, msrvtt"):
        load("paper_tables").sweep("msrvt")
    with pytest.raises(UserError, match="no part 'table5'"):
        load("paper_tables").sweep("synthetic,table5")
    with pytest.raises(UserError, match=r"no part 'seeds=0'; there are table4, .*, seeds=NUMBER"):
        load("paper_tables").sweep("synthetic,seeds=0")
