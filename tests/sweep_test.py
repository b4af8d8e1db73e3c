"""Runs, stages, resuming, tables, with processes that only write a result."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stoa_jax import sweep
from stoa_jax.errors import UserError

SIMPLE = """
def sweep():
    return [{"seed": s, "optim.weight_decay": w} for w in (0.1, 0.2) for s in (0, 1)]
"""

STAGED = """
def sweep(argument="synthetic"):
    runs = []
    for seed in (0, 1):
        runs.append({"name": f"all, seed={seed}", "stages": [
            {"name": "pretrain", "config": f"configs/pretrain.py:{argument}"},
            {"name": "retrieval", "config": f"configs/retrieval.py:{argument}",
             "overrides": {"init.path": "{pretrain}", "seed": seed}}]})
    return runs
"""

# Replaces `python -m stoa_jax.main`: writes what a run writes, or fails.
STAND_IN = """
import json, os, sys, pathlib
flags = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
folder = pathlib.Path(flags["workdir"]); folder.mkdir(parents=True, exist_ok=True)
with open(folder.parent / "started", "a") as f: f.write(folder.name + "\\n")
cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
with open(folder.parent / "programs", "a") as f: f.write(cache + "\\n")
if flags.get("config.optim.weight_decay") == "0.2" and not (folder.parent / "mended").exists():
    sys.exit(1)
if "config.init.path" in flags:
    assert (pathlib.Path(flags["config.init.path"]) / "result.json").exists()
