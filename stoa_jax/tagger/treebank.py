"""Read a Universal Dependencies treebank in CoNLL-U format, plain or gzipped."""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stoa_jax.errors import UserError


@dataclass
class Sentence:
    """One sentence of a treebank, with parallel lists over its words."""

    words: list[str]
    spaces: list[bool]  # whether a space follows the word
    upos: list[str]  # universal part-of-speech tags
    lemmas: list[str]
    heads: list[int]  # index of the head in the sentence, -1 for the root

    def cut(self, start: int, stop: int) -> "Sentence":
        """Return the words start..stop as a sentence; words with a head outside become roots."""
        heads = [h - start if start <= h < stop else -1 for h in self.heads[start:stop]]
        s = slice(start, stop)
        return Sentence(self.words[s], self.spaces[s], self.upos[s], self.lemmas[s], heads)

    @property
    def text(self) -> str:
        """The sentence as it was written, with its spaces."""
        pairs = zip(self.words, self.spaces, strict=True)
        return "".join(w + " " * s for w, s in pairs).rstrip()


def read_split(directory: str | Path, split: str) -> list[Sentence]:
    """Read `{split}.conllu[.gz]` or `*-ud-{split}.conllu[.gz]` from a directory."""
    directory = Path(directory)
    for pattern in (f"{split}.conllu", f"*-ud-{split}.conllu"):
        for path in sorted([*directory.glob(pattern), *directory.glob(pattern + ".gz")]):
            return list(_sentences(path))
    raise UserError(
        f"{directory}: contains no {split}.conllu or {split}.conllu.gz; "
        "download UD_English-EWT and pass its directory as --treebank"
    )


def _sentences(path: Path) -> Iterator[Sentence]:
    opener = gzip.open if path.suffix == ".gz" else open
    rows: list[list[str]] = []
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            line = line.rstrip("\n")
            if line.startswith("#"):
                continue
            if line:
                row = line.split("\t")
                if len(row) != 10:
                    raise UserError(f"{path}:{number}: {len(row)} columns; CoNLL-U has 10")
                rows.append(row)
            elif rows:
                yield _sentence(rows)
                rows = []
    if rows:
        yield _sentence(rows)


def _sentence(rows: list[list[str]]) -> Sentence:
    result = Sentence([], [], [], [], [])
    inside, after = 0, True  # last word of a contraction ("don't" = "do" + "n't"), its spacing
    for row in rows:
        space = "SpaceAfter=No" not in row[9].split("|")
        if "." in row[0]:  # an empty node, which is not in the text
            continue
        if "-" in row[0]:
            inside, after = int(row[0].split("-")[1]), space
            continue
        index = int(row[0])
        if index < inside:
            space = False
        elif index == inside:
            space = after
        result.words.append(row[1])
        result.spaces.append(space)
        result.upos.append(row[3])
        result.lemmas.append(row[2])
        result.heads.append(int(row[6]) - 1)
    return result
