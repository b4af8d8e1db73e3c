"""The tokenizer against OpenAI's ids, its cut against a plain BPE, and aligned tags."""

import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import instant_clip_tokenizer
import numpy as np
import pytest

from stoa_jax import text
from stoa_jax.errors import UserError
from stoa_jax.text import bpe

# Created with OpenAI's simple_tokenizer: (text, ids without start and end).
GOLDEN = json.loads((Path(__file__).parent / "data" / "clip_ids.json").read_text())
START, END = 49406, 49407


@functools.cache
def tokenizer(size: int = 49408) -> text.Tokenizer:
    return text.Tokenizer(size)


@functools.cache
def tagger() -> text.Tagger:
    return text.Tagger()


def ids_of(caption: str, size: int = 49408) -> list[int]:
    return [i for piece in tokenizer(size).pieces(caption) for i in piece.ids]


@pytest.mark.parametrize(("caption", "ids"), GOLDEN, ids=range(len(GOLDEN)))
def test_ids_are_openais(caption, ids):
    assert ids_of(caption) == ids
    want = [START, *ids, END][:200]
    assert tokenizer().encode(caption, 200).tolist() == want + [0] * (200 - len(want))


def test_special_tokens_in_a_caption_stay_text():
    tokens = tokenizer().encode("a <|startoftext|> b <|endoftext|>")
    assert (tokens == START).sum() == 1 and (tokens == END).sum() == 1
    assert "startoftext" in tokenizer().decode(tokens)


def test_a_cut_keeps_the_end_token():
    tokens = tokenizer().encode("word " * 500, 32)
    assert tokens.dtype == np.int32 and tokens.shape == (32,)
    assert tokens[0] == START and tokens[-1] == END and (tokens[1:-1] == ids_of("word")[0]).all()
    exact = tokenizer().encode("word " * 30, 32)
    assert exact[-1] == END and (exact == END).sum() == 1
    assert tokenizer().encode("", 5).tolist() == [START, END, 0, 0, 0]
    with pytest.raises(UserError, match="text length 1"):
        tokenizer().encode("a", 1)


def test_the_table_of_merges_is_the_one_of_the_fast_tokenizer():
    fast = instant_clip_tokenizer.Tokenizer()
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeinorstlcdhmp"), rng.integers(1, 14))) for _ in range(3000)]
    for word in [*words, "photographing", "!!!!!!!", "snowboarders", "日本語", "кошка", "🎸"]:
        assert bpe.clip_vocabulary().bpe(word) == fast.encode(word), word


def first_merges_bpe(word: str, size: int) -> list[int]:
    """Run textbook BPE on byte strings, with only the first merges of the table."""
    byte_ids = {b: i for i, b in enumerate(bpe.BYTES)}
    names = {i: (b,) for b, i in byte_ids.items()}
    names |= {i + 256: (b, "end") for b, i in byte_ids.items()}
    ranks = {}
    for rank, (left, right) in enumerate(bpe.clip_vocabulary().merges.tolist()[: size - 514]):
        names[512 + rank] = names[left] + names[right]
        ranks[names[left], names[right]] = rank
    numbers = {name: i for i, name in names.items()}
    parts = [(b,) for b in word.encode()]
    parts[-1] += ("end",)
    while True:
        found = [(ranks[p], i) for i, p in enumerate(itertools.pairwise(parts)) if p in ranks]
        if not found:
            return [numbers[p] for p in parts]
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("size", [514, 515, 1000, 4096, 20000, 49407])
def test_restrict_is_bpe_with_the_first_merges(size):
    words = (
        "strumming a snowboarder 's photographs near skyscrapers !!! 2 日本 🎸 aaaaaaa café".split()
    )
    tokens = tokenizer().encode(" ".join(words), 300)
    cut, _ = text.restrict(tokens, np.zeros(300, np.uint8), size)
    pieces = [p for w in words for p in first_merges_bpe(w, size)]
    want = [size - 2, *pieces, size - 1]
    assert cut.tolist() == want + [0] * (300 - len(want))
    assert tokenizer(size).encode(" ".join(words), 300).tolist() == cut.tolist()
    assert tokenizer(size).decode(cut) == " ".join(words) + " "


def test_restrict_moves_a_tag_to_the_last_part_and_keeps_the_end():
    caption = "photographers snowboarding"
    tokens = np.stack([tokenizer().encode(caption, 12), tokenizer().encode("", 12)])
    tags = np.zeros((2, 12), np.int8)
    tags[0, 1], tags[0, len(ids_of(caption))] = 1, 3
    before = tokens.copy(), tags.copy()
    cut, cut_tags = text.restrict(tokens, tags, 600)
    np.testing.assert_array_equal(tokens, before[0])
    np.testing.assert_array_equal(tags, before[1])
    assert cut.shape == (2, 12) and cut.dtype == tokens.dtype and cut_tags.dtype == tags.dtype
    assert cut[0, 0] == 598 and cut[0, -1] == 599 and cut[1].tolist() == [598, 599] + [0] * 10
    parts = len(first_merges_bpe("photographers", 600))
    assert np.flatnonzero(cut_tags[0]).tolist() == [parts] and cut_tags[0, parts] == 1
    assert not cut_tags[1].any()

    same, same_tags = text.restrict(tokens, tags, 49408)
    np.testing.assert_array_equal(same, tokens)
    np.testing.assert_array_equal(same_tags, tags)


