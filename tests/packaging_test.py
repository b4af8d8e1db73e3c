"""What pyproject.toml declares: files, extras, and version ranges without duplicates."""

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def test_every_pattern_of_package_data_matches_and_every_data_file_is_packaged():
    package = ROOT / "stoa_jax"
    packaged = set()
    for pattern in PROJECT["tool"]["setuptools"]["package-data"]["stoa_jax"]:
        found = {path for path in package.glob(pattern) if path.is_file()}
        assert found, f"{pattern} matches nothing"
        packaged |= found
    data = {
        path
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts
    }
    assert {path.relative_to(package) for path in data - packaged} == set()


def test_requirements_files_name_extras_and_no_versions():
    files = sorted(ROOT.glob("requirements*.txt"))
    assert ROOT / "requirements.txt" in files
    for path in files:
        lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
        assert len(lines) == 1, path.name
        extras = re.fullmatch(r"-e \.\[([a-z,]+)\]", lines[0])
        assert extras, f"{path.name}: {lines[0]}"
        assert set(extras[1].split(",")) <= set(EXTRAS), path.name
        assert "train" in extras[1].split(",")


def test_the_base_installation_is_light():
    names = {re.match(r"[\w-]+", line)[0] for line in PROJECT["project"]["dependencies"]}
    heavy = {"tensorflow-cpu", "tensorflow-datasets", "grain", "clu", "ml_collections", "torch"}
    assert not names & heavy
    assert {"jax", "flax", "spacy", "av"} <= names


def test_every_requirement_has_an_upper_bound():
    groups = {"base": PROJECT["project"]["dependencies"], **EXTRAS}
    open_ended = [
        line
        for lines in groups.values()
        for line in lines
        if not re.search(r"(<|==)\d", line) and not line.startswith("furo")  # calendar versions
    ]
    assert open_ended == []


FIVE_LINES = """
import numpy as np
import stoa_jax
model = stoa_jax.load("synthetic")
frames = np.zeros((8, 64, 64, 3), np.uint8)
print(model.encode_video([frames]).shape, model.caption([frames]), model.has)
"""


@pytest.mark.slow
def test_a_wheel_in_a_new_environment_runs_the_five_lines(tmp_path):
    """The checkout is not available, nor the packages that only training needs."""
    build = ["wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "new", with_pip=True)
    python = tmp_path / "new" / "bin" / "python"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [python, "-m", "pip", "install", "--quiet", wheel]
    subprocess.run(install, env=env, cwd=tmp_path, check=True)
    done = subprocess.run(
        [python, "-c", FIVE_LINES], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "(1, 128)" in done.stdout and "'caption'" in done.stdout
    console = subprocess.run(
        [python.with_name("stoa"), "--version"], cwd=tmp_path, env=env, capture_output=True
    )
    assert console.returncode == 0 and b"stoa_jax" in console.stdout
    absent = "import importlib.util as u; assert not u.find_spec('tensorflow')"
    subprocess.run([python, "-c", absent], cwd=tmp_path, env=env, check=True)
