"""Tasks small enough for tests: a model with few parameters, sets of random clips in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shipped_configs
import toy_source
from flax import nnx

from stoa_jax import sharding
from stoa_jax.data import builders, pipeline, split
from stoa_jax.metrics import coco
from stoa_jax.models.parameters import named_parameters, with_parameters
from stoa_jax.models.stoa import Stoa

SMALL = {
    "image_size": 16,
    "patch_size": 8,
    "frames": 3,
    "vision_width": 16,
    "vision_depth": 1,
    "vision_heads": 2,
    "vocab_size": 1024,
    "text_length": 12,
    "text_width": 16,
    "text_depth": 1,
    "text_heads": 2,
    "objects_per_frame": 2,
    "trajectories": 2,
    "action_tokens": 2,
    "trajectory_depth": 1,
    "trajectory_layers_run": 1,
    "action_depth": 1,
    "object_block": 1,
    "action_block": 1,
    "roi_size": 2,
    "fusion_depth": 1,
    "fusion_heads": 2,
    "scan_layers": False,
}

SETS = {
    "retrieval": "folder/captions",
    "captioning": "folder/captions",
    "qa": "synthetic/qa",
    "multiple_choice": "synthetic/multiple_choice",
}


class MemorySplit(pipeline.Split):
    """A split of generated clips in memory."""

    def __init__(self, name, part, count):
        kind = name.split("/")[1]
        kind = kind if kind in ("qa", "multiple_choice") else "caption"
        source = toy_source.Source({part: count}, kind)
        parse = builders.make_parse("none")
        self.dataset, self.split, self.directory = name, part, None
        self.frames, self.objects, self.class_names = 4, 3, source.class_names
        self._source = [
            builders.load_example(source, entry, toy_source.SETTINGS, parse).example
            for entry in source.splits[part]
        ]
        self._listed = [split.metadata_of(record) for record in self._source]
        self.fingerprint = split.fingerprint(self._listed)

    def __len__(self):
        return len(self._source)


@pytest.fixture(scope="module")
def data():
    """Open small sets of any name, with 9 clips for training and 11 for the test."""
    opened = functools.cache(
        lambda folder, name, part: MemorySplit(
            name, part, 5 if name.startswith("msvd") else {"train": 9, "test": 11}[part]
        )
    )
    patch = pytest.MonkeyPatch()
    patch.setattr(pipeline, "open_split", opened)
    yield "memory"
    patch.undo()


def configuration(data, task, **changes):
    c = shipped_configs.load(task).get_config("synthetic")
    c.model.update(SMALL)
    c.data.dir = data
    c.loss.matching = "scipy"  # compiles immediately
    c.data.sets = ((SETS[task], 1.0),)
    c.data.eval_split = "test"
    c.eval.batch_size = 8
    c.eval.rerank = 3
    c.eval.beam = 2
    c.eval.max_pieces = 5
    if task == "qa":
        c.model.num_answers = 4
    for key, value in changes.items():
        section, name = key.split("__")
        c[section][name] = value
    return c


def build(task, seed=0):
    """Build a model with random values everywhere, biases and heads too, without compiling."""
    rng = np.random.default_rng(seed)
    model = jax.eval_shape(lambda: Stoa(task.model_config(), rngs=nnx.Rngs(0)))
    named = named_parameters(model)
    values = {
        name: jnp.asarray(
            (1 if name.endswith("/scale") else 0) + 0.3 * rng.normal(size=p.shape), p.dtype
        )
        for name, p in named.items()
    }
    return with_parameters(model, values)


def one_mesh(c):
    return sharding.make_mesh(c, jax.devices()[:1])


@pytest.fixture(autouse=True, scope="module")
def no_java():
    """Replace the Java programs, which take seconds each and are compared elsewhere."""
    patch = pytest.MonkeyPatch()
    patch.setattr(coco, "package", lambda: None)
    yield
    patch.undo()


def figures(task, model, mesh):
    (evaluator,) = task.evaluators().values()
    return evaluator, {row.metric: row for row in evaluator.rows(model, mesh)}
