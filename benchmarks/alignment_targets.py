"""Compare what ASP and OTA teach when they regress toward different targets.

    python -m benchmarks.alignment_targets --checkpoint=synthetic

For each setting, new action or trajectory encoders are trained by one alignment loss alone, on the
frozen towers of a checkpoint. Then a ridge probe predicts the first of 15 motions of held-out clips
from their tokens, as in `benchmarks.probe`. The settings are the weight of pairs with Ø, the target
(a word's feature in its sentence, or of the word alone), and the number of action tokens.

Clips are rendered live. L text positions, A action tokens.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import stoa_jax
from benchmarks import probing
from stoa_jax import config, joint_loss
from stoa_jax.data.synthetic.scene import MOTIONS
from stoa_jax.models.features import VisionFeatures
from stoa_jax.models.parameters import named_parameters, with_parameters
from stoa_jax.models.stoa import Stoa

NONE_WEIGHTS, ACTIONS = (1.0, 0.1), (1, 4, 8)
Targets = Literal["sentence", "alone"]
TARGETS: tuple[Targets, ...] = ("sentence", "alone")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to train: a loss, its options, and the number of action tokens."""

    loss: str  # asp, ota
    none_weight: float
    target: Targets
    actions: int

    def __str__(self) -> str:
        size = f" | {self.actions}" if self.loss == "asp" else " | –"
        return f"{self.loss.upper()} | {self.none_weight} | {self.target}{size}"


def settings() -> Iterator[Setting]:
    """Yield all settings."""
    for none_weight, target, actions in itertools.product(NONE_WEIGHTS, TARGETS, ACTIONS):
        yield Setting("asp", none_weight, target, actions)
    for none_weight, target in itertools.product(NONE_WEIGHTS, TARGETS):
        yield Setting("ota", none_weight, target, ACTIONS[0])


def resized(model: Stoa, actions: int, target: Targets) -> Stoa:
    """Return the model with other actions and alignment target; what depends on them is zero."""
    c = dataclasses.replace(model.config, action_tokens=actions, alignment_target=target)
    abstract = jax.eval_shape(lambda: Stoa(c, rngs=nnx.Rngs(0)))
    before = named_parameters(model)
    return with_parameters(
        abstract,
        {
            name: before[name] if before[name].shape == x.shape else jnp.zeros(x.shape, x.dtype)
            for name, x in named_parameters(abstract).items()
        },
    )


def trained(
    model: Stoa,
    setting: Setting,
    clips: probing.Clips,
    texts: tuple[np.ndarray, np.ndarray],
    steps: int,
    seed: int,
) -> Stoa:
    """Return the model with encoders trained by the setting's loss alone."""
    options = config.default().loss.to_dict()
    options |= {"none_weight": setting.none_weight}
    params = named_parameters(model)
    learned = {n: x for n, x in params.items() if n.split("/")[0] in probing.ENCODERS}
    fixed = {n: x for n, x in params.items() if n not in learned}
    optimizer = optax.adam(
        optax.warmup_cosine_decay_schedule(0, probing.RATE, steps // 20 + 1, steps)
    )
    valid = jnp.ones(probing.TRAIN_BATCH, bool)

    def loss(learned: dict, seen: VisionFeatures, objects: tuple, tokens, tags) -> jax.Array:
        whole = with_parameters(model, {**fixed, **learned})
        batch = {"tokens": tokens, "tags": tags, "valid": valid}
        video, text = whole.encode_objects(seen, *objects), whole.encode_text(tokens)
        found = joint_loss.align(whole, video, text, batch, options, {setting.loss})
        return found[setting.loss].loss

    def batches() -> Iterator[tuple]:
        rng = np.random.default_rng(seed)
        tokens, tags = texts
        for _ in range(steps):
            rows = rng.choice(len(tokens), probing.TRAIN_BATCH)
            which = rng.integers(tokens.shape[1], size=len(rows))
            yield *clips.batch(rows), tokens[rows, which], tags[rows, which]

    after = probing.last(probing.updates(learned, loss, batches(), optimizer))
    return with_parameters(model, {**fixed, **after})


def accuracy(model: Stoa, kind: str, train: probing.Clips, test: probing.Clips) -> str:
    """Return the probe's accuracy on one kind of token, as text."""
    of_train, of_test = (probing.collected(model, clips)[kind] for clips in (train, test))
    predicted = probing.scores(of_train, np.eye(len(MOTIONS))[train.motions], of_test).argmax(1)
    return probing.percent(predicted == test.motions)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one row for each setting as it comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    probing.add_arguments(parser)
    parser.add_argument("--steps", type=int, default=500, help="training steps of each setting")
    args = parser.parse_args(argv)
    began = time.monotonic()
    network = stoa_jax.load(args.checkpoint).whole
    if network is None or not (network.config.objects and network.config.actions):
        parser.error(f"--checkpoint: {args.checkpoint} has no trajectory and action encoders")
    train, test = (
        probing.draw(network, split, count, args.max_objects)
        for split, count in (("train", args.train), ("test", args.test))
    )
    texts = probing.captions(network, train)
    print("| loss | weight of Ø | target | A | untrained, % | trained, % |\n|" + 6 * "---|")
    for setting in settings():
        fresh = probing.untrained(resized(network, setting.actions, setting.target), args.seed)
        kind = "actions" if setting.loss == "asp" else "trajectories"
        before = accuracy(fresh, kind, train, test)
        after = trained(fresh, setting, train, texts, args.steps, args.seed)
        print(f"| {setting} | {before} | {accuracy(after, kind, train, test)} |", flush=True)
    print(f"\n{args.train} clips, {args.test} held out; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
