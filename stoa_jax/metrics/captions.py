"""BLEU-4, METEOR, ROUGE-L and CIDEr of captions, equal to `pycocoevalcap`'s."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.metrics import coco, ptb

ORDER = 4  # longest n-gram
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0  # width of the penalty on a difference in length, in tokens


def caption_scores(
    hypotheses: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenizer: Literal["auto", "java", "python", "none"] = "auto",
) -> dict[str, float | str]:
    """Compute BLEU-4, METEOR, ROUGE-L and CIDEr on pycocoevalcap's scale (papers print it x 100).

    `auto` tokenises with the Java program if it is installed, otherwise with our own tokeniser;
    `none` splits texts at blanks. Without Java, METEOR's value is the text "needs Java".
    """
    ids = _checked(hypotheses, references)
    wanted = [list(references[i]) for i in ids]
    made = [hypotheses[i] for i in ids]
    if tokenizer != "none":
        java = tokenizer == "java" or (tokenizer == "auto" and coco.package() is not None)
        # References and hypotheses each in order, since the tokeniser looks one caption ahead.
        flat = iter(_words([text for texts in wanted for text in texts], java))
        wanted = [[next(flat) for _ in texts] for texts in wanted]
        made = _words(made, java)
    has_meteor = coco.package() is not None and tokenizer != "python"
    return {
        "BLEU-4": bleu(made, wanted),
        "METEOR": coco.meteor(made, wanted) if has_meteor else coco.NEEDS_JAVA,
        "ROUGE-L": rouge_l(made, wanted),
        "CIDEr": cider(made, wanted),
    }


def _words(texts: list[str], java: bool) -> list[str]:
    if not java:
        return ptb.caption_words(texts)
    tokens = coco.java_tokenize(texts)
    return [" ".join(token for token in line if token not in ptb.PUNCTUATION) for line in tokens]


def _checked(hypotheses: Mapping, references: Mapping) -> list:
    if not references:
        raise UserError("metrics: no captions to score")
    lacking = [i for i in references if i not in hypotheses]
    unknown = [i for i in hypotheses if i not in references]
    if lacking or unknown:
        kind, example = ("hypothesis", lacking[0]) if lacking else ("reference", unknown[0])
        raise UserError(
            f"metrics: {len(lacking or unknown)} ids without a {kind}, {example!r} for one; "
            "give both dictionaries the same ids"
        )
    for i, texts in references.items():
        if isinstance(texts, str) or not texts:
            raise UserError(f"metrics: references[{i!r}] is {texts!r}; give a list of captions")
    return list(references)


def _ngrams(text: str) -> tuple[int, Counter]:
    """Count the words, and the occurrences of each n-gram of one to four words."""
    words = text.split()
    counts = Counter(
        tuple(words[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(words) - n + 1)
    )
    return len(words), counts


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Compute corpus BLEU-4; the reference length is the closest one, the shorter of two."""
    correct, guessed = [0] * ORDER, [0] * ORDER
    length = reference_length = 0
    for hypothesis, wanted in zip(hypotheses, references, strict=True):
        size, counts = _ngrams(hypothesis)
        most: Counter = Counter()
        sizes = []
        for text in wanted:
            other_size, other = _ngrams(text)
            sizes.append(other_size)
            most |= other  # the largest count of each
        length += size
        reference_length += min(sizes, key=lambda other: (abs(other - size), other))
        for n in range(ORDER):
            guessed[n] += max(0, size - n)
        for ngram, count in counts.items():
            correct[len(ngram) - 1] += min(count, most[ngram])
    # The two small numbers are pycocoevalcap's; they give an empty corpus zero.
    product = 1.0
    for right, made in zip(correct, guessed, strict=True):
        product *= (right + 1e-15) / (made + 1e-9)
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    return product ** (1 / ORDER) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)


def rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Compute the mean F-measure of the longest common subsequence with the best reference."""
    scores = []
    for hypothesis, wanted in zip(hypotheses, references, strict=True):
        words = hypothesis.split(" ")
        precision = recall = 0.0
        for text in wanted:
            others = text.split(" ")
            common = _common(words, others)
            precision = max(precision, common / len(words))
            recall = max(recall, common / len(others))
        beta = ROUGE_BETA**2
        full = precision and recall
        scores.append((1 + beta) * precision * recall / (recall + beta * precision) if full else 0)
    return float(np.mean(scores))


def _common(a: list[str], b: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0  # the row above, one column to the left
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = before + 1 if word == other else max(above, row[j - 1])
            before = above
    return row[-1]


def cider(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Compute CIDEr as pycocoevalcap's `Cider` does: clipped counts, a length penalty, times 10.

    This is CIDEr-D, except that a caption's length is its number of bigrams.
    """
    counted = [[_ngrams(text)[1] for text in texts] for texts in references]
    documents: Counter = Counter()
    for texts in counted:
        documents.update(set().union(*texts))
    log_size = math.log(len(references))

    def weigh(counts: Counter) -> tuple[dict, list[float], int]:
        weights = {
            ngram: count * (log_size - math.log(max(1, documents[ngram])))
            for ngram, count in counts.items()
        }
        squares = [0.0] * ORDER
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        bigrams = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return weights, [math.sqrt(square) for square in squares], bigrams

    scores = []
    for hypothesis, texts in zip(hypotheses, counted, strict=True):
        weights, norms, length = weigh(_ngrams(hypothesis)[1])
        score = 0.0
        for text in texts:
            others, other_norms, other_length = weigh(text)
            dots = [0.0] * ORDER
            for ngram, weight in weights.items():
                other = others.get(ngram, 0.0)
                dots[len(ngram) - 1] += min(weight, other) * other
            cosines = (
                dot / (a * b) if a and b else dot
                for dot, a, b in zip(dots, norms, other_norms, strict=True)
            )
            score += sum(cosines) * math.exp(-((length - other_length) ** 2) / 2 / CIDER_SIGMA**2)
        scores.append(10 * score / ORDER / len(texts))
    return float(np.mean(scores))


def authors_caption_scores(
    hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float | str]:
    """Compute the scores as STOA-VLP's authors do, without PTB tokenising.

    The texts are the tokenizer's decoded pieces; the caller cuts references at 32 of them. The
    authors leave a blank after every text, which ROUGE-L counts as one more common word.
    """
    return caption_scores(
        {i: f"{text.strip()} " for i, text in hypotheses.items()},
        {i: [f"{text.strip()} " for text in texts] for i, texts in references.items()},
        tokenizer="none",
    )
