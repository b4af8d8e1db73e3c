"""Models of the Hugging Face Hub: from the cache without network, and what is said without one.

The cache is laid out as huggingface_hub writes it, and huggingface_hub reads it. Nothing is
uploaded: `push_to_hub` is tested up to the first request.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from clip_tiny import FOLDER

import stoa_jax

REPO = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A cache that holds one snapshot of `someone/tiny`, as a download leaves it."""
    home = tmp_path_factory.mktemp("hf")
    model = home / "hub" / "models--someone--tiny"
    snapshot = model / "snapshots" / COMMIT
    for folder in (snapshot, model / "blobs", model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    for file in FOLDER.iterdir():
        blob = model / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return home


def run(home, code, **environment):
    """Run code in a process of its own: huggingface_hub reads its environment at import."""
    return subprocess.run(
        [sys.executable, "-c", f"import stoa_jax\n{code}"],
        env={**os.environ, "PYTHONPATH": str(REPO), "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOWHERE}])
def test_a_cached_snapshot_works_without_network(home, environment):
    code = "model = stoa_jax.load('someone/tiny'); print(model.fingerprint, model.source)"
    done = run(home, code, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [stoa_jax.load(FOLDER).fingerprint, "someone/tiny"]


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOWHERE}])
def test_what_is_not_in_the_cache_is_one_line(home, environment):
    code = "import sys; from stoa_jax import cli; sys.exit(cli.main(sys.argv[1:]))"
    code = code.replace("sys.argv[1:]", "['embed', 'a.mp4', '--model=someone/else']")
    done = run(home, code, **environment)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    (line,) = errors
    assert line.startswith("error: someone/else: no such file or directory, and no model of this")
    assert "check the name and the network" in line and "Traceback" not in done.stderr


def test_an_upload_without_network_is_one_line(home, tmp_path):
    code = f"""
try:
    stoa_jax.load({str(FOLDER)!r}).push_to_hub("someone/new", token="hf_none")
except stoa_jax.UserError as error:
    print(error)
"""
    done = run(home, code, HF_ENDPOINT=NOWHERE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("push_to_hub: someone/new was not uploaded (")
    assert len(done.stdout.splitlines()) == 1


def test_without_huggingface_hub_the_install_line_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(stoa_jax.UserError, match=r"pip install 'stoa-jax\[hub\]'"):
        stoa_jax.load("someone/tiny")
    with pytest.raises(stoa_jax.UserError, match=r"pip install 'stoa-jax\[hub\]'"):
        stoa_jax.load(FOLDER).push_to_hub("someone/new")