@pytest.mark.parametrize("size", [0, 513, 49409])
def test_impossible_vocabularies_are_named(size):
    with pytest.raises(UserError, match=f"vocabulary of {size}"):
        text.Tokenizer(size)
    with pytest.raises(UserError, match=f"vocabulary of {size}"):
        text.restrict(np.zeros((1, 4), np.int32), np.zeros((1, 4), np.int8), size)


def test_decode():
    assert tokenizer().decode(tokenizer().encode("A man's  Dog.")) == "a man 's dog . "
    strum = ids_of("strummingly")
    assert not tokenizer().decode(strum[:1]).endswith(" ")
    with pytest.raises(ValueError, match="token 49408"):
        tokenizer().decode([49408])


@hypothesis.given(st.text(max_size=60))
@hypothesis.settings(deadline=None, max_examples=200)
def test_pieces_cover_the_text_in_order(caption):
    lowered, at = text.clean(caption).lower(), 0
    for piece in tokenizer().pieces(caption):
        assert piece.ids and at <= piece.start < piece.end <= len(lowered)
        word = lowered[piece.start : piece.end]
        assert tokenizer().decode(piece.ids) == word + " "
        assert sum(tokenizer().piece_bytes(piece.ids)) == len(word.encode())
        at = piece.end


# Directories in Hugging Face's format.


def write_directory(path: Path, merges: int = 3, layout: str = "json") -> Path:
    path.mkdir()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    symbols = [chr(b) for b in printable] + [chr(256 + n) for n in range(len(others))]
    pairs = [("a", "b</w>"), ("c", "ab</w>"), ("d", "e")][:merges]
    names = [*symbols, *(s + "</w>" for s in symbols), *("".join(p) for p in pairs)]
    vocab = {n: i for i, n in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}
    lines = [" ".join(p) for p in pairs]
    if layout == "json":
        model = {"type": "BPE", "vocab": vocab, "merges": lines}
        (path / "tokenizer.json").write_text(json.dumps({"model": model}))
    else:
        (path / "vocab.json").write_text(json.dumps(vocab))
        (path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")
    return path


@pytest.mark.parametrize("layout", ["json", "txt"])
def test_a_directory_brings_its_own_vocabulary(tmp_path, layout):
    own = text.Tokenizer.from_directory(write_directory(tmp_path / "clip", layout=layout))
    assert (own.vocab_size, own.start, own.end) == (517, 515, 516)
    letters = {c: ord(c) - 33 for c in "abcde"}
    want = [515, 513, 514, letters["a"] + 256, 516]  # "cab" whole, "de" + "a</w>"
    assert own.encode("CAB dea", 8).tolist() == [*want, 0, 0, 0]
    assert own.decode(want) == "cab dea "
    fewer = text.Tokenizer.from_directory(tmp_path / "clip", 515)
    assert fewer.encode("cab", 4).tolist() == [513, letters["c"], 512, 514]


def test_directories_that_are_not_clips_are_named(tmp_path):
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor vocab\.json"):
        text.Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json: not JSON"):
        text.Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}, "merges": ["a b"]}}')
    with pytest.raises(UserError, match="the merge 'a b' is not in the vocabulary"):
        text.Tokenizer.from_directory(tmp_path)
    path = write_directory(tmp_path / "other") / "tokenizer.json"
    model = json.loads(path.read_text())
    model["model"]["vocab"]["a"], model["model"]["vocab"]["b"] = 65, 64
    path.write_text(json.dumps(model))
    with pytest.raises(UserError, match="not in CLIP's order"):
        text.Tokenizer.from_directory(tmp_path / "other")


# Nouns and verbs.


class EveryWord:
    """Tagger that splits at spaces and gives all words one tag."""

    def __init__(self, upos: str):
        self.upos = upos

    def tag(self, texts):
        out = []
        for caption in texts:
            words, at = [], 0
            for word in caption.split(" "):
                words.append(text.Word(word, at, at + len(word), self.upos, word))
                at += len(word) + 1
            out.append(words)
        return out


