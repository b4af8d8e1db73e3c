"""What the tasks share: their part of the configuration, and evaluation over a split.

Shapes: B clips, T frames, K objects, L text places.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stoa_jax import config as configuration
from stoa_jax import sharding
from stoa_jax.data import pipeline
from stoa_jax.data.sources.counts import EXPECTED
from stoa_jax.errors import UserError
from stoa_jax.models.clip import MEAN
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.stoa import Stoa, VideoFeatures

HEADS = ("fusion/match", "fusion/lm_proj", "fusion/answer")
VARIANTS = ("single_frame", "text_only")


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure, and what it was counted on."""

    metric: str
    value: float | str  # a text where there is no number, "needs Java"
    n: int  # queries, clips or questions it averages over
    protocol: str


class TaskBase:
    """A task over one data set; subclasses bring the loss and the evaluators."""

    name = ""
    kind = "caption"  # of its records

    def __init__(self, config: ConfigDict):
        self.config = config
        self.settings = config.loss.to_dict()

    def model_config(self) -> ModelConfig:
        """The model of the configuration."""
        return configuration.model_config(self.config)

    def batch_spec(self, train: bool) -> pipeline.BatchSpec:
        """Captions in the model's sizes."""
        m = self.model_config()
        return pipeline.BatchSpec(
            kind=self.kind,
            frames=m.frames,
            image_size=m.image_size,
            objects=m.objects_per_frame,
            text_length=m.text_length,
            vocab_size=m.vocab_size,
            crop=self.config.data.crop if train else "center",
            flip=self.config.data.flip and train,
        )

    def extras(self) -> dict[str, Any]:
        """Nothing more than the model."""
        return {}

    def open_split(self, dataset: str, split: str) -> pipeline.Split:
        """A split of a built data set."""
        folder = self.config.data.dir or os.environ.get("STOA_DATA", "data")
        return pipeline.open_split(folder, dataset, split)

    @property
    def train_set(self) -> str:
        """The first set of the training mixture."""
        return self.config.data.sets[0][0]

    @property
    def eval_set(self) -> str:
        """The set that is evaluated on."""
        return self.config.data.eval_set or self.train_set

    @functools.cached_property
    def training(self) -> pipeline.Split | None:
        """The training split, which trivial answers are counted on; None if it was not built."""
        try:
            return self.open_split(self.train_set, self.config.data.train_split)
        except UserError:
            return None


