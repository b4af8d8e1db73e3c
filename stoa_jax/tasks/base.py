"""Base classes of the tasks and of their evaluators.

Shapes: B clips, T frames, K objects, L text positions.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stoa_jax import config as configuration
from stoa_jax import sharding
from stoa_jax.data import pipeline, records
from stoa_jax.data.order import Examples
from stoa_jax.data.sources import published
from stoa_jax.errors import UserError
from stoa_jax.inference.sidecars import Calibration
from stoa_jax.joint_loss import alignment_loss, encode_video, joint_loss
from stoa_jax.models.clip import MEAN
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.features import TextFeatures, VideoFeatures
from stoa_jax.models.stoa import Stoa
from stoa_jax.text import Tokenizer
from stoa_jax.text.tagging import ADJ

__all__ = [
    "HEADS",
    "VARIANTS",
    "Row",
    "SplitEvaluator",
    "TaskBase",
    "ablate",
    "encode_video",
    "named",
]

HEADS = ("fusion/match", "fusion/lm_proj", "fusion/answer")
VARIANTS = ("single_frame", "text_only")
UNSEEN_BIAS = -30.0  # of words that must never be generated


@dataclasses.dataclass(frozen=True)
class Row:
    """One metric's value and how it was measured."""

    metric: str
    value: float | str  # a text where there is not a number, such as "needs Java"
    n: int  # number of queries, clips or questions in the average
    protocol: str


