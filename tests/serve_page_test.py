"""The page's server as a whole: access, uploads, searches, and the command."""

import argparse
import base64
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import videos

pytest.importorskip("gradio")

import served
from starlette.testclient import TestClient

import stoa_jax
from stoa_jax.cli import serve as command
from stoa_jax.errors import UserError
from stoa_jax.serve import access, app, example_library, fragments, uploads
from stoa_jax.serve.finder import Finder, Moment
from stoa_jax.serve.library import Library

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stoa_jax.load(served.write_model(tmp_path_factory.mktemp("served") / "model"))


@pytest.fixture(scope="module")
def library(model, tmp_path_factory):
    return served.write_library(tmp_path_factory.mktemp("cache"), model)


@pytest.fixture(scope="module")
def client(model, library):
    with TestClient(served.open_page(model, library)) as client:
        yield client


@pytest.fixture
def received(tmp_path):
    found = uploads.Uploads(100_000, 3.0)
    yield found
    found.close()


@pytest.fixture
def finder(model, library, received):
    index = stoa_jax.Index.open(library / "index", model)
    found = Library(index.videos(), [library / "videos"])
    return Finder(index, model, found, received, library / example_library.DETECTIONS)


def put(client, content, **headers):
    return client.post("/upload", content=content, headers={"x-stoa-upload": "1", **headers})


# The page and the allowed routes


def test_the_page_is_there_and_asks_no_other_site(client):
    answer = client.get("/")
    assert answer.status_code == 200 and "Find a moment" in answer.text
    config = client.get("/config").json()
    assert config["title"] == "STOA: find a moment"
    labels = [c["props"].get("label") for c in config["components"]]
    assert "Describe the moment" in labels and "A question about the clip" in labels
    assert not config.get("analytics_enabled")


@pytest.mark.parametrize(
    "path",
    ["/file=/etc/passwd", "/gradio_api/file=/etc/passwd", "/gradio_api/file/etc/passwd",
     "/gradio_api/proxy=http://example.com", "/static/../../../../etc/passwd",
     "/static/%2e%2e/%2e%2e/etc/passwd", "/assets/..%2f..%2fsetup.py", "/gradio_api/upload",
     "/gradio_api/info", "/openapi.json", "/docs", "/monitoring", "/gradio_api/stream/a/b/c/x.ts",
     "/gradio_api/deep_link", "/login", "/GRADIO_API/FILE=/etc/passwd", "/.env", "//etc/passwd",
     "/clip/../config.json", "/gradio_api/call/search", "/gradio_api/run/predict"],
)  # fmt: skip
def test_routes_that_read_by_name_are_not_there(client, path):
    for method in ("GET", "POST"):
        answer = client.request(method, path, content=b"" if method == "POST" else None)
        assert answer.status_code == 404, path
        assert "root:" not in answer.text


def test_every_video_of_the_index_is_served_or_says_why_not(client, library):
    seen = {}
    for row in range(served.CLIPS + 2):
        answer = client.get(f"/clip/{row}", headers={"range": "bytes=0-9"})
        seen[row] = answer.status_code
        if answer.status_code == 404:
            assert "vanished.mp4: the video was moved or deleted" in answer.json()["error"]
    assert sorted(seen.values()) == [206] * (served.CLIPS + 1) + [404]


def test_another_host_name_and_a_missing_password_are_refused(model, library):
    login, local = ("me", "pass:wörd"), ("localhost", "127.0.0.1", "::1")
    page = served.open_page(model, library, hosts=local, login=login)
    client = TestClient(page, base_url="http://127.0.0.1:7860")
    code = base64.b64encode("me:pass:wörd".encode()).decode()
    good = {"Authorization": f"Basic {code}"}
    for path in ("/", "/clip/0", "/config", "/upload", "/gradio_api/queue/join"):
        answer = client.get(path)
        assert answer.status_code == 401 and "Basic" in answer.headers["www-authenticate"]
    assert client.get("/clip/0", headers=good).status_code == 200
    for bad in (
        "Basic",
        "Basic !!",
        "Bearer " + code,
        "Basic " + base64.b64encode(b"me:").decode(),
    ):
        assert client.get("/clip/0", headers={"Authorization": bad}).status_code == 401
    for host in ("evil.example", "127.0.0.1.evil.example", "evil.example:7860", ""):
        assert client.get("/clip/0", headers={**good, "Host": host}).status_code == 421
    for host in ("localhost:7860", "[::1]:7860", "[::1]", "LOCALHOST"):
        assert client.get("/clip/0", headers={**good, "Host": host}).status_code == 200


def test_a_password_comes_from_the_command_line_or_a_file(tmp_path):
    assert access.password_of("me:a:b") == ("me", "a:b")
    (tmp_path / "secret").write_text("me:word\n")
    assert access.password_of(f"@{tmp_path / 'secret'}") == ("me", "word")
    for bad in ("me", ":word", "me:", f"@{tmp_path / 'none'}"):
        with pytest.raises(UserError, match="--auth"):
            access.password_of(bad)