value = 10.0 * float(flags.get("config.optim.weight_decay", 1)) + float(flags.get("config.seed", 0))
(folder / "result.json").write_text(json.dumps({"step": 3, "eval/R@1": value, "time/step": 1.0}))
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return a folder whose sweeps start the replacement."""
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(STAND_IN)
    real = sweep.Stage.command.fget

    def command(self):
        return [sys.executable, str(stand_in), *real(self)[3:]]

    monkeypatch.setattr(sweep.Stage, "command", property(command))
    return tmp_path


def write(root, text):
    path = root / "experiment.py"
    path.write_text(text)
    return str(path)


def test_the_command_is_the_one_a_user_writes(tmp_path):
    (run,) = sweep.make_runs("configs/qa.py:msvd", [{"seed": 3}], tmp_path)
    (stage,) = run.stages
    assert stage.command[1:] == [
        *("-m", "stoa_jax.main", "--config=configs/qa.py:msvd"),
        f"--workdir={stage.workdir}",
        "--config.seed=3",
    ]
    assert run.name == "seed=3"


def test_a_stage_may_convert_what_an_earlier_one_trained(tmp_path):
    stages = [
        {"name": "clip", "overrides": {"seed": 3}},
        {"name": "hf", "convert": "{clip}", "to": "hugging_face"},
        {"name": "pretrain", "overrides": {"init.path": "{hf}"}},
    ]
    (run,) = sweep.make_runs("configs/clip.py", [{"name": "x", "stages": stages}], tmp_path)
    clip, hf, pretrain = run.stages
    assert hf.command[1:] == [
        *("-m", "stoa_jax.convert", str(clip.workdir), str(hf.workdir), "--to=hugging_face")
    ]
    assert (hf.after, pretrain.after) == (clip.workdir, hf.workdir)
    assert pretrain.overrides == (("init.path", str(hf.workdir)),)
    assert not hf.done
    hf.workdir.mkdir()
    assert hf.done


def test_it_runs_fails_goes_on_and_tabulates_over_seeds(root, capsys):
    arguments = [f"--config={write(root, SIMPLE)}", f"--workdir={root}/out", "--parallel=2"]
    assert sweep.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "exit 1, see" in printed and "| optim.weight_decay=0.2 | 0 of 2 |" in printed
    assert len((root / "out" / "started").read_text().split()) == 4
    (root / "out" / "mended").touch()
    assert sweep.main(arguments) == 0
    # Only the two that had failed were started again.
    assert len((root / "out" / "started").read_text().split()) == 6
    said = capsys.readouterr().out
    assert "2 of 4 stages are done" in said and ": done (4 of 4 done)" in said
    text = (root / "out" / "sweep.md").read_text()
    assert text.splitlines()[0] == "| run | n | R@1 |"
    assert "| optim.weight_decay=0.1 | 2 | 1.5 ± 0.71 |" in text
    assert "| optim.weight_decay=0.2 | 2 | 2.5 ± 0.71 |" in text
    found = json.loads((root / "out" / "sweep.json").read_text())
    assert [row["result"] for row in found["runs"]] == [
        {"eval/R@1": value} for value in (1.0, 2.0, 2.0, 3.0)
    ]


def test_a_report_of_the_files_own_stands_in_for_the_table(root, capsys):
    text = SIMPLE + "\ndef report(rows, workdir):\n    return f'{len(rows)} rows, my way'\n"
    assert sweep.main([f"--config={write(root, text)}", f"--workdir={root}/out", "--table"]) == 0
    assert capsys.readouterr().out == "4 rows, my way\n"
    assert (root / "out" / "sweep.md").exists()


def test_equal_stages_run_once_and_later_ones_find_them(root):
    assert sweep.main([f"--config={write(root, STAGED)}:tiny", f"--workdir={root}/out"]) == 0
    started = (root / "out" / "started").read_text().split()
    assert [name.split("-")[0] for name in started] == ["pretrain", "retrieval", "retrieval"]
    assert "| all | 2 | 10.5 ± 0.71 |" in (root / "out" / "sweep.md").read_text()


def test_a_failed_stage_leaves_out_what_needs_it(root, capsys):
    text = STAGED.replace('argument}"},', 'argument}", "overrides": {"optim.weight_decay": 0.2}},')
    assert sweep.main([f"--config={write(root, text)}", f"--workdir={root}/out"]) == 1
    assert capsys.readouterr().out.count("left out, the stage before it failed") == 2
    assert len((root / "out" / "started").read_text().split()) == 1


def test_slurm_arrays_in_the_order_of_the_stages(root):
    arguments = [f"--config={write(root, STAGED)}", f"--workdir={root}/out"]
    assert sweep.main([*arguments, "--slurm"]) == 0
    first, second = ((root / "out" / f"sweep-{i}.sbatch").read_text() for i in (0, 1))
    assert "#SBATCH --array=0\n" in first and "#SBATCH --array=1,2\n" in second
    # As Slurm would: each array's tasks, in order.
    for number in ("0", "1", "2"):
        assert sweep.main([*arguments, f"--stage={number}"]) == 0
    assert sweep.main([*arguments, "--table"]) == 0
    assert "| all | 2 |" in (root / "out" / "sweep.md").read_text()


def test_the_submit_script_chains_the_arrays(root):
    """sbatch only prints its arguments here."""
    sweep.main([f"--config={write(root, STAGED)}", f"--workdir={root}/out", "--slurm"])
    fake = root / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {root}/submitted\nwc -l < {root}/submitted\n')
    fake.chmod(0o755)
    subprocess.run(
        ["sh", str(root / "out" / "submit.sh"), "--partition=gpu"],
        env={"PATH": f"{fake.parent}:/usr/bin:/bin"},
        check=True,
    )
    assert (root / "submitted").read_text().splitlines() == [
        f"--parsable --partition=gpu {root}/out/sweep-0.sbatch",
        f"--parsable --dependency=afterok:1 --partition=gpu {root}/out/sweep-1.sbatch",
    ]


@pytest.mark.parametrize(
    ("described", "says"),
    [
        ([{"stages": [{"overrides": {"init.path": "{pretrain}"}}]}], "refers to stage .*is none"),
        ([{"stages": [{"name": "a"}, {"name": "a"}]}], "two stages named 'a'"),
        ([{"stages": [{"name": "cache"}]}], "stage named 'cache'; rename it"),
        ([{"stages": [{"name": "hf", "convert": "runs/a"}]}], "'hf' of run 0 wants a format, 'to'"),
    ],
)
def test_wrong_stages_are_one_line(described, says):
    with pytest.raises(UserError, match=says):
        sweep.make_runs("x.py", described, Path("/nowhere"))


def test_stages_share_a_cache_that_does_not_change_their_directories():
    def made(**more):
        described = [{"stages": [{"overrides": {"seed": 1, **more}}]}]
        (run,) = sweep.make_runs("x.py", described, Path("/runs"))
        return run.stages[0]

    before, after = made(), made(**{"data.live_dir": "{cache}"})
    assert "--config.data.live_dir=/runs/cache" in after.command
    assert after.workdir == before.workdir  # a sweep that was begun without it goes on


def test_stages_share_compiled_programs_where_the_user_wants_them(root, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    arguments = [f"--config={write(root, STAGED)}", f"--workdir={root}/out"]
    assert sweep.main(arguments) == 0
    assert set((root / "out" / "programs").read_text().split()) == {f"{root}/out/cache/programs"}
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    assert sweep.main([arguments[0], f"--workdir={root}/second"]) == 0
    assert set((root / "second" / "programs").read_text().split()) == {"/elsewhere"}


def test_wrong_input_is_one_line(root, capsys):
    assert sweep.main(["--config=none.py", "--workdir=x"]) == 2
    assert capsys.readouterr().err == "error: --config=none.py: no such file\n"
    config = write(root, "def get_config(): pass\n")
    assert sweep.main([f"--config={config}", "--workdir=x"]) == 2
    assert "defines no sweep()" in capsys.readouterr().err


def test_the_real_command_takes_every_kind_of_override(tmp_path, capsys):
    """The real main reads tuples, words and numbers, and refuses an invalid one."""
    config = write(
        tmp_path,
        "def sweep():\n"
        "    return [{'name': 'odd', 'stages': [{'config': 'configs/pretrain.py:synthetic',\n"
        "        'overrides': {'optim.betas': (0.9, 0.95), 'optim.groups': (('.*', 1e-3),),\n"
        "                      'model.dtype': 'bfloat16', 'init.path': '', 'data.flip': True,\n"
        "                      'train.batch_size': 7}}]}]\n",
    )
    assert sweep.main([f"--config={config}", f"--workdir={tmp_path}/out"]) == 1
    assert "exit 2, see" in capsys.readouterr().out
    (log,) = (tmp_path / "out").glob("*.log")
    assert (
        log.read_text()
        .splitlines()[-1]
        .startswith("error: config.train.batch_size: 7 is not divisible by 8 device(s)")
    )
