import subprocess
import sys
import textwrap

import numpy as np
import pytest
from clip_tiny import FOLDER

import stoa_jax
from stoa_jax.convert import convert
from stoa_jax.errors import UserError


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "clip"
    convert(FOLDER, out, "export")
    return out


def test_the_same_vectors(exported):
    model, export = stoa_jax.load(FOLDER), stoa_jax.load(exported)
    rng = np.random.RandomState(0)
    clips = [rng.randint(0, 256, (n, 16, 16, 3)).astype(np.uint8) for n in (1, 4, 9)]
    np.testing.assert_allclose(export.encode_video(clips), model.encode_video(clips), atol=1e-5)
    texts = ["a dog runs", "two cats"]
    np.testing.assert_allclose(export.encode_text(texts), model.encode_text(texts), atol=1e-5)
    assert export.kind == "export"


def test_without_our_package(exported, tmp_path):
    code = f"""
        import sys
        sys.modules["stoa_jax"] = None  # importing it fails
        sys.modules["flax"] = None
        import jax, jax.export, numpy as np
        params = dict(np.load("{exported}/weights.npz"))
        for name, shape, kind in (
            ("encode_video", (4, 16, 16, 3), np.uint8), ("encode_text", (16,), np.int32)
        ):
            program = jax.export.deserialize(open(f"{exported}/{{name}}.bin", "rb").read())
            assert set(program.platforms) == {{"cpu", "cuda", "tpu"}}, program.platforms
            for b in (1, 3):
                x = program.call(params, np.ones((b, *shape), kind))
                assert x.shape == (b, 24) and x.dtype == np.float32
                assert np.allclose(np.linalg.norm(x, axis=-1), 1, atol=1e-4)
        print("fine")
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.stdout.strip() == "fine", ran.stderr[-2000:]


def test_damaged(exported, tmp_path):
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(exported, folder)
    (folder / "weights.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="damaged export"):
        stoa_jax.load(folder)
