"""Train the small English tagger that the package ships.

python -m stoa_jax.tagger.train --treebank=UD_English-EWT --out=stoa_jax/tagger/model

Training takes about six minutes on one core. The result is a plain spaCy pipeline: hashed word
features, convolutions, and a softmax over the universal tags. Verb lemmas are counted in the same
treebank and written to `lemmas.json`.
"""

import argparse
import json
import random
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from stoa_jax.tagger.captions import Captions
from stoa_jax.tagger.treebank import Sentence, read_split

# The feature tables make up most of the file: spaCy's default sizes take 6.5 MB, these under 4 MB.
ATTRIBUTES = {"NORM": 3000, "PREFIX": 500, "SUFFIX": 2000, "SHAPE": 500}
WIDTH, DEPTH = 96, 4
NOTICE = """\
The files in this folder were made by `python -m stoa_jax.tagger.train` from the treebank
UD English EWT (Universal Dependencies, github.com/UniversalDependencies/UD_English-EWT),
by Natalia Silveira, Timothy Dozat, Marie-Catherine de Marneffe, Samuel Bowman, Miriam Connor,
John Bauer, Christopher Manning, Nathan Schneider and others; its licence is CC BY-SA 4.0
(https://creativecommons.org/licenses/by-sa/4.0/), and so is that of this folder.
"""
BATCH_WORDS, LEARN_RATE, DROPOUT = 800, 2e-3, 0.15


def blank_pipeline():
    """Build an untrained English pipeline whose only component sets `token.pos_`."""
    import spacy

    embed = {
        "@architectures": "spacy.MultiHashEmbed.v2",
        "width": WIDTH,
        "attrs": list(ATTRIBUTES),
        "rows": list(ATTRIBUTES.values()),
        "include_static_vectors": False,
    }
    encode = {
        "@architectures": "spacy.MaxoutWindowEncoder.v2",
        "width": WIDTH,
        "window_size": 1,
        "maxout_pieces": 2,
        "depth": DEPTH,
    }
    tok2vec = {"@architectures": "spacy.Tok2Vec.v2", "embed": embed, "encode": encode}
    model = {"@architectures": "spacy.Tagger.v2", "tok2vec": tok2vec, "nO": None}
    nlp = spacy.blank("en")
    nlp.add_pipe("morphologizer", config={"model": model})
    return nlp


def as_caption(sentence: Sentence, rng: random.Random) -> Sentence:
    """Make a sentence caption-like: maybe only one subtree, lower case, no final punctuation."""
    start, stop = 0, len(sentence.words)
    if stop > 8 and rng.random() < 0.4:
        start, stop = _subtree(sentence, rng.randrange(stop))
    while stop - start > 1 and sentence.upos[stop - 1] == "PUNCT":
        stop -= 1
    cut = sentence.cut(start, stop)
    cut.words = [w.lower() for w in cut.words]
    return cut


def _subtree(sentence: Sentence, head: int) -> tuple[int, int]:
    """Return the span of words under a head, or the whole sentence if the span is too short."""
    members = {head}
    while True:
        below = {i for i, h in enumerate(sentence.heads) if h in members} - members
        if not below:
            break
        members |= below
    start, stop = min(members), max(members) + 1
    return (start, stop) if stop - start >= 3 else (0, len(sentence.words))


def batches(
    sentences: list[Sentence], rng: random.Random, captions: float, made: list[Sentence]
) -> list[list[Sentence]]:
    """Split an epoch into random batches of about `BATCH_WORDS` words, generated ones included.

    A share `captions` of the treebank's sentences is made caption-like.
    """
    sentences = [as_caption(s, rng) if rng.random() < captions else s for s in sentences] + made
    rng.shuffle(sentences)
    result, size = [[]], 0
    for sentence in sentences:
        if size >= BATCH_WORDS:
            result.append([])
            size = 0
        result[-1].append(sentence)
        size += len(sentence.words)
    return result


def accuracy(nlp, sentences: list[Sentence]) -> float:
    """Return the share of the treebank's words that get the right universal tag."""
    from spacy.tokens import Doc

    docs = [Doc(nlp.vocab, words=s.words, spaces=s.spaces) for s in sentences]
    pairs = list(zip(nlp.pipe(docs), sentences, strict=True))
    right = sum(t.pos_ == u for d, s in pairs for t, u in zip(d, s.upos, strict=True))
    return right / sum(len(s.words) for s in sentences)


