"""The twin's training step: losses, gradients, clipping, AdamW."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.twin import losses, weights
from benchmarks.twin.losses import Choices, Negatives
from benchmarks.twin.model import Twin
from stoa_jax import optim
from stoa_jax.models.config import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TwinStep:
    """A training step of the twin, with our parameters, rates and weight decay.

    `compile` is a mode of torch.compile ("default", "max-autotune-no-cudagraphs"), or "" for none;
    "aot_eager" traces without generating code.
    `stream` is the dtype of activations between layers; products run in bfloat16 if the model's
    dtype is. `authors` runs the network as the authors do: every trajectory separately, one fusion
    pass for each word that PLM predicts, and every layer at all positions.
    """

    def __init__(
        self,
        c: ModelConfig,
        params: Mapping[str, np.ndarray],
        config: Any,
        *,
        device: str = "cpu",
        compile: str = "",
        stream: str = "",
        authors: bool = False,
    ):
        self.authors = authors
        self.device = torch.device(device)
        self.model = Twin(c, separate=authors, skip=not authors)
        weights.load(self.model, params)
        self.model.to(self.device)
        self.low_precision = c.dtype == "bfloat16"
        self.model.dtype = DTYPES[stream or c.dtype]
        names = weights.our_names(self.model, params)
        self.optimizer = self._optimizer(config, names)
        self.clip = config.optim.clip_norm
        self.weights = {k: config.loss.to_dict()[k] for k in ("vtc", "vtm", "mlm", "plm")}
        self.weights |= {k: config.loss.to_dict()[k] for k in ("ota", "asp")}
        parts = losses.encode, losses.contrast_and_words, losses.alignment
        if compile:
            how = dict(backend=compile) if compile == "aot_eager" else dict(mode=compile)
            parts = tuple(torch.compile(part, dynamic=False, **how) for part in parts)
        self._encode, self._words, self._align = parts

    def _optimizer(self, config: Any, names: Mapping[str, str]) -> torch.optim.Optimizer:
        rates, _ = optim.learning_rates(config, sorted(set(names.values())))
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            rate, ours = rates[names[name]], names[name]
            parameter.requires_grad_(rate > 0)
            if rate > 0:
                decay = 0.0 if re.search(config.optim.no_decay, ours) else config.optim.weight_decay
                groups.setdefault((rate, decay), []).append(parameter)
        return torch.optim.AdamW(
            [dict(params=p, lr=rate, weight_decay=d) for (rate, d), p in groups.items()],
            betas=config.optim.betas,
            fused=True,
        )

    def batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """Return a batch on the device."""
        tensors = {k: torch.from_numpy(np.asarray(v)) for k, v in batch.items()}
        for name in ("tokens", "classes", "index"):
            tensors[name] = tensors[name].long()
        return {k: v.to(self.device) for k, v in tensors.items()}

    def losses(
        self,
        batch: Mapping[str, Tensor],
        choices: Choices | None = None,
        negatives: Negatives | None = None,
    ) -> dict[str, Tensor]:
        """Return the six losses; choices and negatives that are not given are sampled."""
        if choices is None:
            choices = losses.choose(self.model, batch["tokens"])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision):
            encoded = self._encode(self.model, batch, choices)
            solve = losses.match(encoded, batch, self.model)
            if negatives is None:
                negatives = losses.choose_negatives(encoded.similarity, batch["tokens"])
            found = self._words(
                self.model, batch, choices, negatives, encoded, plm_passes=self.authors
            )
            return {**found, **self._align(encoded, *solve())}

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Take one step and return the loss."""
        found = self.losses(batch)
        loss = sum(self.weights[name] * value for name, value in found.items())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, self.clip)
        self.optimizer.step()
        with torch.no_grad():  # CLIP's limit on the scale
            self.model.logit_scale.clamp_(max=float(np.log(100.0)))
        return loss.detach()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
