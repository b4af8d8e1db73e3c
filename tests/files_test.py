import os
import stat

import numpy as np
import pytest

from stoa_jax import files
from stoa_jax.weights.files import save_safetensors


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "deep" / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError), files.atomic(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == '{\n  "a": 1\n}\n'
        raise ValueError
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_the_new_file_replaces_the_old_one_and_has_the_usual_mode(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    usual = stat.S_IMODE(os.stat(path).st_mode)
    files.write_text(path, "new ∅")
    assert path.read_text(encoding="utf-8") == "new ∅"
    assert stat.S_IMODE(os.stat(path).st_mode) == usual
    save_safetensors(path, {"a": np.zeros(2)}, {})  # makes it readable only by its owner
    assert stat.S_IMODE(os.stat(path).st_mode) == usual


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "kept.partial").write_text("a name of the user's")
    with files.atomic(tmp_path / "a") as temporary:
        temporary.write_text("x")
        left = tmp_path / temporary.name
        left_copy = left.with_name(left.name.replace(".a.", ".b."))
        left_copy.write_text("half")
    files.remove_partial(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "kept.partial"]
