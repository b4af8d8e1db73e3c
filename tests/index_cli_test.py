"""`stoa index …` from end to end, with its exit codes."""

import json

import numpy as np
import pytest
import videos as video_files
from clip_tiny import FOLDER

import stoa_jax
from stoa_jax.cli import main


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "videos" / "deeper"
    inside.mkdir(parents=True)
    video_files.write(tmp_path / "videos" / "one.mp4", count=72, rate=6)
    video_files.write(inside / "two.mp4", count=24, rate=6, size=(128, 64))
    (tmp_path / "videos" / "notes.txt").write_text("no video")
    return tmp_path / "videos"


def run(capsys, *arguments: object, code: int = 0) -> list[dict]:
    assert main(["index", *map(str, arguments), "--json"]) == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_create_add_search_delete_compact_merge(folder, tmp_path, capsys):
    index = tmp_path / "index"
    (made,) = run(capsys, "create", index, f"--model={FOLDER}", "--segment=4", "--stride=4")
    assert made["dim"] == 24 and made["segment"] == 4
    assert run(capsys, "add", index, folder) == [{"added": 2, "skipped": 0, "failed": 0}]
    assert run(capsys, "add", index, folder) == [{"added": 0, "skipped": 2, "failed": 0}]
    hits = run(capsys, "search", index, "a dog runs", "-k", 3)
    assert len(hits) == 3 and hits[0]["video"].startswith(str(folder))
    assert main(["index", "search", str(index), "dog " * 90]) == 2
    assert "--truncate" in capsys.readouterr().err
    assert len(run(capsys, "search", index, "dog " * 90, "--truncate")) == 4
    (same,) = run(capsys, "search", index, folder / "deeper" / "two.mp4", "--video", "-k", 1)
    assert same["id"].endswith("two.mp4") and same["score"] == pytest.approx(1, abs=1e-5)
    assert main(["index", "search", str(index), "a dog runs"]) == 0
    assert "one.mp4  0:00.0-0:04.0" in capsys.readouterr().out
    part = tmp_path / "part"
    run(capsys, "create", part, f"--model={FOLDER}", "--segment=4", "--stride=4")
    assert run(capsys, "add", part, folder, "--shard=1/2")[0]["added"] == 1
    assert run(capsys, "merge", tmp_path / "all", part) == [{"segments": 3}]
    assert run(capsys, "delete", index, hits[0]["id"])[0]["deleted"] in (1, 3)
    assert run(capsys, "compact", index)[0]["segments"] == len(stoa_jax.Index.open(index))
    (info,) = run(capsys, "info", index)
    assert info["videos"] == 1 and info["model"] == str(FOLDER)
    assert info["search"].split()[0] in ("numkong", "usearch", "numpy")


def test_detections_of_some_of_the_videos(folder, tmp_path, capsys):
    index = tmp_path / "index"
    run(capsys, "create", index, f"--model={FOLDER}")
    found = tmp_path / "found.jsonl"
    found.write_text(json.dumps({"video": "one", "frame": 0, "objects": []}) + "\n")
    assert main(["index", "add", str(index), str(folder), f"--detections={found}"]) == 0
    said = capsys.readouterr()
    assert "has nothing about 1 of 2 videos; they are added without objects" in said.err
    assert stoa_jax.Index.open(index).videos()[str(folder / "one.mp4")] is not None
    for options, message in [
        (["--detections=/none.jsonl"], "/none.jsonl: no such file or directory"),
        ([f"--detections={found}", "--ray=2"], "Ray workers read no detections"),
    ]:
        assert main(["index", "add", str(index), str(folder), *options]) == 2
        assert message in capsys.readouterr().err


def test_exit_codes(folder, tmp_path, capsys):
    index = tmp_path / "index"
    run(capsys, "create", index, f"--model={FOLDER}")
    (folder / "broken.mp4").write_bytes(b"no video")
    assert run(capsys, "add", index, folder, code=1) == [{"added": 2, "skipped": 0, "failed": 1}]
    for arguments, message in [
        (["create", index, "--dim=8"], "already contains an index"),
        (["search", tmp_path / "nowhere", "x"], "no index here"),
        (["delete", index, "nothing"], "no such id: 'nothing'"),
        (["add", index, tmp_path / "index"], "contains no video"),
    ]:
        assert main(["index", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    with pytest.raises(SystemExit) as exit_:
        main(["index", "add", str(index), str(folder), "--shard=2"])
    assert exit_.value.code == 2


def test_an_index_without_a_model(tmp_path, capsys):
    run(capsys, "create", tmp_path / "index", "--dim=8")
    with stoa_jax.Index.open(tmp_path / "index") as index:
        index.add_vectors(np.eye(8, dtype=np.float32)[:1], ["a\x1b[31m"])
    assert main(["index", "search", str(tmp_path / "index"), "x"]) == 2
    assert "it names no model; pass --model=PATH" in capsys.readouterr().err
