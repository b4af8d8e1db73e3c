"""MSVD as published: its pickle, which executes nothing, its lists and its mapping of names."""

import pickle
import pickletools

import pytest
from published_files import CAPTIONS, NAMES, QA, named, put, rows

from stoa_jax.data import sources
from stoa_jax.data.sources import msvd
from stoa_jax.errors import UserError


def msvd_lists(tmp_path):
    put(
        tmp_path, train_list__txt=f"{NAMES[0]}\n\n{NAMES[0]}\n{NAMES[2]}\n", test_list__txt=NAMES[1]
    )


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_msvd_captions_from_a_pickle(tmp_path, protocol):
    msvd_lists(tmp_path)
    put(tmp_path, raw_captions__pkl=b"")
    (tmp_path / "raw_captions.pkl").rename(tmp_path / "raw-captions.pkl")
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(CAPTIONS, protocol))
    for name in ("msvd/captioning", "msvd/retrieval"):
        source = sources.open_source(name, tmp_path)
        assert rows(source) == {
            "train": [(NAMES[0], ["a squirrel eats", "it eats a nut"])],
            "test": [(NAMES[1], ["a man runs"])],
        }
        assert named(source) == [(NAMES[0], 3), (NAMES[2], 4)]


def test_msvd_captions_from_text(tmp_path):
    msvd_lists(tmp_path)
    put(
        tmp_path,
        AllVideoDescriptions__txt=f"# header\n{NAMES[0]} a squirrel eats\n{NAMES[1]} runs\n\n",
    )
    put(tmp_path, **{f"YouTubeClips___{NAMES[1]}__avi": b"x"})
    source = sources.open_source("msvd/captioning", tmp_path)
    assert rows(source)["test"] == [(NAMES[1], ["runs"])]
    assert source.splits["test"][0].video_path.endswith(f"YouTubeClips/{NAMES[1]}.avi")


def test_msvd_qa_through_the_mapping(tmp_path):
    put(tmp_path, youtube_mapping__txt=f"{NAMES[0]} vid5\n{NAMES[1]} vid9\nodd line here\n")
    put(tmp_path, train_qa__json=QA, test_qa__json=[QA[0] | {"video_id": 1971}, QA[0]])
    source = sources.open_source("msvd/qa", tmp_path)
    assert [e.video_id for e in source.splits["train"]] == NAMES[:2]
    assert [s.line for s in source.skipped] == [3, 1]
    assert "vid1971 is not in youtube_mapping.txt" in str(source.skipped[1])


class Runs:
    """An object that creates a file when it is unpickled carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def hostile_pickles(target):
    path = str(target)
    yield pickle.dumps({"v": [Runs(path)]})
    yield pickle.dumps({"v": [Runs(path)]}, 0)
    yield b"cos\nsystem\n(S'touch " + path.encode() + b"'\ntR."  # the textbook one
    yield b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c\x04pass\x85R."  # names from the stack
    yield b"(S'touch " + path.encode() + b"'\nios\nsystem\n."  # INST
    yield b"\x80\x02cbuiltins\ndict\n)\x81."  # NEWOBJ
    yield b"\x80\x02\x82\x01."  # an extension's code
    yield b"\x80\x02U\x01aQ."  # a persistent id
    yield b"\x80\x02}r\xff\xff\xff\x7f."  # asks for sixteen gigabytes of memo
    yield b"\x80\x05\x97."  # a buffer from outside


def test_a_pickle_runs_nothing(tmp_path):
    target = tmp_path / "ran"
    for data in hostile_pickles(target):
        path = tmp_path / "raw-captions.pkl"
        path.write_bytes(data)
        with pytest.raises(
            UserError, match=r"raw-captions\.pkl: (a pickle that was refused|not a pickle)"
        ):
            msvd.load_plain_pickle(path)
        assert not target.exists()
    with pytest.raises(UserError, match="it wants to run"):
        path.write_bytes(next(hostile_pickles(target)))
        msvd.load_plain_pickle(path)


def test_the_lock_holds_without_the_look_before(tmp_path, monkeypatch):
    monkeypatch.setattr(msvd, "_refuse_code", lambda data: None)
    target = tmp_path / "ran"
    for data in list(hostile_pickles(target))[:8]:
        path = tmp_path / "raw-captions.pkl"
        path.write_bytes(data)
        with pytest.raises(UserError):
            msvd.load_plain_pickle(path)
        assert not target.exists()


def test_only_opcodes_of_plain_values_are_known():
    every = {o.name for o in pickletools.opcodes}
    assert every >= msvd._PLAIN_OPCODES
    assert not msvd._PLAIN_OPCODES & {
        "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX",
        "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID",
    }  # fmt: skip


def test_msvd_odd_pickles(tmp_path):
    msvd_lists(tmp_path)
    path = tmp_path / "raw-captions.pkl"
    doubling = []
    for _ in range(60):
        doubling = [doubling, doubling]
    odd = {NAMES[0]: [["fine"], doubling, [1], "as text"], NAMES[1]: 7, 5: []}
    path.write_bytes(pickle.dumps(odd))
    source = sources.open_source("msvd/captioning", tmp_path)
    assert rows(source) == {"train": [(NAMES[0], ["fine", "as text"])]}
    for data, words in (
        (pickle.dumps([1]), "holds list"),
        (pickle.dumps(CAPTIONS)[:-9], "not a pickle|a pickle that was refused"),
        (b"", "not a pickle"),
        (b"\xff" * 50, "not a pickle"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=words):
            sources.open_source("msvd/captioning", tmp_path)
