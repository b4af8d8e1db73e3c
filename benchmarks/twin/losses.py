"""The six losses in PyTorch, with the random choices that they make.

Shapes: B clips, L text positions, M masked positions, S fusion positions, d shared width,
V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.twin.model import Twin, Video
from stoa_jax.objectives import NOUN, VERB

Batch = Mapping[str, Tensor]


class Choices(NamedTuple):
    """Random choices of a step that do not depend on the towers' outputs."""

    tokens: Tensor  # [B, L], some words replaced by others
    masked: Tensor  # [B, L], True where [MASK] is read
    positions: Tensor  # [B, M], of the words to predict
    labels: Tensor  # [B, M]
    counted: Tensor  # [B, M], which of them count
    prefix: Tensor  # [B], length of the prefix of PLM


class Negatives(NamedTuple):
    """Wrong partners for VTM."""

    video: Tensor  # [B], of every text
    text: Tensor  # [B], of every video
    exists: Tensor  # [B]


class Encoded(NamedTuple):
    """Outputs of the towers, and what matching needs of them."""

    video: Video
    text: Tensor  # [B, L, d]
    masked_text: Tensor  # [B, L, d]
    similarity: Tensor  # [B texts, B videos], times the scale
    nouns: Tensor  # [B, N, L], scores of the nouns and Ø
    verbs: Tensor  # [B, A, L + A], scores of the verbs and of Ø as often as there are actions


