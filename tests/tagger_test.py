"""The shipped tagger on captions tagged by hand, its lemmas, and its training."""

import subprocess
import sys
from pathlib import Path

import pytest

from stoa_jax import text
from stoa_jax.errors import UserError
from stoa_jax.tagger import evaluate, treebank
from stoa_jax.text.lemmatize import VerbLemmatizer

DATA = Path(__file__).parent / "data"
MODEL = Path(evaluate.__file__).parent / "model"


def test_captions_tagged_by_hand():
    captions = evaluate.read_captions(DATA / "captions_tagged.tsv")
    figures = evaluate.on_captions(text.Tagger(), captions)
    assert len(captions) == 100
    assert figures["F1 NOUN"] >= 0.93 and figures["F1 VERB"] >= 0.88, figures


def test_the_model_is_small_and_names_its_source():
    files = [p for p in MODEL.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 4_000_000
    note = (MODEL / "LICENSE").read_text()
    assert "UD English EWT" in note and "CC BY-SA 4.0" in note


@pytest.mark.parametrize(
    ("form", "lemma"),
    [line.split() for line in """
    is be|went go|took take|sings sing|singing sing|hoping hope|hopping hop|pushes push|goes go
    flies fly|lying lie|tying tie|strumming strum|juggling juggle|whisking whisk|decorating decorate
    filling fill|passing pass|travelling travel|skating skate|peeled peel|diced dice|stirs stir
    playin' play|Running run|king king|rewrote rewrite|dribbles dribble|unboxing unbox
    """.replace("\n", "|").split("|") if line.strip()],
)  # fmt: skip
def test_verb_lemmas(form, lemma):
    assert VerbLemmatizer.from_file(MODEL / "lemmas.json")(form) == lemma


CONLLU = """# text = They don't run dogs.
1\tThey\tthey\tPRON\tPRP\t_\t4\tnsubj\t_\t_
2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdo\tdo\tAUX\tVBP\t_\t4\taux\t_\t_
3\tn't\tnot\tPART\tRB\t_\t4\tadvmod\t_\t_
4\trun\trun\tVERB\tVB\t_\t0\troot\t_\t_
4.1\tgone\tgo\tVERB\tVB\t_\t_\t_\t_\t_
5\tdogs\tdog\tNOUN\tNNS\t_\t4\tobj\t_\tSpaceAfter=No
6\t.\t.\tPUNCT\t.\t_\t4\tpunct\t_\t_

# text = A big cat slept quietly
1\tA\ta\tDET\tDT\t_\t3\tdet\t_\t_
2\tbig\tbig\tADJ\tJJ\t_\t3\tamod\t_\t_
3\tcat\tcat\tNOUN\tNN\t_\t4\tnsubj\t_\t_
4\tslept\tsleep\tVERB\tVBD\t_\t0\troot\t_\t_
5\tquietly\tquietly\tADV\tRB\t_\t4\tadvmod\t_\t_

"""


def write_treebank(path: Path) -> Path:
    path.mkdir()
    for split in ("train", "dev", "test"):
        (path / f"{split}.conllu").write_text(CONLLU)
    return path


def test_the_treebank_is_read_as_its_text_was_written(tmp_path):
    first, second = treebank.read_split(write_treebank(tmp_path / "ud"), "train")
    assert first.text == "They don't run dogs."
    assert first.upos == ["PRON", "AUX", "PART", "VERB", "NOUN", "PUNCT"]
    assert first.lemmas[3] == "run" and first.heads == [3, 3, 3, -1, 3, 3]
    assert second.text == "A big cat slept quietly"
    spans = [first.text[a:b] for a, b, _ in evaluate.spans_of(first)]
    assert spans == ["They", "do", "n't", "run", "dogs", "."]


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no train\.conllu"):
        treebank.read_split(tmp_path, "train")
    (tmp_path / "train.conllu").write_text("1\tThey\n")
    with pytest.raises(UserError, match=r"train\.conllu:1: 2 columns"):
        treebank.read_split(tmp_path, "train")
    (tmp_path / "captions.tsv").write_text("a dog\ta/DET dog/NOUN\na cat\ta/DET dog/NOUN\n")
    with pytest.raises(UserError, match=r"captions\.tsv:2: 'dog/NOUN'"):
        evaluate.read_captions(tmp_path / "captions.tsv")


def test_f1_counts_spans_and_tags():
    gold = [{(0, 1, "NOUN"), (2, 3, "VERB")}, {(0, 2, "NOUN")}]
    found = [{(0, 1, "NOUN"), (2, 3, "NOUN")}, {(0, 3, "NOUN")}]
    assert evaluate.f1(found, gold, "NOUN") == pytest.approx(2 * 1 / (3 + 2))
    assert evaluate.f1(found, gold, "VERB") == 0
    assert evaluate.f1(gold, gold, "VERB") == 1


def test_training_makes_a_tagger_that_loads(tmp_path):
    source = write_treebank(tmp_path / "ud")
    command = [sys.executable, "-m", "stoa_jax.tagger.train", f"--treebank={source}"]
    command += [f"--out={tmp_path / 'model'}", "--epochs=40", "--made=0", "--captions=0"]
    subprocess.run(command, check=True, timeout=200, capture_output=True)
    words = text.Tagger(str(tmp_path / "model")).tag("A big cat slept quietly")
    assert [w.upos for w in words] == ["DET", "ADJ", "NOUN", "VERB", "ADV"]
    assert words[3].lemma == "sleep"