@hypothesis.given(st.lists(st.text(min_size=1, max_size=12), max_size=8), st.integers(2, 77))
@hypothesis.example(["İİİ", "İstanbul", "naïve-ish", "dog&#39;s", "&amp;lt;b", "fiancÃ©"], 77)
@hypothesis.settings(deadline=None, max_examples=200)
def test_a_tag_stands_where_its_word_ends(words, length):
    caption = " ".join(words)
    parsed = text.parse(caption, tokenizer(), EveryWord("NOUN"), length)
    np.testing.assert_array_equal(parsed.tokens, tokenizer().encode(caption, length))
    assert len(parsed.nouns) == (parsed.tags == text.NOUN).sum()
    lowered = text.clean(caption).lower().split(" ")
    hypothesis.assume(all(text.clean(w).lower() == w for w in lowered))  # else not word by word
    end = 1
    for word in lowered:
        pieces = tokenizer().pieces(word)
        end += sum(len(p.ids) for p in pieces)
        if pieces and pieces[-1].end == len(word) and end <= length - 1:
            assert parsed.tags[end - 1] == text.NOUN, word
    last = int((parsed.tokens == END).argmax())
    assert not parsed.tags[last:].any() and not parsed.tags[0]


def places(parsed: text.Parsed, tag: int) -> list[str]:
    """Return the piece at each tag."""
    return [tokenizer().decode([i]).strip() for i in parsed.tokens[parsed.tags == tag]]


def test_nouns_and_verbs():
    caption = "A man is playing the guitar and then he plays a song; they were dancing in Paris."
    parsed = text.parse(caption, tokenizer(), tagger())
    assert parsed.nouns == places(parsed, text.NOUN) == ["man", "guitar", "song"]
    assert parsed.verbs == ["play", "dance"]  # one per lemma; `is` and `were` are auxiliaries
    assert places(parsed, text.VERB) == ["playing", "dancing"]
    assert places(parsed, text.PROPN) == ["paris"]
    assert parsed.tokens.dtype == np.int32 and parsed.tags.dtype == np.uint8


def test_a_word_of_several_pieces_has_its_tag_at_the_last():
    parsed = text.parse("the ukuleleists are dancing", tokenizer(), tagger())
    pieces = ids_of("ukuleleists")
    assert len(pieces) > 1 and parsed.tags[2 : 2 + len(pieces)].tolist() == [0] * (
        len(pieces) - 1
    ) + [text.NOUN]


def test_words_that_were_cut_off_have_no_tag():
    parsed = text.parse("a dog chases a cat in the garden", tokenizer(), tagger(), 6)
    assert parsed.nouns == ["dog"] and parsed.tags.tolist()[2] == text.NOUN
    assert parsed.tags[-1] == 0 and len(parsed.tokens) == 6


AWKWARD = [
    "",
    " ",
    "\x00\x01\x1b[0m",
    "🎸👨‍👩‍👧 🇺🇸",
    "قطة تلعب بالكرة",
    "\u202eright to left\u202c",
    "\ud83d lone surrogate",
    "A DOG RUNS",
    "a&nbsp;dog &lt;runs&gt;",
    "İİİ dogs run",
    "word " * 10_000,
    "x" * 20_000,
    "\n\n\t",
]


def test_no_text_stops_the_parser():
    for caption, parsed in zip(
        AWKWARD, text.parse_many(AWKWARD, tokenizer(), tagger()), strict=True
    ):
        assert parsed.tokens[0] == START and (parsed.tokens == END).sum() == 1
        one = text.parse(caption, tokenizer(), tagger())
        np.testing.assert_array_equal(one.tags, parsed.tags)
    assert text.parse_many([], tokenizer(), tagger()) == []
    for caption in AWKWARD:  # not cleaned
        for word in tagger().tag(caption):
            assert len(word.word) == word.end - word.start


def test_spans_are_into_the_text_as_given():
    caption = "  Two  DOGS\tare running"
    words = tagger().tag(caption)
    assert [caption[w.start : w.end] for w in words] == ["Two", "DOGS", "are", "running"]
    assert words[-1].upos == "VERB" and words[-1].lemma == "run"


def test_missing_and_useless_pipelines_are_named(tmp_path):
    import spacy

    with pytest.raises(UserError, match="python -m spacy download en_core_web_absent"):
        text.Tagger("en_core_web_absent")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(UserError, match="sets no part of speech"):
        text.Tagger(str(tmp_path / "blank"))
    (tmp_path / "broken").mkdir()
    with pytest.raises(UserError, match="cannot load it"):
        text.Tagger(str(tmp_path / "broken"))


def test_a_users_own_pipeline_is_read(tmp_path):
    import spacy

    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("attribute_ruler")
    ruler.add([[{"ORTH": "dog"}]], {"POS": "NOUN"})
    ruler.add([[{"ORTH": "runs"}]], {"POS": "VERB", "LEMMA": "scurry"})
    nlp.to_disk(tmp_path / "own")
    parsed = text.parse("a dog runs", tokenizer(), text.Tagger(str(tmp_path / "own")))
    assert parsed.nouns == ["dog"] and parsed.verbs == ["scurry"]


def test_tokens_need_neither_spacy_nor_ftfy():
    code = (
        "import sys; from stoa_jax import text; text.Tokenizer().encode('a dog');"
        "assert not {'spacy', 'ftfy', 'jax'} & sys.modules.keys(), 'imported too early'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
