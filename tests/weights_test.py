import dataclasses
import json
import pickle
import re
import struct
import sys
import zipfile

import jax
import numpy as np
import pytest
import released_example as example
from clip_files import openai_tensors, write_torchscript
from clip_tiny import FOLDER, pixels, tokens
from flax import nnx
from safetensors.numpy import load_file, save_file

from stoa_jax import weights
from stoa_jax.errors import UserError
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.layers import run_blocks
from stoa_jax.models.parameters import with_parameters
from stoa_jax.models.stoa import Stoa
from stoa_jax.weights import clip, released
from stoa_jax.weights.files import open_tensors
from stoa_jax.weights.tables import Report, write_table


@pytest.fixture(scope="module")
def tiny():
    c, _ = weights.config_of(FOLDER)
    params, report = weights.initial_parameters(FOLDER, c)
    return c, params, report


def _model(c, params):
    new, _ = weights.whole_parameters(FOLDER, c)
    abstract = jax.eval_shape(lambda: Stoa(c, rngs=nnx.Rngs(0)))
    return with_parameters(abstract, {**new, **params})


def test_features_are_those_of_transformers(tiny):
    c, params, _ = tiny
    golden = json.loads((FOLDER / "features.json").read_text())

    @jax.jit
    def run(model, pixels, tokens):
        first = run_blocks(model.visual.blocks, model.visual.embed(pixels), stop=1)
        return model.visual(pixels)[0], model.encode_text(tokens).sep, first[0]

    found = run(_model(c, params), pixels(), tokens())
    for x, name in zip(found, ("image", "text", "layer"), strict=True):
        np.testing.assert_allclose(x, golden[name], atol=1e-5, err_msg=name)


def test_every_tensor_and_every_parameter_is_accounted_for(tiny):
    c, params, report = tiny
    there = load_file(FOLDER / "model.safetensors")
    assert set(report.used) | set(report.unused) == set(there)
    assert set(params) | set(report.new) == set(weights.parameter_shapes(c))
    assert set(params) == set(report.used.values()) | set(report.copied)
    assert "text/mask_embedding" in report.new and "fusion/lm_proj" in report.new
    assert all(x.dtype == np.float32 for x in params.values())


def test_what_starts_from_clip(tiny):
    c, params, _ = tiny
    np.testing.assert_array_equal(
        params["trajectory/blocks/mlp/up/kernel"], params["visual/blocks/mlp/up/kernel"][-2:]
    )
    np.testing.assert_array_equal(params["action/proj"], params["visual/proj"])
    np.testing.assert_array_equal(
        params["fusion/blocks/ln_1/scale"], params["text/blocks/ln_1/scale"][: c.fusion_depth]
    )
    np.testing.assert_array_equal(params["fusion/positions"], params["text/positions"])


def test_what_is_initialised_may_be_missing_or_of_another_shape(tmp_path):
    """A model with objects starts from one without; fusion has more positions then."""
    whole = dataclasses.replace(ModelConfig.tiny(), vocab_size=1024)
    base = dataclasses.replace(whole, objects=False, actions=False)
    shapes = weights.parameter_shapes(base)
    params = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    note = {weights.METADATA: json.dumps(dataclasses.asdict(base))}
    path = tmp_path / "base.safetensors"
    save_file(params, path, note)
    with pytest.raises(UserError, match="missing action/"):
        weights.initial_parameters(path, whole)
    new = r"^(regions|trajectory|action)/|^fusion/more_positions"
    got, report = weights.initial_parameters(path, whole, reinit=new)
    assert set(report.new) == {n for n in weights.parameter_shapes(whole) if re.search(new, n)}
    assert set(got) == set(shapes) - {"fusion/more_positions"}
    assert report.unused == {"fusion/more_positions": "initialised: config.init.reinit matches it"}


def test_open_clip_and_hugging_face_hold_the_same(tmp_path, tiny):
    c, params, _ = tiny
    tensors, _ = openai_tensors()
    save_file(
        {**tensors, "attn_mask": np.zeros((16, 16))}, tmp_path / "open_clip_quickgelu.safetensors"
    )
    got, report = weights.initial_parameters(tmp_path / "open_clip_quickgelu.safetensors", c)
    assert report.unused == {"attn_mask": "the causal mask, a constant"}
    assert set(got) == set(params)
    for name in params:
        np.testing.assert_array_equal(got[name], params[name], err_msg=name)