def train(treebank: str, epochs: int, captions: float, made: int, seed: int):
    """Train on the treebank's train split, and print the dev accuracy after each epoch."""
    from spacy.tokens import Doc
    from spacy.training import Example
    from thinc.api import Adam, fix_random_seed, warmup_linear

    fix_random_seed(seed)
    rng = random.Random(seed)
    train_set, dev = read_split(treebank, "train"), read_split(treebank, "dev")
    nlp = blank_pipeline()

    def example(s: Sentence) -> Example:
        gold = Doc(nlp.vocab, words=s.words, spaces=s.spaces, pos=s.upos)
        return Example(Doc(nlp.vocab, words=s.words, spaces=s.spaces), gold)

    nlp.initialize(lambda: [example(s) for s in train_set])
    generator = Captions(train_set)

    def epoch_batches(rng: random.Random) -> list[list[Sentence]]:
        return batches(train_set, rng, captions, [generator.sample(rng) for _ in range(made)])

    steps = epochs * len(epoch_batches(random.Random(seed)))
    rates: Any = warmup_linear(LEARN_RATE, steps // 20, steps)
    optimizer = Adam(rates, L2=0.01, grad_clip=1.0)
    start = time.perf_counter()
    for epoch in range(epochs):
        losses: dict[str, float] = {}
        for batch in epoch_batches(rng):
            nlp.update([example(s) for s in batch], sgd=optimizer, drop=DROPOUT, losses=losses)
            optimizer.step_schedules()
        seconds = time.perf_counter() - start
        loss, dev_accuracy = losses["morphologizer"], accuracy(nlp, dev)
        print(
            f"epoch {epoch + 1} loss {loss:.0f} dev {dev_accuracy:.4f} {seconds:.0f} s", flush=True
        )
    return nlp


def verb_lemmas(sentences: list[Sentence]) -> dict:
    """Count the lemmatizer's tables: forms whose lemma no rule gives, and known verbs."""
    from stoa_jax.text.lemmatize import VerbLemmatizer

    counts: dict[str, Counter] = defaultdict(Counter)
    for sentence in sentences:
        for word, tag, lemma in zip(sentence.words, sentence.upos, sentence.lemmas, strict=True):
            if tag == "VERB" and word.isascii() and lemma.isascii() and word.isalpha():
                counts[word.lower()][lemma.lower()] += 1
    forms = {w: c.most_common(1)[0][0] for w, c in sorted(counts.items())}
    verbs = sorted({v for v in forms.values() if v.isalpha()})
    ruled = VerbLemmatizer({}, verbs)
    return {"forms": {w: v for w, v in forms.items() if ruled(w) != v}, "verbs": verbs}


def save(nlp, sentences: list[Sentence], out: Path) -> None:
    """Write the pipeline, without the vocabulary that spaCy rebuilds, and the verb lemmas."""
    nlp.meta.update(
        name="stoa_tagger",
        description="Universal tags for captions",
        license="CC BY-SA 4.0",
        sources=[{"name": "Universal Dependencies English EWT", "license": "CC BY-SA 4.0"}],
    )
    nlp.to_disk(out, exclude=["vocab"])
    meta = json.loads((out / "meta.json").read_text())
    meta["spacy_version"] = ">=3.8,<4"  # an exact version would warn on every other one
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    (out / "LICENSE").write_text(NOTICE)
    lemmas = verb_lemmas(sentences)
    (out / "lemmas.json").write_text(json.dumps(lemmas, indent=0) + "\n")


def main() -> None:
    """Run the command line: train the tagger and save it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--treebank", required=True, help="folder of {train,dev,test}.conllu[.gz]")
    parser.add_argument("--out", required=True, type=Path, help="folder for the pipeline")
    parser.add_argument("--epochs", type=int, default=11)
    parser.add_argument(
        "--captions", type=float, default=0.4, help="share of sentences made caption-like"
    )
    parser.add_argument("--made", type=int, default=4000, help="generated captions per epoch")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    nlp = train(args.treebank, args.epochs, args.captions, args.made, args.seed)
    save(nlp, read_split(args.treebank, "train"), args.out)
    size = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file()) / 1e6
    print(f"{args.out}: {size:.2f} MB, dev {accuracy(nlp, read_split(args.treebank, 'dev')):.4f}")


if __name__ == "__main__":
    main()
