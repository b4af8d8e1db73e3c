"""Every CLIP size against transformers, and files written by torch. Needs the torch extra."""

import dataclasses
import gc
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_tiny import FOLDER

from stoa_jax import weights
from stoa_jax.errors import UserError
from stoa_jax.inference.loading import clip_towers
from stoa_jax.models.clip import MEAN, STD
from stoa_jax.models.layers import block_slice
from stoa_jax.weights import clip
from stoa_jax.weights.files import open_tensors
from stoa_jax.weights.tables import write_table

pytestmark = pytest.mark.torch

SIZES = {  # patch, image, vision width, layers, heads; text width, heads
    "B/32": (32, 224, 768, 12, 12, 512, 8),
    "B/16": (16, 224, 768, 12, 12, 512, 8),
    "L/14": (14, 224, 1024, 24, 16, 768, 12),
    "L/14@336": (14, 336, 1024, 24, 16, 768, 12),
}


def _random_clip(folder, size, act="quick_gelu"):
    import torch
    from transformers import CLIPConfig, CLIPModel

    patch, image, width, layers, heads, text_width, text_heads = SIZES[size]
    torch.manual_seed(0)
    config = CLIPConfig(
        projection_dim=text_width,
        text_config=dict(
            hidden_size=text_width, intermediate_size=4 * text_width,
            num_attention_heads=text_heads, num_hidden_layers=12,
            projection_dim=text_width, hidden_act=act, bos_token_id=49406,
            eos_token_id=49407,
        ),
        vision_config=dict(
            hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads,
            num_hidden_layers=layers, image_size=image, patch_size=patch,
            projection_dim=text_width, hidden_act=act,
        ),
    )  # fmt: skip
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("size, act", [*((s, "quick_gelu") for s in SIZES), ("B/32", "gelu")])
def test_features_and_layers(tmp_path, size, act):
    import torch

    theirs = _random_clip(tmp_path, size, act)
    c, kind = weights.config_of(tmp_path)
    assert (kind, c.activation) == ("hugging_face", act)
    ours, report = clip_towers(tmp_path, clip.vision_and_text(c))
    assert not report.unused and not report.new
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (2, c.image_size, c.image_size, 3)).astype(np.uint8)
    x = ((pixels / 255.0 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    tokens = np.zeros((2, 77), np.int32)
    for row, n in zip(tokens, (5, 40), strict=True):
        row[: n + 2] = [49406, *rng.randint(1, 49405, n), 49407]
    with torch.no_grad():
        image = theirs.vision_model(
            torch.from_numpy(x.astype(np.float32)), output_hidden_states=True
        )
        text = theirs.text_model(torch.from_numpy(tokens).long(), output_hidden_states=True)
        features = theirs.visual_projection(image.pooler_output).numpy()
        words = theirs.text_projection(text.pooler_output).numpy()
    del theirs
    gc.collect()
    frames, _ = jax.jit(lambda m, p: m.visual(p))(ours, pixels)
    np.testing.assert_allclose(frames, features, atol=1e-4)
    ends = tokens.argmax(-1)
    got = jax.jit(lambda m, t: m.text(t))(ours, tokens)[jnp.arange(2), ends]
    np.testing.assert_allclose(got, words, atol=1e-4)
    run = jax.jit(lambda block, x, mask: block(x, mask))
    causal = jnp.tril(jnp.ones((1, 77, 77), bool))
    for tower, states, mask in (
        (ours.visual.blocks, image.hidden_states, None),
        (ours.text.blocks, text.hidden_states, causal),
    ):
        for i, (before, after) in enumerate(itertools.pairwise(states)):
            y = run(block_slice(tower, i), jnp.asarray(before.numpy()), mask)
            np.testing.assert_allclose(y, after.numpy(), atol=1e-5, err_msg=f"layer {i}")


def test_the_golden_is_what_transformers_computes(tmp_path, monkeypatch):
    import json

    import clip_tiny

    monkeypatch.setattr(clip_tiny, "FOLDER", tmp_path)
    clip_tiny.main()
    for name, x in json.loads((FOLDER / "features.json").read_text()).items():
        again = json.loads((tmp_path / "features.json").read_text())[name]
        np.testing.assert_allclose(again, x, atol=1e-5)


def test_resizing_is_torchs():
    import torch

    x = np.random.RandomState(0).standard_normal((50, 8)).astype(np.float32)
    for to in (5, 9, 14):
        grid = torch.from_numpy(x[1:].reshape(1, 7, 7, 8)).permute(0, 3, 1, 2)
        there = torch.nn.functional.interpolate(grid, (to, to), mode="bicubic", align_corners=False)
        there = there.permute(0, 2, 3, 1).reshape(-1, 8).numpy()
        np.testing.assert_allclose(clip.resize_grid(x, (to * to + 1, 8))[1:], there, atol=1e-5)


def _towers():
    c, _ = weights.config_of(FOLDER)
    params, _ = weights.initial_parameters(FOLDER, c)
    return c, params


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
@pytest.mark.parametrize("legacy", [False, True])
def test_state_dicts(tmp_path, wrap, legacy):
    import torch

    c, params = _towers()
    tensors = write_table(clip.OPENAI, params)
    state = {name: torch.from_numpy(np.array(x)).half() for name, x in tensors.items()}
    path = tmp_path / "openai.pt"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=not legacy)
    got, _ = weights.initial_parameters(path, c)
    for name, x in params.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_a_hugging_face_directory_of_bin(tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file

    c, params = _towers()
    torch.save(load_file(FOLDER / "model.safetensors"), tmp_path / "pytorch_model.bin")
    shutil.copy(FOLDER / "config.json", tmp_path)
    assert weights.config_of(tmp_path) == (c, "hugging_face")
    got, _ = weights.initial_parameters(tmp_path, c)
    for name, x in params.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_archive_that_torch_scripted(tmp_path):
    import torch

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(6, 4).half())
            self.register_buffer("part", torch.randn(8, 4).t()[1:3])

        def forward(self, x):
            return x

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()
            self.scale = torch.nn.Parameter(torch.tensor(3.0))

        def forward(self, x):
            return self.inner(x)

    scripted = torch.jit.script(Outer())
    scripted.save(str(tmp_path / "x.pt"))
    tensors = open_tensors(tmp_path / "x.pt")
    state = scripted.state_dict()
    assert set(tensors) == set(state)
    for name, x in state.items():
        np.testing.assert_array_equal(tensors.take(name), x.float().numpy(), err_msg=name)


def test_pickle_that_wants_to_run_code(tmp_path):
    import os

    import torch

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for legacy in (False, True):
        torch.save({"x": Evil()}, tmp_path / "e.pt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError, match=r"e\.pt: its pickle holds more than tensors"):
            open_tensors(tmp_path / "e.pt")
    assert not (tmp_path / "ran").exists()


def test_truncated_file(tmp_path):
    import torch

    torch.save({"x": torch.zeros(1000)}, tmp_path / "t.pt")
    whole = (tmp_path / "t.pt").read_bytes()
    (tmp_path / "t.pt").write_bytes(whole[:1500])
    with pytest.raises(UserError, match=r"t\.pt: damaged or truncated"):
        open_tensors(tmp_path / "t.pt")


def test_the_authors_file(tmp_path):
    import released_example as example
    import torch

    from stoa_jax.convert import convert
    from stoa_jax.weights.released import TABLE

    c = dataclasses.replace(example.TINY.released())
    tensors = write_table(TABLE, example.parameters(c))
    state = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
    torch.save({"model_state_dict": state, "global_step": 7}, tmp_path / "stoa.bin")
    convert(tmp_path / "stoa.bin", tmp_path / "ours.safetensors", "safetensors")
    convert(tmp_path / "ours.safetensors", tmp_path / "back.bin", "released")
    back = torch.load(tmp_path / "back.bin", weights_only=True)["model_state_dict"]
    assert set(back) == set(state) and all(torch.equal(back[n], state[n]) for n in state)