def test_requests_are_small(client):
    assert client.post("/gradio_api/queue/join", content=b"x" * (2 << 20)).status_code == 413

    def stream():
        yield b"{}"

    assert client.post("/gradio_api/queue/join", content=stream()).status_code == 411


# Uploads


def waiting(received):
    return list(received.directory.iterdir())


def client_of(received):
    from fastapi import FastAPI

    application = FastAPI()
    application.include_router(uploads.router(received))
    return TestClient(application)


def test_an_uploaded_clip_is_used_once_and_deleted(received, tmp_path):
    content = videos.write(tmp_path / "a.mp4", codec="libx264").read_bytes()
    token = put(client_of(received), content).json()["token"]
    assert len(waiting(received)) == 1
    with received.taken(token) as path:
        assert path.read_bytes() == content
    assert not waiting(received)
    with pytest.raises(UserError, match="clip was deleted"), received.taken(token):
        pass


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"", 400, "empty"),
        (b"not a video at all", 415, "cannot be read as a video: not a video"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", 415, "not a video"),
        (b"\0" * 200_000, 413, "larger than the limit of 0.0954 MB"),
        ("cut", 415, "cannot be read as a video"),
        ("long", 413, "lasts 5 s; the limit is 3 s"),
    ],
)
def test_a_bad_upload_is_one_line_and_leaves_nothing(received, tmp_path, content, status, said):
    path = videos.write(tmp_path / "a.mp4", count=60, codec="libx264")
    if content == "long":
        content = path.read_bytes()
    elif content == "cut":
        content = path.read_bytes()[: path.stat().st_size // 2]
    for body in (
        content,
        iter([content[:100], content[100:]]),
    ):  # with a declared length, and without
        answer = put(client_of(received), body)
        assert answer.status_code == status and said in answer.json()["error"]
        assert str(received.directory) not in answer.text
        assert not waiting(received)


def test_uploads_of_other_sites_and_one_too_many_are_refused(received, tmp_path, monkeypatch):
    content = videos.write(tmp_path / "a.mp4", codec="libx264").read_bytes()
    client = client_of(received)
    assert client.post("/upload", content=content).status_code == 403
    for _ in range(uploads.MOST):
        assert put(client, content).status_code == 200
    answer = put(client, content)
    assert answer.status_code == 503 and "are already waiting" in answer.json()["error"]
    monkeypatch.setattr(uploads, "KEEP_SECONDS", 0.0)  # unused uploads expire
    assert put(client, content).status_code == 200
    assert len(waiting(received)) == 1


def test_uploads_are_gone_when_the_server_ends(model, library, tmp_path):
    content = videos.write(tmp_path / "a.mp4", codec="libx264").read_bytes()
    found = []
    take = uploads.Uploads.__init__

    def remember(self, *limits):
        take(self, *limits)
        found.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads.Uploads, "__init__", remember)
        page = served.open_page(model, library)
    with TestClient(page) as client:
        assert put(client, content).status_code == 200
        assert waiting(found[0])
    assert not found[0].directory.exists()


# Functions of the page


def test_a_search_tells_where_and_what_is_gone(finder):
    moments = finder.search("a red ball")
    assert len(moments) == served.CLIPS + 2
    assert all(m.probability is not None and m.start == 0 for m in moments)
    gone = [m for m in moments if m.gone]
    assert [m.name for m in gone] == ["vanished.mp4"] and "moved or deleted" in gone[0].gone
    card = fragments.result(1, gone[0])
    assert 'role="alert"' in card and "<video" not in card
    assert "1 of them cannot be shown" in fragments.summary(moments, "“a red ball”")
    card = fragments.result(2, next(m for m in moments if not m.gone))
    assert re.search(r'src="clip/\d+#t=0\.00,\d+\.\d\d"', card)


def test_a_clip_finds_itself_and_is_deleted(finder, received, library):
    path = sorted((library / "videos").glob("test-*.mp4"))[3]
    (received.directory / "x").write_bytes(path.read_bytes())
    received._waiting["t"] = uploads._Waiting(received.directory / "x", 0.0)
    moments = finder.search_clip("t")
    # The weights are random, so all clips are similar; only the same vector has distance zero.
    (own,) = [m for m in moments if m.name == path.name]
    assert own.score == max(m.score for m in moments) == pytest.approx(1, abs=1e-5)
    assert not waiting(received)


def test_looking_closer_shows_matches_in_colours(finder):
    moment = next(m for m in finder.search("a ball") if m.name.startswith("test-"))
    assert isinstance(finder.caption(moment), str)
    answers = finder.answer(moment, "what colour is it?")
    assert {a.text for a in answers} == set(served.ANSWERS)
    found = finder.explain(moment, "a red ball moves left")
    assert found.trajectories and found.actions
    shown = fragments.explanation(found)
    assert shown.count("data:image/jpeg") == 1 + len(found.actions)
    for i, trajectory in enumerate(found.trajectories):
        assert trajectory.name in shown and fragments.film.hex_colour(i) in shown