def test_shards_are_one_model(tmp_path, tiny):
    c, params, _ = tiny
    there = load_file(FOLDER / "model.safetensors")
    names = sorted(there)
    parts = {"a.safetensors": names[:40], "b.safetensors": names[40:]}
    for file, some in parts.items():
        save_file({n: there[n] for n in some}, tmp_path / file)
    index = {"weight_map": {n: file for file, some in parts.items() for n in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((FOLDER / "config.json").read_text())
    got, _ = weights.initial_parameters(tmp_path, c)
    np.testing.assert_array_equal(got["visual/proj"], params["visual/proj"])
    index["weight_map"][names[0]] = "../a.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"outside the directory"):
        weights.initial_parameters(tmp_path, c)


def test_positions_are_resized_and_vocabulary_cut(tiny):
    import dataclasses

    c, params, _ = tiny
    other = dataclasses.replace(c, image_size=24, text_positions=20, text_length=16)
    got, report = weights.initial_parameters(FOLDER, other)
    assert set(report.resized) == {"visual/positions", "text/positions"}
    assert got["visual/positions"].shape == (37, 24) and got["text/positions"].shape == (20, 24)
    np.testing.assert_array_equal(got["visual/positions"][0], params["visual/positions"][0])
    fewer, _ = weights.initial_parameters(
        FOLDER, dataclasses.replace(c, text_positions=12, text_length=12)
    )
    np.testing.assert_array_equal(fewer["text/positions"], params["text/positions"][:12])
    table = np.arange(2000.0 * 3, dtype=np.float32).reshape(2000, 3)
    cut = clip.cut_vocabulary(table, (1500, 3))
    np.testing.assert_array_equal(cut[:1498], table[:1498])
    np.testing.assert_array_equal(cut[-2:], table[-2:])


def test_cubic_weights():
    w = clip.cubic_matrix(7, 12)
    np.testing.assert_allclose(w.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(clip.cubic_matrix(7, 7), np.eye(7), atol=1e-12)
    half = [-0.09375 + 0.59375, 0.59375, -0.09375, 0]  # torch's cubic, half way between two
    np.testing.assert_allclose(clip.cubic_matrix(4, 2), [half, half[::-1]])


def _save(path, tensors):
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text((FOLDER / "config.json").read_text())
    return path


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("text_projection.weight"), "missing text_projection.weight"),
        (lambda t: t.update(odd=np.zeros(3)), "unexpected odd"),
        (
            lambda t: t.update({"text_projection.weight": np.zeros((24, 25), np.float32)}),
            r"tensor text_projection.weight is \[24, 25\].*text/proj needs \[24, 24\]",
        ),
        (
            lambda t: t.update({"text_projection.weight": np.full((24, 24), np.nan, np.float32)}),
            "text_projection.weight holds values that are not finite",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, tiny, change, message):
    tensors = load_file(FOLDER / "model.safetensors")
    change(tensors)
    with pytest.raises(UserError, match=message) as caught:
        weights.initial_parameters(_save(tmp_path, tensors), tiny[0])
    assert str(tmp_path) in str(caught.value)


@pytest.fixture(scope="module")
def files_of_every_kind():
    """Return {kind: (tensors, those that determine the model's sizes)}."""
    there = write_table(released.TABLE, example.parameters(example.TINY.released()))
    names = {e.ours: e.theirs[0] for e in clip.HUGGING_FACE}
    sizes = ("visual/patch/kernel", "visual/positions", "text/token_embedding", "text/positions")
    ours = {e.ours: e.theirs[0] for e in clip.OPENAI}
    return {
        "hugging_face": (
            load_file(FOLDER / "model.safetensors"),
            [names[s] for s in (*sizes, "visual/proj")],
        ),
        "open_clip": (openai_tensors()[0], [ours[s] for s in (*sizes, "visual/proj")]),
        "released": (there, [f"clip.{ours[s]}" for s in sizes] + ["clip.object_action"]),
    }


@pytest.mark.parametrize("kind", ["hugging_face", "open_clip", "released"])
def test_tensors_that_cannot_tell_a_size(tmp_path, files_of_every_kind, kind):
    tensors, sizes = files_of_every_kind[kind]
    path = tmp_path / "x_quickgelu.safetensors"
    for name in sizes:
        x = tensors[name]
        for odd in (np.zeros((), np.float32), x.reshape(-1), x[None], x[:0]):
            save_file({**tensors, name: np.array(odd)}, path)
            with pytest.raises(UserError, match=f"{path}: tensor {name} is ") as caught:
                weights.config_of(path)
            assert str(list(odd.shape)) in str(caught.value)
        save_file({n: y for n, y in tensors.items() if n != name}, path)
        with pytest.raises(UserError, match=f"{path}: tensor {name} is missing"):
            weights.config_of(path)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_positions_of_no_grid(tmp_path, rows):
    tensors, _ = openai_tensors()
    tensors["visual.positional_embedding"] = np.zeros((rows, 24), np.float32)
    path = tmp_path / "x_quickgelu.safetensors"
    save_file(tensors, path)
    c, _ = weights.config_of(path)
    with pytest.raises(UserError, match=f"{path}: tensor visual.positional_embedding: .*resized"):
        weights.initial_parameters(path, c)


def test_the_activation_that_a_file_or_its_name_tells(tmp_path):
    tensors, _ = openai_tensors()
    for name, note, activation in (
        ("open_clip_model", None, "gelu"),
        ("ViT-B-32-quickgelu-laion400m", None, "quick_gelu"),
        ("unnamed", {"model_cfg": {"quick_gelu": True}}, "quick_gelu"),
        ("unnamed", {"model_cfg": {}}, "gelu"),
        ("nothing", None, "quick_gelu"),  # the report says that it was assumed
    ):
        (tmp_path / "open_clip_config.json").unlink(missing_ok=True)
        if note is not None:
            (tmp_path / "open_clip_config.json").write_text(json.dumps(note))
        save_file(tensors, tmp_path / f"{name}.safetensors")
        c, kind = weights.config_of(tmp_path / f"{name}.safetensors")
        assert (c.activation, kind) == (activation, "open_clip"), name
    _, report = weights.initial_parameters(tmp_path / "nothing.safetensors", c)
    assert "the file does not state its activation" in report.notes[0]


def test_another_size_of_model():
    with pytest.raises(UserError, match=r"missing .*layers.*unexpected|needs"):
        weights.initial_parameters(FOLDER, ModelConfig.base())


def test_another_activation(tiny):
    import dataclasses

    with pytest.raises(UserError, match="trained with quick_gelu, the model has gelu"):
        weights.initial_parameters(FOLDER, dataclasses.replace(tiny[0], activation="gelu"))


@pytest.mark.parametrize("keep", [0, 5, 500, -10])
def test_truncated_safetensors(tmp_path, tiny, keep):
    whole = (FOLDER / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(UserError, match=r"model.safetensors.*(empty|truncated|damaged)"):
        weights.initial_parameters(tmp_path, tiny[0])


def test_safetensors_that_lie(tmp_path, tiny):
    header = json.dumps({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    with pytest.raises(UserError, match="tensor x has 4 bytes"):
        weights.initial_parameters(tmp_path / "x.safetensors", tiny[0])


def test_nothing_is_there(tmp_path, tiny):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            weights.initial_parameters(path, tiny[0])
    save_file({"a": np.zeros(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="unknown kind of weights"):
        weights.initial_parameters(tmp_path / "odd.safetensors", tiny[0])


# TorchScript archives written in torch.jit's format, so that torch is not needed.


class _Module:
    def __init__(self, **state):
        self.state = state


class _Storage:
    def __init__(self, key, array):
        self.key, self.array = key, array


def test_torchscript_archive_without_torch(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    c, params, _ = tiny
    tensors, _ = openai_tensors()
    path = tmp_path / "ViT-B-16.pt"
    write_torchscript(path, {**tensors, "input_resolution": np.float16(16)})
    assert open_tensors(path).torchscript
    got, report = weights.initial_parameters(path, c)
    assert report.unused == {"input_resolution": "a size, known from the shapes"}
    for name in params:
        np.testing.assert_array_equal(got[name], params[name], err_msg=name)


def test_pickle_that_wants_to_run_code(tmp_path):
    flag = tmp_path / "ran"
    evil = f"cposix\nsystem\n(S'touch {flag}'\ntR".encode()
    write_torchscript(tmp_path / "evil.pt", {}, evil=evil)
    with pytest.raises(UserError, match=r"evil.pt: its pickle refers to posix.system"):
        open_tensors(tmp_path / "evil.pt")
    assert not flag.exists()


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "clip/../../evil", "..\\evil"])
def test_archive_that_climbs_out(tmp_path, name):
    write_torchscript(tmp_path / "x.pt", {"visual.proj": np.zeros((2, 2))}, members=[name])
    with pytest.raises(UserError, match="points outside the archive"):
        open_tensors(tmp_path / "x.pt")


def test_truncated_archive(tmp_path):
    write_torchscript(tmp_path / "x.pt", {"visual.proj": np.zeros((20, 20))})
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"x.pt: damaged or truncated"):
        open_tensors(tmp_path / "x.pt")


def test_torch_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with zipfile.ZipFile(tmp_path / "plain.pt", "w") as archive:
        archive.writestr("plain/data.pkl", pickle.dumps({}))
    with pytest.raises(UserError, match=r"pip install .*torch==2.13.0"):
        open_tensors(tmp_path / "plain.pt")


def test_report_names_everything(tiny):
    said = str(tiny[2])
    assert "new text/mask_embedding [24]" in said
    assert "copied trajectory/proj from visual/proj" in said
    assert isinstance(tiny[2], Report)
