"""Every public call has an example in its docstring, and the examples run."""

import doctest
import inspect
import shutil
from pathlib import Path

import numpy as np
import pytest

import stoa_jax

STATIC = Path(__file__).parents[1] / "docs" / "_static"
# What calls return, and errors: examples of the calls show them.
WITHOUT = {"Action", "Added", "Answer", "Choice", "Failure", "Hit", "Trajectory", "UserError"}
NOT_RUN = {"Model.push_to_hub", "load_detector"}  # they need a network
PARTS_OF_CALLS = {
    "Model.needs", "Model.tokens", "Model.preprocessing", "Model.note_missing_detections",
    "Model.probability", "Index.session",
}  # fmt: skip


def public() -> dict[str, object]:
    """Return the functions, classes and methods that a user calls, by name."""
    found: dict[str, object] = {}
    for name in set(stoa_jax.__all__) - WITHOUT - {"__version__"}:
        value = getattr(stoa_jax, name)
        if name not in ("Model", "Index", "Explanation"):
            found[name] = value
            continue
        for method, member in vars(value).items():
            call = isinstance(member, staticmethod | classmethod) or inspect.isfunction(member)
            if call and not method.startswith("_"):
                found[f"{name}.{method}"] = getattr(value, method)
    for name in PARTS_OF_CALLS:
        del found[name]
    found["Model.fingerprint"] = stoa_jax.Model.fingerprint
    found["Model.threshold"] = stoa_jax.Model.threshold
    return found


@pytest.mark.parametrize("name", sorted(public()))
def test_there_is_an_example(name):
    assert ">>> " in (inspect.getdoc(public()[name]) or ""), f"{name} has no example"


@pytest.fixture(scope="module")
def model():
    return stoa_jax.load("synthetic")


@pytest.mark.slow  # every call is compiled
@pytest.mark.parametrize("name", sorted(public().keys() - NOT_RUN))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_example_runs(name, model, tmp_path, monkeypatch):
    for file in ("example.mp4", "example.jsonl"):
        shutil.copy(STATIC / file, tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {
        "np": np,
        "stoa_jax": stoa_jax,
        "model": model,
        "clip": stoa_jax.Clip("example.mp4", detections="example.jsonl"),
    }
    text = inspect.getdoc(public()[name]) or ""
    test = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    shown: list[str] = []
    failed, _ = doctest.DocTestRunner().run(test, out=shown.append)
    assert not failed, "".join(shown)