def test_what_is_typed_is_shown_as_text(finder):
    moment = next(m for m in finder.search("a ball") if m.name.startswith("test-"))
    evil = '<img src=x onerror="alert(1)">'
    shown = fragments.explanation(finder.explain(moment, f"ball {evil}"))
    assert "<img src=x" not in shown and "&lt;" in shown
    assert "<img" not in fragments.message(evil) and "<img" not in fragments.caption(evil)
    moment = Moment(0, f'{evil}".mp4', 0.0, 1.0)
    assert "<img" not in fragments.result(1, moment) + fragments.player(moment)


def test_a_video_that_vanishes_later_is_one_line(finder, library):
    moment = finder.search("a ball")[0]
    gone = next(m for m in finder.search("a ball") if m.gone)
    for call in (finder.caption, finder.frames, lambda m: finder.explain(m, "a ball")):
        with pytest.raises(UserError, match=r"vanished.mp4: the video was moved or deleted"):
            call(gone)
    for bad in ("", "   ", "x" * 501):
        with pytest.raises(UserError):
            finder.search(bad)
    assert str(library) not in moment.name


def test_messages_are_short_and_whole(finder):
    nothing = [Moment(0, "a.mp4", 0.0, 1.0, 0.2, 0.1, False)]
    assert "No match for" in fragments.summary(nothing, "“x”")
    one = [Moment(0, "a.mp4", 0.0, 1.0, 0.2, 0.9, True), *nothing, *nothing]
    said = fragments.summary(one, "“x”")
    assert "1 match for “x”, and 2 near moments below the threshold" in said
    unknown = [Moment(0, "a.mp4", 0.0, 1.0)] * 2
    assert "2 moments for “x”" in fragments.summary(unknown, "“x”")
    assert fragments.summary([], "“x”").count("library is empty") == 1
    assert fragments.clock(3723.4) == "1:02:03" and fragments.clock(59.6) == "1:00"
    assert fragments.span(Moment(0, "a", 0.0, 9.6)) == "0:00 to 0:10"
    assert fragments.span(Moment(0, "a", 0.0, 0.1)) == "0.0 s to 0.1 s"


# The example library and the command


def test_the_example_library_is_made_once_and_has_true_detections(model, library, tmp_path):
    again = example_library.open_library(model, library.parent, served.CLIPS)
    assert again == library and len(example_library.example_queries(library)) == 3
    rows = [json.loads(x) for x in (library / "detections.jsonl").read_text().splitlines()]
    from stoa_jax.data.synthetic import examples
    from stoa_jax.data.video import read_frames

    assert len(rows) == served.CLIPS * examples.FRAMES
    assert not list(library.parent.glob("*.part"))
    clip = examples.world().clip(2)
    frames, info = read_frames(library / "videos" / f"{clip.video_id}.mp4", 24, short_side=None)
    assert info.video.codec == "h264" and info.video.duration == pytest.approx(4.0)
    assert np.abs(np.stack(frames).astype(int) - clip.frames).mean() < 12
    boxes = [o["box"] for r in rows if r["video"] == clip.video_id for o in r["objects"]]
    assert len(boxes) == (clip.classes >= 0).sum()


def test_a_library_that_cannot_be_written_is_one_line(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .* --cache=DIR"):
        example_library.open_library(model, tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port=70000"], "--port: 70000"),
        (["--upload-mb=0"], "--upload-mb: 0"),
        (["--auth=me"], "USER:PASSWORD"),
        (["--library=/x"], "--library: name the index"),
        (["--index=/nowhere"], "/nowhere"),
        (["--index=/nowhere", "--model=/none"], "/none: no such file"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(options, said):
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    with pytest.raises(UserError, match=re.escape(said)):
        command.run(parser.parse_args(["serve", *options]))


def test_it_listens_to_this_machine_alone_unless_told_otherwise():
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    assert parser.parse_args(["serve"]).host == "127.0.0.1"
    from stoa_jax.serve import server

    with server.listen(parser.parse_args(["serve"]).host, 0) as socket:
        assert socket.getsockname()[0] == "127.0.0.1"


def test_a_port_in_use_is_one_line():
    from stoa_jax.serve import server

    with server.listen("127.0.0.1", 0) as socket:
        port = socket.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1, port {port}"):
            with server.listen("127.0.0.1", port):
                pass


def test_without_gradio_the_install_line_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'stoa-jax\[serve\]'"):
        app.require()


def test_the_commands_import_no_gradio_and_no_jax():
    code = (
        "import sys, stoa_jax.cli as c; c.parser(); import stoa_jax.serve.library; "
        "print([m for m in ('gradio', 'fastapi', 'jax', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]", done.stderr
