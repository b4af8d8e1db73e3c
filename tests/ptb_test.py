"""Our PTB tokeniser against tokens of the Java one."""

import json
import pathlib

import pytest

from stoa_jax.metrics import coco, ptb

GOLDEN = pathlib.Path(__file__).parent / "data" / "ptb.json"


def test_equals_the_java_tokeniser_on_varied_captions():
    texts, tokens = json.loads(GOLDEN.read_text())
    assert len(texts) == 500
    assert [" ".join(line) for line in ptb.tokenize(texts)] == tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", ""),
        ("   ", ""),
        ("a man is playing a guitar", "a man is playing a guitar"),
        ("A man isn't singing.", "a man is n't singing ."),
        ("the dogs' ball, it's red!", "the dogs ' ball , it 's red !"),
        ('he says "hello" (twice)', "he says `` hello '' -lrb- twice -rrb-"),
        ("cannot Gonna 'tis", "can not gon na 't is"),
        ("well-known 5-year-old", "well-known 5-year-old"),
        ("$5.50, 1,000 and 50%", "$ 5.50 , 1,000 and 50 %"),
        ("the U.S. team at 5 p.m.", "the u.s. team at 5 p.m."),
        ("wait... what…", "wait ... what ..."),
        ("cafés 😀 in 日本", "cafés in 日本"),
        ("see www.foo.com/ab or a@b.org", "see www.foo.com/ab or a@b.org"),
        ("two\nlines\u2028of text", "two lines of text"),
    ],
)
def test_single_captions(text, tokens):
    assert " ".join(ptb.tokenize([text])[0]) == tokens


def test_the_next_caption_tells_whether_an_abbreviation_ends_a_sentence():
    assert ptb.tokenize(["made in the U.S.", "The end"])[0][-1] == "."
    assert ptb.tokenize(["made in the U.S.", "an end"])[0][-1] == "u.s."


def test_punctuation_is_left_out_of_what_is_scored():
    assert ptb.caption_words(['A man, "singing"; loudly...']) == ["a man singing loudly"]


@pytest.mark.java
def test_equals_the_java_tokeniser_live():
    texts, _ = json.loads(GOLDEN.read_text())
    assert ptb.tokenize(texts) == coco.java_tokenize(texts)
