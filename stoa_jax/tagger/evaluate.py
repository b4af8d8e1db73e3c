"""Measure a tagger's accuracy on a treebank's test split and on tagged captions, and its speed.

python -m stoa_jax.tagger.evaluate \\
    --treebank=UD_English-EWT --captions=tests/data/captions_tagged.tsv
"""

import argparse
import itertools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from stoa_jax.errors import UserError
from stoa_jax.tagger.treebank import Sentence, read_split
from stoa_jax.text import Tagger, Tokenizer, parse_many

Span = tuple[int, int, str]


def read_captions(path: str | Path) -> list[tuple[str, list[Span]]]:
    """Read lines `caption<TAB>word/TAG word/TAG …` as texts with spans (start, end, tag)."""
    result = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        text, tab, tagged = line.partition("\t")
        spans, at = [], 0
        for item in tagged.split():
            word, _, tag = item.rpartition("/")
            start = text.find(word, at)
            if start < 0 or not word:
                raise UserError(
                    f"{path}:{number}: {item!r} is not WORD/TAG with the next word of the caption"
                )
            at = start + len(word)
            spans.append((start, at, tag))
        if not tab or not spans:
            raise UserError(f"{path}:{number}: expected caption, tab, and WORD/TAG items")
        result.append((text, spans))
    return result


def spans_of(sentence: Sentence) -> list[Span]:
    """Return the spans of a treebank sentence's words in its text."""
    lengths = [len(w) + s for w, s in zip(sentence.words, sentence.spaces, strict=True)]
    starts = itertools.accumulate(lengths, initial=0)
    words = zip(starts, sentence.words, sentence.upos, strict=False)
    return [(start, start + len(word), tag) for start, word, tag in words]


def f1(found: Iterable[set[Span]], gold: Iterable[set[Span]], tag: str) -> float:
    """Return the F1 score of the words with one tag; a match has the same span and tag."""
    hits = total = 0
    for a, b in zip(found, gold, strict=True):
        a, b = ({s for s in spans if s[2] == tag} for spans in (a, b))
        hits += len(a & b)
        total += len(a) + len(b)
    return 2 * hits / total if total else 1.0


def raw_spans(tagger: Tagger, texts: Sequence[str]) -> list[set[Span]]:
    """Tag plain texts, which the tagger splits into words itself, and return the spans."""
    return [{(w.start, w.end, w.upos) for w in words} for words in tagger.tag(texts)]


def on_treebank(tagger: Tagger, sentences: list[Sentence]) -> dict[str, float]:
    """Measure UPOS accuracy, F1 and verb lemmas on the treebank's words, and F1 on plain text."""
    found = tagger.tag_words([(s.words, s.spaces) for s in sentences])
    pairs = [
        (upos, lemma, gold, gold_lemma)
        for s, words in zip(sentences, found, strict=True)
        for (upos, lemma), gold, gold_lemma in zip(words, s.upos, s.lemmas, strict=True)
    ]
    metrics = {"UPOS accuracy": sum(a == b for a, _, b, _ in pairs) / len(pairs)}
    for tag in ("NOUN", "VERB"):
        hits = sum(a == b == tag for a, _, b, _ in pairs)
        total = sum((a == tag) + (b == tag) for a, _, b, _ in pairs)
        metrics[f"F1 {tag}"] = 2 * hits / total
    verbs = [(a.lower(), b.lower()) for t, a, u, b in pairs if t == u == "VERB"]
    metrics["lemmas of VERB words"] = sum(a == b for a, b in verbs) / len(verbs)
    raw = raw_spans(tagger, [s.text for s in sentences])
    gold = [set(spans_of(s)) for s in sentences]
    for tag in ("NOUN", "VERB"):
        metrics[f"F1 {tag}, from plain text"] = f1(raw, gold, tag)
    return metrics


def on_captions(tagger: Tagger, captions: list[tuple[str, list[Span]]]) -> dict[str, float]:
    """Measure F1 on captions tagged by hand."""
    raw = raw_spans(tagger, [text for text, _ in captions])
    return {
        f"F1 {tag}": f1(raw, [set(spans) for _, spans in captions], tag) for tag in ("NOUN", "VERB")
    }


def speed(tagger: Tagger, texts: Sequence[str], rounds: int = 20) -> float:
    """Return captions per second through `parse_many`, in CPU time of this process."""
    tokenizer, many = Tokenizer(), [f"{t} {i % 97}" for i in range(rounds) for t in texts]
    parse_many(many[:64], tokenizer, tagger)
    start = time.process_time()
    parse_many(many, tokenizer, tagger)
    return len(many) / (time.process_time() - start)


def main() -> None:
    """Run the command line: print the metrics as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tagger", default="default", help="'default' or a spaCy pipeline")
    parser.add_argument("--treebank", help="folder with test.conllu[.gz]")
    parser.add_argument("--captions", help="file of captions tagged by hand")
    args = parser.parse_args()
    if not args.treebank and not args.captions:
        parser.error("give --treebank, --captions or both")
    tagger = Tagger(args.tagger)
    print("| | |\n|---|---|")
    if args.treebank:
        test = read_split(args.treebank, "test")
        for name, value in on_treebank(tagger, test).items():
            print(f"| test split ({sum(len(s.words) for s in test)} words): {name} | {value:.2%} |")
    if args.captions:
        captions = read_captions(args.captions)
        for name, value in on_captions(tagger, captions).items():
            print(f"| {len(captions)} captions: {name} | {value:.2%} |")
        print(f"| captions per second, one core | {speed(tagger, [c for c, _ in captions]):.0f} |")


if __name__ == "__main__":
    main()
