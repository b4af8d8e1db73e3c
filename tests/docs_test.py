import os
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import documents
import pytest
from documents import DOCUMENTS, ROOT

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


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub and MyST make of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads}


@named
def test_blocks_that_need_hardware_say_so_in_known_words(path):
    for example in documents.parse(path):
        assert set(documents.needs(example).split(", ")) <= {
            "", "accelerator", "data", "minutes", "network", "tpu", "checkout",
        }  # fmt: skip


def test_every_configuration_key_has_a_meaning():
    sys.path.insert(0, str(ROOT / "docs" / "_ext"))
    import generated_pages

    keys = generated_pages.config_keys() + generated_pages.model_fields()
    assert [key.name for key in keys if not key.meaning] == []


@pytest.mark.docs
@pytest.mark.timeout(1800)
@named
def test_the_blocks_run(path, tmp_path, monkeypatch):
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", documents.environment()["PATH"])
    for example in documents.parse(path):
        try:
            example.evaluate()
        except Exception as error:
            raise AssertionError(f"{path}:{example.line}: {error}") from error
    assert os.getcwd() == str(tmp_path)
