import fnmatch
import os
import re
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import documents
import errors
import pytest
from documents import DOCUMENTS, ROOT

from stoa_jax import joint_loss

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
named = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))


@named
def test_links_lead_somewhere(path):
    for match in LINK.finditer(path.read_text()):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = unquote(target).partition("#")
        there = (path.parent / file).resolve() if file else path
        if "reference" in there.parts and there.suffix == ".md":
            continue  # written when the site is built
        assert there.exists(), f"{path.name}: {target} leads nowhere"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{path.name}: no heading {target}"


def test_no_page_has_the_name_of_one_that_sphinx_writes():
    names = {path.stem for path in DOCUMENTS}
    assert not names & {"search", "genindex", "py-modindex"}


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub and MyST derive from a page's headings."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads}


@named
def test_blocks_that_need_hardware_say_so_in_known_words(path):
    for example in documents.parse(path):
        assert set(documents.needs(example).split(", ")) <= {"", *documents.WANTS}


def test_most_blocks_are_run(capsys):
    """Count the blocks that the documentation's test runs, and those that it only parses."""
    blocks = [
        example
        for path in DOCUMENTS
        for example in documents.parse(path)
        if not documents.is_output(example)
    ]
    wants = Counter(documents.needs(example) for example in blocks)
    run = wants.pop("", 0)
    with capsys.disabled():
        why = ", ".join(f"{count} {what}" for what, count in sorted(wants.items()))
        print(f"\n{run} blocks of the documentation are run, {wants.total()} parsed ({why})")
    assert run > wants.total()


def test_outputs_are_compared_word_by_word():
    assert documents.same_output("a 0.99  match\n", "a 0.9913 match")
    assert documents.same_output("…/x.mp4 3\nb …", "/tmp/x.mp4 3\nb c d")
    assert not documents.same_output("a 0.99 match", "a 0.90 match")
    assert not documents.same_output("a 0.99 match", "a 0.99 no match")
    assert not documents.same_output("a", "a\nb")


def test_every_configuration_key_has_a_meaning():
    sys.path.insert(0, str(ROOT / "docs" / "_ext"))
    import generated_pages

    keys = generated_pages.config_keys() + generated_pages.model_fields()
    assert [key.name for key in keys if not key.meaning] == []


@pytest.mark.docs
@pytest.mark.timeout(1800)
@named
def test_the_blocks_run(path, tmp_path, monkeypatch):
    for name in ("configs", "launch", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    # A recipe adds a loss; the pages behind it must not see it.
    monkeypatch.setattr(joint_loss, "LOSSES", dict(joint_loss.LOSSES))
    monkeypatch.setenv("PATH", documents.environment()["PATH"])
    for example in documents.parse(path):
        try:
            example.evaluate()
        except Exception as error:
            raise AssertionError(f"{path}:{example.line}: {error}") from error
    assert os.getcwd() == str(tmp_path)


def families() -> dict[str, tuple[list[str], str]]:
    """Return the sections of the troubleshooting page: modules that each covers, and text."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    found = {}
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        head, _, body = section.partition("\n")
        modules = re.search(r"<!-- errors: (.+?) -->", body)
        found[head] = (modules[1].split(", ") if modules else [], body)
    return found


def test_every_family_of_errors_says_how_to_fix_it():
    for head, (modules, body) in families().items():
        assert modules, f"{head}: names no modules"
        assert re.search(r"^\*\*Fix\.\*\* \S", body, re.M), f"{head}: says no fix"


def test_every_error_belongs_to_a_family_and_is_a_message():
    patterns = [pattern for modules, _ in families().values() for pattern in modules]
    raised = errors.collect()
    assert len(raised) > 200  # the collector still finds them
    for error in raised:
        where = f"stoa_jax/{error.module}:{error.line}"
        covered = any(fnmatch.fnmatch(error.module, pattern) for pattern in patterns)
        assert covered, f"{where} belongs to no section of docs/troubleshooting.md"
        assert re.search(r"\w|\{\}", error.message), f"{where} has no message"
    for pattern in patterns:
        assert fnmatch.filter([error.module for error in raised], pattern), f"{pattern}: no error"