class TaskBase:
    """A task on one data set, trained by the joint loss.

    A subclass creates its evaluator, and overrides `loss` if it has its own.
    """

    name = ""
    kind: records.Kind = "caption"  # kind of its records
    answers: tuple[str, ...] = ()  # in the order of the answer head's classes

    def __init__(self, config: ConfigDict):
        self.config = config
        self.settings = config.loss.to_dict()

    def model_config(self) -> ModelConfig:
        """Return the model's configuration."""
        return configuration.model_config(self.config)

    def batch_spec(self, train: bool) -> pipeline.BatchSpec:
        """Describe batches in the model's sizes."""
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

    def loss(
        self, model: Stoa, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Compute the joint loss with the weights of the configuration."""
        return joint_loss(model, batch, key, self.settings, **self.loss_tables)

    @functools.cached_property
    def loss_tables(self) -> dict[str, Any]:
        """Return the arguments of the joint loss that depend on the training set's vocabulary."""
        self._check_adjectives()
        return {"words": self.words, "class_words": self.class_words}

    def _check_adjectives(self) -> None:
        """Raise UserError if `loss.adjective` would learn nothing."""
        if not (self.settings["adjective"] and self.model_config().trajectory_adjectives):
            return
        split = self.open_split(self.train_set, self.config.data.train_split)
        if not any((split.tokens(i)[1] == ADJ).any() for i in range(min(len(split), 200))):
            raise UserError(
                f"config.loss.adjective: no adjective is tagged in the texts of {self.train_set}; "
                "sets built before adjectives were tagged need a new build with --overwrite, or "
                "set loss.adjective=0"
            )

    @functools.cached_property
    def class_words(self) -> np.ndarray | None:
        """With `loss.match_names`, the last token id of each class name; -1: none."""
        if not self.settings["match_names"]:
            return None
        tokenizer = Tokenizer(self.model_config().vocab_size)
        names = self.open_split(self.train_set, self.config.data.train_split).class_names
        pieces = (
            [piece for word in tokenizer.pieces(name) for piece in word.ids] for name in names
        )
        return np.array([ids[-1] if ids else -1 for ids in pieces], np.int32)

    @functools.cached_property
    def words(self) -> np.ndarray | None:
        """With `loss.seen_words`, the ids in the training texts, sorted; None: the vocabulary."""
        if not self.settings["seen_words"]:
            return None
        vocab_size = self.model_config().vocab_size
        found = {vocab_size - 2, vocab_size - 1}  # start and end
        for name, _ in self.config.data.sets:
            split = self.open_split(name, self.config.data.train_split)
            for i in range(len(split)):
                found.update(np.unique(split.tokens(i, vocab_size=vocab_size)[0]).tolist())
        return np.array(sorted(found - {0}), np.int32)

    def prepare(self, params: dict[str, Array]) -> dict[str, Array]:
        """Change initial parameters: with `loss.seen_words`, unseen words are never generated."""
        if self.words is None:
            return params
        bias = params["fusion/lm_bias"]
        unseen = np.setdiff1d(np.arange(len(bias)), self.words)
        return {**params, "fusion/lm_bias": bias.at[unseen].set(UNSEEN_BIAS)}

    def add_alignment(
        self,
        loss: Array,
        model: Stoa,
        video: VideoFeatures,
        text: TextFeatures,
        batch: Mapping[str, Array],
        watch: dict[str, Array],
    ) -> Array:
        """Add OTA and ASP, if active, to a task's loss, and their metrics to `watch`."""
        alignment, metrics = alignment_loss(model, video, text, batch, self.settings)
        watch |= metrics
        return loss + alignment

    def make_evaluator(self) -> "SplitEvaluator":
        """Create the task's evaluator."""
        raise NotImplementedError

    @functools.cached_property
    def _evaluators(self) -> dict[str, "SplitEvaluator"]:
        evaluator = self.make_evaluator()
        return {evaluator.prefix: evaluator}

    def evaluators(self) -> dict[str, "SplitEvaluator"]:
        """Return the task's evaluator by name, the same object at every call."""
        return self._evaluators

    def extras(self) -> dict[str, Any]:
        """Return what a checkpoint records besides the model; by default nothing."""
        return {}

    def open_split(self, dataset: str, split: str) -> pipeline.Split:
        """Open a split of a built data set, or of the synthetic world if `data.live` is set."""
        if self.config.data.live:
            from stoa_jax.data.synthetic import live

            m = configuration.model_config(self.config)
            data = self.config.data
            sizes = data.world.to_dict(), m.frames, m.objects_per_frame
            return live.open_split(dataset, split, *sizes, data.live_dir)
        return pipeline.open_split(configuration.data_folder(self.config), dataset, split)

    @property
    def train_set(self) -> str:
        """Name of the first data set of the training mixture."""
        return self.config.data.sets[0][0]

    @property
    def eval_set(self) -> str:
        """Name of the data set for evaluation."""
        return self.config.data.eval_set or self.train_set

    @functools.cached_property
    def training(self) -> pipeline.Split | None:
        """The training split, for trivial baselines; None if it was not built."""
        try:
            return self.open_split(self.train_set, self.config.data.train_split)
        except UserError:
            return None


class SplitEvaluator:
    """Evaluation on one split: metrics by name for the train loop, complete rows for `evaluate`."""

    prefix = ""  # of metric names
    needs: tuple[str, ...] = ()  # names in `HEADS` without which nothing can be measured

    def __init__(self, task: TaskBase):
        self.task = task
        self.config = task.config
        # The model's outputs of the latest run, by row name and example.
        self.predictions: dict[str, dict[str, Any]] = {}
        self.untrained: tuple[str, ...] = ()  # heads that the weights lack
        self.calibration = Calibration()  # of the match head
        self._jitted: dict[tuple, Callable] = {}

    def leave_out(self, names: Sequence[str], source: str) -> None:
        """Drop the metrics that need parameters which the weights `source` lack."""
        heads = tuple(h for h in HEADS if any(name.startswith(h) for name in names))
        if set(heads) & set(self.needs):
            raise UserError(
                f"{self.task.name}: {source} brings no trained {heads[0]}; fine-tune it first, "
                f"or name a run's directory"
            )
        self.untrained = heads

    def rows(self, model: Stoa, mesh: Mesh) -> Iterator[Row]:
        """Yield all metrics."""
        raise NotImplementedError

    def __call__(self, model: Stoa, mesh: Mesh) -> Iterator[tuple[str, float]]:
        """Yield the numeric metrics; names are prefixed if the split is partial."""
        mark = "partial/" if self.partial else ""
        for row in self.rows(model, mesh):
            if not isinstance(row.value, str):
                yield mark + row.metric, float(row.value)

    @property
    def split_name(self) -> str:
        """The split's name, `dataset:split`."""
        return f"{self.task.eval_set}:{self.config.data.eval_split}"

    @functools.cached_property
    def split(self) -> pipeline.Split:
        """The split that is evaluated."""
        return self.task.open_split(self.task.eval_set, self.config.data.eval_split)

    @functools.cached_property
    def missing(self) -> int:
        """Number of clips of the published split that were not built."""
        clips, _ = published(self.task.eval_set, self.config.data.eval_split)
        return max(0, (clips or 0) - len(self.split))

    @property
    def limit(self) -> int:
        """Maximum number of examples to evaluate; 0 for all."""
        return self.config.eval.max_examples

    @functools.cached_property
    def examples(self) -> Examples:
        """The examples of the whole split, as the loader counts them."""
        return Examples(self.split, by_item=self.task.kind != "caption")

    @functools.cached_property
    def full(self) -> int:
        """Number of examples in the whole split: clips, questions or choices."""
        return len(self.examples)

    @functools.cached_property
    def partial(self) -> bool:
        """Whether only a part of the published split is evaluated."""
        return bool(self.missing) or 0 < self.limit < self.full

    @functools.cached_property
    def ids(self) -> list[str]:
        """Ids of the evaluated clips; the index distinguishes clips of one video."""
        n = min(self.limit or len(self.split), len(self.split))
        ids = [self.split.metadata(i).video_id for i in range(n)]
        if len(set(ids)) < n:
            ids = [f"{name}#{i}" for i, name in enumerate(ids)]
        return ids

    @functools.cached_property
    def owners(self) -> np.ndarray:
        """Index of the clip of each evaluated example, in the loader's order."""
        return self.examples.clips[: self.limit or None]

    def loader(self, *, texts: bool = True) -> pipeline.Loader:
        """Open one pass over the split in order: the examples without pixels, or each clip once."""
        c = self.config
        spec = dataclasses.replace(self.task.batch_spec(train=False), texts=texts, pixels=not texts)
        return pipeline.Loader(
            self.split,
            spec,
            batch_size=c.eval.batch_size,
            seed=c.seed,
            train=False,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=c.data.workers,
            prefetch=c.data.prefetch,
            cache="auto" if c.data.cache == "device" else c.data.cache,
            max_examples=self.limit if texts else int(self.owners[-1]) + 1,
        )

    def encode(
        self,
        model: Stoa,
        mesh: Mesh,
        variant: str = "",
        keep: Callable[[VideoFeatures], Any] = lambda video: video,
    ) -> Any:
        """Encode every clip of the split once; return what `keep` takes of the features.

        An evaluation may ask many questions about each clip.
        """
        encode, ablated = _encoder(mesh), _ABLATIONS[variant]

        def found(rows: Mapping[str, np.ndarray]) -> Any:
            batch = sharding.to_devices(rows, mesh, self.config.eval.batch_size)
            return keep(encode(model, ablated(batch)))

        loader = self.loader(texts=False)
        return stacked(map(found, loader), loader.num_examples)

    def run(self, function: Callable, model: Stoa, mesh: Mesh, video: VideoFeatures) -> Any:
        """Apply `function(model, batch, video)` to every example of the split.

        `video` holds the features of the clips, as `encode` returns them; the function gets those
        of its batch. It is pure and returns arrays with the batch axis first.
        """
        jitted, size = self.jit(function, mesh), self.config.eval.batch_size

        def found(rows: Mapping[str, np.ndarray]) -> Any:
            owners = self.owners[rows["index"]]  # of a padding row: any
            own = {name: x[owners] for name, x in video._asdict().items()}
            batch = sharding.to_devices(rows, mesh, size)
            return jitted(model, batch, VideoFeatures(**sharding.to_devices(own, mesh, size)))

        loader = self.loader()
        return stacked(map(found, loader), loader.num_examples)

    def jit(self, function: Callable, mesh: Mesh) -> Callable:
        """Compile `function` for the mesh once, with its results on every device."""
        key = (function, mesh)
        if key not in self._jitted:
            self._jitted[key] = jax.jit(function, out_shardings=sharding.replicated(mesh))
        return self._jitted[key]

    @property
    def variants(self) -> tuple[str, ...]:
        """The ablations to evaluate: none first, then those of the configuration."""
        for name in self.config.eval.variants:
            if name not in VARIANTS:
                raise UserError(
                    f"config.eval.variants: no variant {name!r}; there are {', '.join(VARIANTS)}"
                )
        return ("", *self.config.eval.variants)


def stacked(results: Iterable[Any], count: int) -> Any:
    """Stack the first `count` rows of trees of arrays on the host.

    Each is copied, which waits for it, only after the next one has started.
    """
    found: list[Any] = []
    for result in results:
        found.append(result)
        if len(found) > 1:
            found[-2] = jax.tree.map(np.asarray, found[-2])
    return jax.tree.map(lambda *x: np.concatenate([np.asarray(y) for y in x])[:count], *found)


@functools.cache
def _encoder(mesh: Mesh) -> Callable[[Stoa, Mapping[str, Array]], VideoFeatures]:
    """Compile `encode_video` once for all evaluators, with its results on every device."""
    return jax.jit(encode_video, out_shardings=sharding.replicated(mesh))


def ablate(batch: Mapping[str, Array], variant: str) -> dict[str, Array]:
    """Reduce a batch to a variant's input: everything, only the middle frame, or only the text."""
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


# Separate from the encoder, which then compiles once for all variants.
_ABLATIONS = {name: jax.jit(functools.partial(ablate, variant=name)) for name in ("", *VARIANTS)}


def percent(right: Sequence[bool] | np.ndarray) -> float:
    """Return the percentage of true values."""
    return 100 * float(np.mean(np.asarray(right, bool)))


def named(*parts: str) -> str:
    """Join the non-empty parts of a metric's name."""
    return "/".join(part for part in parts if part)