def text_ends(model: Twin, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the position of [SEP] [B] and which positions [B, L] belong to the text."""
    end = (tokens == model.config.vocab_size - 1).int().argmax(1)
    return end, torch.arange(tokens.shape[1], device=tokens.device) <= end[:, None]


def choose(model: Twin, tokens: Tensor, rate: float = 0.15) -> Choices:
    """Choose the words that MLM predicts and the prefix of PLM."""
    b, length = tokens.shape
    at = torch.arange(length, device=tokens.device)
    end, _ = text_ends(model, tokens)
    is_word = (at > 0) & (at < end[:, None])
    most = max(1, int(rate * (length - 2) + 0.5))
    count = (rate * is_word.sum(1)).round().clamp(min=1)
    order = torch.rand(b, length, device=tokens.device).masked_fill(~is_word, -1)
    best, positions = order.topk(most)
    counted = (best >= 0) & (torch.arange(most, device=tokens.device) < count[:, None])
    chosen = torch.zeros_like(is_word).scatter(1, positions, counted)
    kind = torch.rand(b, length, device=tokens.device)
    words = torch.randint_like(tokens, model.config.vocab_size - 2)
    prefix = 1 + (torch.rand(b, device=tokens.device) * end).long().clamp(max=end - 1)
    return Choices(
        torch.where(chosen & (kind >= 0.9), words, tokens),
        chosen & (kind < 0.8),
        positions,
        tokens.gather(1, positions),
        counted,
        prefix,
    )


def choose_negatives(similarity: Tensor, tokens: Tensor) -> Negatives:
    """Choose a wrong video for every text and a wrong text for every video."""
    wrong = ~(tokens[:, None] == tokens[None]).all(-1)
    exists = wrong.any(1)
    # A row without a candidate chooses among all and is not counted.
    allowed = wrong | ~exists[:, None]

    def sample(logits: Tensor) -> Tensor:
        probabilities = logits.masked_fill(~allowed, -torch.inf).softmax(1)
        return torch.multinomial(probabilities, 1)[:, 0]

    similarity = similarity.detach()
    return Negatives(sample(similarity), sample(similarity.T), exists)


def encode(model: Twin, batch: Batch, choices: Choices) -> Encoded:
    """Run the towers, and score trajectories against nouns and actions against verbs."""
    tokens = batch["tokens"]
    video = model.encode_video(*(batch[k] for k in ("pixels", "boxes", "classes", "scores")))
    both = torch.cat([tokens, choices.tokens])
    masked = torch.cat([torch.zeros_like(choices.masked), choices.masked])
    text, masked_text = model.text(both, masked, model.dtype).chunk(2)
    end, _ = text_ends(model, tokens)
    with torch.autocast(tokens.device.type, enabled=False):
        clip = F.normalize(F.normalize(video.frames.float(), dim=-1).mean(1), dim=-1)
        sentence = F.normalize(at(text, end).float(), dim=-1)
        similarity = model.logit_scale.exp() * sentence @ clip.T
        is_sep = torch.arange(tokens.shape[1], device=tokens.device) == end[:, None]
        nouns = affinity(video.objects, text, (batch["tags"] == NOUN) | is_sep)
        verbs = affinity(video.actions, text, (batch["tags"] == VERB) | is_sep)
        none = (verbs * is_sep[:, None]).sum(-1, keepdim=True)
        verbs = torch.cat([verbs, none.expand(-1, -1, verbs.shape[1])], 2)
    return Encoded(video, text, masked_text, similarity, nouns, verbs)


def at(x: Tensor, index: Tensor) -> Tensor:
    """Return `x[b, index[b]]` of [B, S, d]."""
    return x[torch.arange(len(x), device=x.device), index]


def affinity(x: Tensor, text: Tensor, words: Tensor) -> Tensor:
    """Return the softmax over the words [B, n, L] of the cosine, without gradient."""
    x, text = (F.normalize(y.detach().float(), dim=-1) for y in (x, text))
    return (x @ text.transpose(1, 2)).masked_fill(~words[:, None], -torch.inf).softmax(-1)


def contrast_and_words(
    model: Twin,
    batch: Batch,
    choices: Choices,
    negatives: Negatives,
    encoded: Encoded,
    plm_passes: bool = False,
) -> dict[str, Tensor]:
    """Return VTC, VTM, MLM and PLM.

    With `plm_passes`, PLM runs one pass of the fusion encoder for each word that it predicts.
    """
    tokens, video, text = batch["tokens"], encoded.video, encoded.text
    b, length = tokens.shape
    end, mask = text_ends(model, tokens)
    device, start = tokens.device, model.config.visual_length
    every = torch.arange(b, device=device)

    # Match: the true pairs, with wrong videos, with wrong texts. Then MLM, then PLM.
    wrong_video = Video(*(x[negatives.video] for x in video))
    inputs = [
        model.fusion_input(video, text, mask),
        model.fusion_input(wrong_video, text, mask),
        model.fusion_input(video, text[negatives.text], mask[negatives.text]),
        model.fusion_input(video, encoded.masked_text, mask),
    ]
    ends = torch.cat([end, end, end[negatives.text]])
    pairs = torch.stack([torch.full_like(ends, model.config.frames), start + ends], 1)
    reads = [pairs, start + choices.positions]
    attention = prefix_attention(choices.prefix, length)
    if not plm_passes:
        inputs.append(model.fusion_input(video, text, mask, attention))
        reads.append((start + torch.arange(length - 1, device=device)).expand(b, -1))
    sequences, masks = map(torch.cat, zip(*inputs, strict=True))
    outputs = model.fusion(sequences, masks, reads, model.skip)
    if plm_passes:
        outputs.append(one_pass_a_word(model, video, text, mask, attention))

    matches = torch.arange(3 * b, device=device) < b
    with torch.autocast(device.type, enabled=False):
        logits = model.fusion.match(outputs[0].flatten(1).float())
    counted = torch.cat([torch.ones_like(negatives.exists), negatives.exists, negatives.exists])
    vtm = mean(F.cross_entropy(logits, matches.long(), reduction="none"), counted)

    words = torch.cat(outputs[1:], 1)  # [B, M + L - 1, d]
    labels = torch.cat([choices.labels, tokens[:, 1:]], 1)
    logits = model.word_logits(words).flatten(0, 1)
    errors = F.cross_entropy(logits, labels.flatten(), reduction="none").reshape(b, -1)
    in_suffix = torch.arange(1, length, device=device) >= choices.prefix[:, None]
    of_mlm = choices.positions.shape[1]
    both = encoded.similarity, encoded.similarity.T
    return {
        "vtc": sum(F.cross_entropy(logits, every) for logits in both) / 2,
        "vtm": vtm,
        "mlm": mean(errors[:, :of_mlm], choices.counted),
        "plm": mean(errors[:, of_mlm:], mask[:, 1:] & in_suffix),
    }


def prefix_attention(prefix: Tensor, length: int) -> Tensor:
    """Return which text positions attend to which [B, L, L]."""
    position = torch.arange(length, device=prefix.device)
    inside = position < prefix[:, None]
    return (position[None] <= position[:, None]) | (inside[:, :, None] & inside[:, None])


def one_pass_a_word(
    model: Twin, video: Video, text: Tensor, mask: Tensor, attention: Tensor
) -> Tensor:
    """Return PLM's features [B, L - 1, d] from L - 1 passes, whose text grows word by word."""
    features = []
    for length in range(1, text.shape[1]):
        part = attention[:, :length, :length]
        x, seen = model.fusion_input(video, text[:, :length], mask[:, :length], part)
        last = torch.full((len(x), 1), x.shape[1] - 1, device=x.device)
        features += model.fusion(x, seen, [last], model.skip)
    return torch.cat(features, 1)


def mean(x: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of the counted entries."""
    return (x * counted).sum() / counted.sum().clamp(min=1)


def match(encoded: Encoded, batch: Batch, model: Twin) -> Callable[[], tuple[Tensor, Tensor]]:
    """Start to copy the scores to the host, and return a function that solves the matchings there.

    Between the two calls the device can run the rest of the forward pass.
    """
    tokens, tags = batch["tokens"], batch["tags"]
    end, _ = text_ends(model, tokens)
    is_sep = torch.arange(tokens.shape[1], device=tokens.device) == end[:, None]
    verbs, actions = tags == VERB, encoded.verbs.shape[1]
    spare = torch.arange(actions, device=tokens.device) < actions - verbs.sum(1, keepdim=True)
    every_action = torch.ones(len(tokens), actions, dtype=torch.bool, device=tokens.device)
    problems = [
        (encoded.nouns, encoded.video.object_mask, (tags == NOUN) | is_sep),
        (encoded.verbs, every_action, torch.cat([verbs, spare], 1)),
    ]
    on_gpu = tokens.device.type == "cuda"
    copies = [[x.to("cpu", non_blocking=on_gpu) for x in problem] for problem in problems]
    done = torch.cuda.Event() if on_gpu else None
    if done:
        done.record()

    def solve() -> tuple[Tensor, Tensor]:
        if done:
            done.synchronize()
        nouns, verbs = (solve_all(*(x.numpy() for x in problem)) for problem in copies)
        length = tokens.shape[1]
        found = [torch.from_numpy(x).to(tokens.device) for x in (nouns, verbs)]
        # Every copy of Ø stands for [SEP].
        return found[0], torch.where(found[1] >= length, end[:, None], found[1])

    return solve


def solve_all(scores: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the column of each row [B, n] of the best matching, -1 for none."""
    matched = np.full(rows.shape, -1)
    for i in range(len(scores)):
        row, column = np.flatnonzero(rows[i]), np.flatnonzero(columns[i])
        chosen = linear_sum_assignment(scores[i][np.ix_(row, column)], maximize=True)
        matched[i, row[chosen[0]]] = column[chosen[1]]
    return matched


def alignment(encoded: Encoded, nouns: Tensor, verbs: Tensor) -> dict[str, Tensor]:
    """Return OTA and ASP from the text positions matched to trajectories and actions."""
    losses = {}
    pairs = ("ota", encoded.video.objects, nouns), ("asp", encoded.video.actions, verbs)
    for name, x, columns in pairs:
        index = columns.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1])
        target = encoded.text.detach().gather(1, index).float()
        losses[name] = mean((x.float() - target).square().mean(-1), columns >= 0)
    return losses
