"""Parts of speech of the synthetic world's texts, known without a tagger.

The vocabulary is small: the list that a word comes from decides whether it is a noun, a verb or an
adjective. Three words are both noun and verb, and the word before them decides.

    python -m stoa_jax.data.synthetic.parts_of_speech   # agreement with the tagger, word by word
"""

import collections
import functools
import re

from stoa_jax.data.synthetic import language, scene
from stoa_jax.text import tagging
from stoa_jax.text.lemmatize import VerbLemmatizer
from stoa_jax.text.tokenizer import Tokenizer

_WORD = re.compile(r"[a-z]+")
_PHRASES = [
    *(phrase for pairs in language.PHRASES.values() for pair in pairs for phrase in pair),
    *(phrase for pairs in language.PLURAL.values() for pair in pairs for phrase in pair),
    *(phrase.removeprefix("is ") for phrase in language.REST),
]
_ASKED = (*language.ASKED.values(), "meets", "moves", "comes", "acts", "do")
VERBS = frozenset(phrase.split()[0] for phrase in (*_PHRASES, *_ASKED))
NOUNS = frozenset(
    (
        *scene.SHAPES,
        *(f"{shape}s" for shape in scene.SHAPES if shape != "cross"),
        *("background", "color", "end", "front", "objects", "thing", "things", "way"),
    )
)
ADJECTIVES = frozenset((*scene.COLOURS, *scene.SIZES, *scene.TONES))


def part_of_speech(word: str, before: str) -> str:
    """Return the UPOS of a word as far as it matters to the losses: NOUN, VERB, ADJ, or X."""
    if word in ("left", "right"):
        return "NOUN" if before == "the" else "X"
    if word == "circle":
        return "NOUN" if before == "a" else "VERB"
    if word == "crosses":
        return "NOUN" if before == "many" else "VERB"
    for upos, known in (("NOUN", NOUNS), ("VERB", VERBS), ("ADJ", ADJECTIVES)):
        if word in known:
            return upos
    return "X"


def words(text: str) -> list[tagging.Word]:
    """Return the words of a text of the world in a tagger's form."""
    lemma, found, before = _lemmatizer(), [], ""
    for match in _WORD.finditer(text.lower()):
        word = match[0]
        upos = part_of_speech(word, before)
        found.append(
            tagging.Word(word, *match.span(), upos, lemma(word) if upos == "VERB" else word)
        )
        before = word
    return found


def parse(texts: list[str], length: int = 77) -> list[tuple]:
    """Return (tokens, tags) of each text, in the layout of `text.parse_many`."""
    tokenizer = _tokenizer()
    parsed = (tagging.align_tags(text, words(text), tokenizer, length) for text in texts)
    return [(p.tokens, p.tags) for p in parsed]


@functools.cache
def _lemmatizer():
    return functools.cache(VerbLemmatizer.from_file(tagging.DEFAULT / "lemmas.json"))


@functools.cache
def _tokenizer() -> Tokenizer:
    return Tokenizer()


def agreement(clips: int = 500) -> tuple[float, collections.Counter]:
    """Return the share of words on which the shipped tagger agrees, and the disagreements."""
    from stoa_jax.data.synthetic import World

    world = World("test", size=16, frames=1)
    texts = []
    for i in range(clips):
        clip = world.clip(i)
        texts += [*clip.captions, *(question for question, _ in clip.questions), *clip.choices[0]]
    same = total = 0
    differ: collections.Counter = collections.Counter()
    for text, tagged in zip(texts, tagging.Tagger().tag(texts), strict=True):
        theirs = {w.start: w.upos for w in tagged}
        for ours in words(text):
            other = theirs.get(ours.start, "X")
            other = other if other in ("NOUN", "VERB", "ADJ") else "X"
            total += 1
            same += other == ours.upos
            if other != ours.upos:
                differ[ours.word, ours.upos, other] += 1
    return same / total, differ


def main() -> None:
    """Print the agreement."""
    share, differ = agreement()
    print(f"{100 * share:.2f} % of the words have the same part of speech in both")
    for (word, ours, other), count in differ.most_common(20):
        print(f"{count:6}  {word:12} the world says {ours}, the tagger {other}")


if __name__ == "__main__":
    main()