class SplitEvaluator:
    """Evaluates on one split; the loop takes the numbers, `evaluate` the whole rows."""

    needs: tuple[str, ...] = ()  # of `HEADS`, those without which there is nothing to say

    def __init__(self, task: TaskBase):
        self.task = task
        self.config = task.config
        # What the model said, by row name and id, of the latest run.
        self.predictions: dict[str, dict[str, Any]] = {}
        self.untrained: tuple[str, ...] = ()  # heads that the weights do not bring
        self._jitted: dict[tuple, Callable] = {}

    def leave_out(self, names: Sequence[str], source: str) -> None:
        """Nothing is said with parameters, by name, that the weights of `source` lack."""
        heads = tuple(h for h in HEADS if any(name.startswith(h) for name in names))
        if set(heads) & set(self.needs):
            raise UserError(
                f"{self.task.name}: {source} brings no trained {heads[0]}; fine-tune it first, "
                f"or name a run's directory"
            )
        self.untrained = heads

    def rows(self, model: Stoa, mesh: Mesh) -> Iterator[Row]:
        """All figures."""
        raise NotImplementedError

    def __call__(self, model: Stoa, mesh: Mesh) -> Iterator[tuple[str, float]]:
        """The figures that are numbers; of a partial set their names say so."""
        mark = "partial/" if self.partial else ""
        for row in self.rows(model, mesh):
            if not isinstance(row.value, str):
                yield mark + row.metric, float(row.value)

    @property
    def split_name(self) -> str:
        """`dataset:split`."""
        return f"{self.task.eval_set}:{self.config.data.eval_split}"

    @functools.cached_property
    def split(self) -> pipeline.Split:
        """What is evaluated on."""
        return self.task.open_split(self.task.eval_set, self.config.data.eval_split)

    @functools.cached_property
    def missing(self) -> int:
        """Clips of the published split that were not built."""
        published = EXPECTED.get(self.task.eval_set, {}).get(self.config.data.eval_split, 0)
        return max(0, published - len(self.split))

    @property
    def limit(self) -> int:
        """Examples asked for at most; 0 for all."""
        return self.config.eval.max_examples

    @functools.cached_property
    def full(self) -> int:
        """Examples of the whole split: clips, questions or choices."""
        if self.task.kind == "caption":
            return len(self.split)
        return sum(len(self.split.metadata(i).answers) for i in range(len(self.split)))

    @functools.cached_property
    def partial(self) -> bool:
        """Is it less than the split as published?"""
        return bool(self.missing) or 0 < self.limit < self.full

    def loader(self) -> pipeline.Loader:
        """One pass over the split in order."""
        c = self.config
        return pipeline.Loader(
            self.split,
            self.task.batch_spec(train=False),
            batch_size=c.eval.batch_size,
            seed=c.seed,
            train=False,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=c.data.workers,
            prefetch=c.data.prefetch,
            max_examples=self.limit,
        )

    def run(
        self, function: Callable, model: Stoa, mesh: Mesh, variant: str = ""
    ) -> tuple[Any, np.ndarray | None]:
        """`function(model, batch)` over the split, stacked without padding rows; and the answers.

        The function is pure and gives arrays with the batch first. Every process gets all rows.
        """
        jitted, view = self.jit(function, mesh), _VIEWS[variant]
        loader = self.loader()
        results, answers = [], []
        for rows in loader:
            batch = sharding.to_devices(rows, mesh, self.config.eval.batch_size)
            # A transfer to the host, and so a wait, only after the next batch is under way.
            results.append(jitted(model, view(batch)))
            if len(results) > 1:
                results[-2] = jax.tree.map(np.asarray, results[-2])
            answers.append(batch.get("answer"))
        n = loader.num_examples
        stacked = jax.tree.map(lambda *x: np.concatenate([np.asarray(y) for y in x])[:n], *results)
        if answers[0] is None:
            return stacked, None
        gather = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
        return stacked, np.concatenate([np.asarray(gather(a)) for a in answers])[:n]

    def jit(self, function: Callable, mesh: Mesh) -> Callable:
        """`function` compiled for the mesh, its results on every device; compiled once."""
        key = (function, mesh)
        if key not in self._jitted:
            self._jitted[key] = jax.jit(function, out_shardings=sharding.replicated(mesh))
        return self._jitted[key]

    @property
    def variants(self) -> tuple[str, ...]:
        """The whole input, then what the configuration asks for beside it."""
        for name in self.config.eval.variants:
            if name not in VARIANTS:
                raise UserError(
                    f"config.eval.variants: no variant {name!r}; there are {', '.join(VARIANTS)}"
                )
        return ("", *self.config.eval.variants)


def look(batch: Mapping[str, Array], variant: str) -> dict[str, Array]:
    """The batch as a variant sees it: all, its middle frame only, or nothing but text."""
    batch = dict(batch)
    if variant == "single_frame":
        for name in ("pixels", "boxes", "classes", "scores"):
            x = batch[name]
            batch[name] = jnp.broadcast_to(x[:, x.shape[1] // 2][:, None], x.shape)
    elif variant == "text_only":
        grey = jnp.round(255 * jnp.array(MEAN)).astype(jnp.uint8)
        batch["pixels"] = jnp.broadcast_to(grey, batch["pixels"].shape)
        batch["classes"] = jnp.full_like(batch["classes"], -1)
    return batch


# Apart from what is evaluated, which so compiles once for all variants.
_VIEWS = {name: jax.jit(functools.partial(look, variant=name)) for name in ("", *VARIANTS)}


def encode_video(model: Stoa, batch: Mapping[str, Array]) -> VideoFeatures:
    """The video side of a batch."""
    return model.encode_video(batch["pixels"], batch["boxes"], batch["classes"], batch["scores"])


def named(*parts: str) -> str:
    """A metric's name from its parts, without the empty ones."""
    return "/".join(part for part in parts if part)
