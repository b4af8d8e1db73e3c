"""The command line: a mistake gives one line and exit code 2, before anything is built."""

import subprocess
import sys
import textwrap

import pytest

from stoa_jax import config_flags, main

CONFIG = """
from stoa_jax import config
def get_config(argument="tiny"):
    c = config.default(variant=argument)
    {line}
    return c
"""


@pytest.fixture
def config_file(tmp_path):
    def write(line="pass"):
        path = tmp_path / "experiment.py"
        path.write_text(textwrap.dedent(CONFIG.format(line=line)))
        return str(path)

    return write


@pytest.fixture
def says(capsys, monkeypatch):
    """Return the line that `main` prints for some arguments."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["main", *arguments])
        with pytest.raises(SystemExit) as caught:
            main.main()
        assert caught.value.code == 2
        printed = capsys.readouterr().err.splitlines()
        lines = [line for line in printed if line.startswith("error:")]
        assert len(lines) == 1
        return lines[0]

    return call


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        (
            "--config.train.stepz=4",
            "--config.train.stepz: no such key; the nearest is 'train.steps'",
        ),
        ("--config.model.image_sise=4", "the nearest is 'model.image_size'"),
        ("--config.weight_decay=4", "the nearest is 'optim.weight_decay'"),
        ("--config.train.steps=many", "train.steps=many"),
        ("--config.model.image_size=50", "50 is not a multiple of patch_size 12; use 48"),
        ("--config.model.text_length=2", "text_length is 2; it must be at least 4"),
        ("--config.train.batch_size=12", "train.batch_size: 12 is not divisible by 8 device(s)"),
        ("--config.mesh.data=3", "needs 3 device(s), there are 8"),
        ("--mode=dance", "train|eval|calibrate|plan|profile"),
        ("--wrkdir=x", "Did you mean: workdir"),
        ("steps=4", "'steps=4' is not a flag"),
    ],
)
def test_wrong_flags(config_file, tmp_path, says, flag, expected):
    workdir = tmp_path / "run"
    line = says(f"--config={config_file()}", f"--workdir={workdir}", flag)
    assert expected in line
    assert not (workdir / "checkpoints").exists() and not (workdir / "config.json").exists()


def test_an_unknown_key_in_the_file(config_file, tmp_path, says):
    line = says(f"--config={config_file('c.train.stepz = 3')}", f"--workdir={tmp_path}/r")
    assert "no configuration key 'stepz'; the nearest is 'steps'" in line


def test_a_user_error_of_the_file(config_file, tmp_path, says):
    line = says(f"--config={config_file()}:huge", f"--workdir={tmp_path}/r")
    assert "no variant 'huge'; there are base" in line


def test_missing_flags(config_file, says):
    assert "--config is missing" in says()
    assert "--workdir is missing" in says(f"--config={config_file()}")
    assert "--topology is missing" in says(f"--config={config_file()}", "--mode=plan")
    assert "--config=/none.py: no such file" in says("--config=/none.py", "--workdir=x")


def test_an_unwritable_workdir(config_file, tmp_path, says):
    (tmp_path / "file").write_text("")
    line = says(f"--config={config_file()}", f"--workdir={tmp_path}/file/run")
    assert "file/run cannot be written (Not a directory); name another" in line


def test_as_a_command(config_file, tmp_path):
    """As a user runs it: exit code, one line, no traceback."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "stoa_jax.main", f"--config={config_file()}"),
            *(f"--workdir={tmp_path}/run", "--config.seeed=1"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "error: --config.seeed: no such key; the nearest is 'seed'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_training_process_has_no_tensorflow():
    code = (
        "import stoa_jax.main, stoa_jax.train, stoa_jax.tasks.pretrain, stoa_jax.models.stoa, sys;"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_nearest_key_is_found_in_another_section():
    assert (
        config_flags.nearest("train.warmup", config_flags.known_keys())
        == "; the nearest is 'optim.warmup'"
    )
    assert config_flags.nearest("zzzz", config_flags.known_keys()) == ""


def test_a_file_that_is_no_python(tmp_path, says):
    path = tmp_path / "broken.py"
    path.write_text("def get_config(:\n")
    assert "broken.py" in says(f"--config={path}", "--workdir=x")
