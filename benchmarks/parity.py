"""Compare our losses and gradients with the twin's on equal weights, batch and random choices."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import setting
from stoa_jax import objectives
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.parameters import with_parameters
from stoa_jax.models.stoa import embed_text, embed_video


class Ours(NamedTuple):
    """One evaluation of our losses, and everything the twin needs to repeat it."""

    model: ModelConfig
    config: Any
    params: dict[str, np.ndarray]
    batch: dict[str, np.ndarray]
    losses: dict[str, float]
    gradients: dict[str, np.ndarray]
    negatives: tuple[np.ndarray, ...]
    choices: tuple[np.ndarray, ...]


def our_losses(c: ModelConfig, clips: int, device: jax.Device) -> Ours:
    """Evaluate our six losses and their gradients on a device, with the highest precision."""
    config = setting.step_config(clips)
    program, task = setting.our_program(c, config, device)
    params = setting.random_parameters(program)
    batch, key = setting.random_batch(c, clips), jax.random.key(3)

    def loss(params, batch):
        return task.loss(with_parameters(program.model, params), batch, key)

    with jax.default_matmul_precision("highest"):
        args = jax.device_put((params, batch), device)
        (_, metrics), grads = _compiled(jax.value_and_grad(loss, has_aux=True), args)
        negatives, choices = _compiled(
            lambda p, b: _choices(with_parameters(program.model, p), b, key), args
        )
    return Ours(
        c,
        config,
        params,
        batch,
        {name: float(metrics[f"loss_{name}"]) for name in setting.LOSSES},
        *jax.tree.map(np.asarray, (grads, negatives, choices)),
    )


def _compiled(f: Any, args: Any) -> Any:
    options = setting.QUICK if jax.tree.leaves(args)[0].devices().pop().platform == "cpu" else None
    return jax.jit(f).lower(*args).compile(compiler_options=options)(*args)


def _choices(model: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[tuple, tuple]:
    """Return what `joint_loss` chooses at random with this key."""
    c, tokens = model.config, batch["tokens"]
    video = model.encode_video(*(batch[k] for k in ("pixels", "boxes", "classes", "scores")))
    text = model.encode_text(tokens)
    _, similarity = objectives.vtc(
        embed_video(video), embed_text(text), model.scale(), batch["valid"]
    )
    at = jnp.arange(c.text_length)
    words = text.mask & (at > 0) & (at < text.sep_index[:, None])
    vtm, mlm, plm = jax.random.split(key, 3)
    negatives = objectives.hard_negatives(vtm, similarity, tokens, batch["valid"])
    masked = objectives.mask_text(mlm, tokens, words, 0.15, c.vocab_size)
    return negatives, (*masked, objectives.sample_prefix(plm, text.sep_index + 1))


def twin_losses(ours: Ours, **options: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return the twin's losses and gradients; `options` are those of `TwinStep`."""
    import torch

    from benchmarks.twin import weights
    from benchmarks.twin.losses import Choices, Negatives
    from benchmarks.twin.step import TwinStep

    step = TwinStep(ours.model, ours.params, ours.config, **options)

    def tensors(arrays):
        found = [torch.from_numpy(np.array(x)).to(step.device) for x in arrays]
        return [x.long() if x.dtype == torch.int32 else x for x in found]

    choices, negatives = Choices(*tensors(ours.choices)), Negatives(*tensors(ours.negatives))
    found = step.losses(step.batch(ours.batch), choices, negatives)
    sum(found.values()).backward()
    return {k: float(v.detach()) for k, v in found.items()}, weights.gradients(
        step.model, ours.params
    )


def largest_differences(
    ours: Ours, losses: Mapping[str, float], gradients: Mapping[str, np.ndarray]
) -> tuple[float, float]:
    """Return the largest differences of a loss and of a gradient.

    Each is relative: to the loss, and to the largest entry of the parameter's gradient.
    """
    of_losses = max(abs(losses[k] - v) / abs(v) for k, v in ours.losses.items())
    of_gradients = max(
        float(np.abs(gradients[k] - v).max() / np.abs(v).max()) for k, v in ours.gradients.items()
    )
    return of_losses, of_gradients
