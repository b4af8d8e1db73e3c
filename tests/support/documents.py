"""Find and run the code blocks of the documentation.

A block is preceded by `<!-- needs: WHAT -->` if it needs an accelerator, published data, a
network or more than two minutes, or if it runs until it is stopped. Such a block is parsed but not
run: flags must exist and configurations must load. Blocks of one document run in order, in one
directory that holds only the checkout's `configs`, `docs` and `launch`; Python blocks share their
names. A `text` block directly after a block that ran shows its output, and is compared with it.
"""

import ast
import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).resolve().parents[2]
WANTS = ("accelerator", "checkout", "data", "minutes", "network", "server", "tpu")
NEEDS = re.compile(r"<!-- needs: ([\w ,]+) -->\s*\n*\s*$")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS = [
    path
    for path in DOCUMENTS
    if path.exists() and not {"_build", "reference"} & set(path.relative_to(ROOT).parts)
]


def parse(path: Path) -> Document:
    """Return a document with its Python, shell and output blocks as examples."""
    parsers = [
        CodeBlockParser("python", _python),
        CodeBlockParser("sh", _shell),
        CodeBlockParser("bash", _shell),
        CodeBlockParser("text", _output),
    ]
    return Sybil(parsers=parsers, path=str(path.parent)).parse(path)


def needs(example: Example) -> str:
    """Return what a block needs that a test machine lacks; empty if it can be run."""
    found = NEEDS.search(example.document.text[: example.region.start])
    return found[1] if found else ""


def is_output(example: Example) -> bool:
    """Return whether a block shows text rather than code."""
    fence = example.document.text[example.region.start :].lstrip().partition("\n")[0]
    return fence.strip("`~ ") == "text"


def _python(example: Example) -> None:
    code = str(example.parsed)
    tree = ast.parse(code)
    if needs(example):
        return
    where = f"{example.path}:{example.line}"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, where, "exec"), example.document.namespace)
    _keep(example, printed.getvalue())


def _shell(example: Example) -> None:
    text = str(example.parsed)
    if needs(example):
        check_commands(text)
        return
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], capture_output=True, text=True, env=environment()
    )
    if done.returncode:
        raise AssertionError(
            f"exit code {done.returncode} of:\n{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    _keep(example, done.stdout)


def _keep(example: Example, printed: str) -> None:
    example.document.namespace["_printed"] = example.region.end, printed


def _output(example: Example) -> None:
    end, printed = example.document.namespace.get("_printed", (0, ""))
    if example.document.text[end : example.region.start].strip():
        return  # other text stands between: a drawing, or the output of a block that was not run
    shown = str(example.parsed)
    assert same_output(shown, printed), f"shown:\n{shown}\nprinted:\n{printed}"


def same_output(shown: str, printed: str) -> bool:
    """Compare outputs word by word.

    Numbers may differ by 0.02. "…" stands for the beginning of a word, or for the rest of a line.
    """
    shown_lines, lines = shown.strip().splitlines(), printed.strip().splitlines()
    return len(shown_lines) == len(lines) and all(map(_same_line, shown_lines, lines))


def _same_line(shown: str, printed: str) -> bool:
    wanted, words = shown.split(), printed.split()
    if wanted and wanted[-1] == "…":
        wanted = wanted[:-1]
        words = words[: len(wanted)]
    return len(wanted) == len(words) and all(map(_same_word, wanted, words))


def _same_word(shown: str, printed: str) -> bool:
    if shown.startswith("…"):
        return printed.endswith(shown.removeprefix("…"))
    number = re.compile(r"-?\d+\.\d+")
    if number.sub("", shown) != number.sub("", printed):
        return False
    values = zip(number.findall(shown), number.findall(printed), strict=True)
    return all(float(a) == pytest.approx(float(b), abs=0.02) for a, b in values)


def environment() -> dict[str, str]:
    """Return an environment in which `python` and `stoa` are those of the tests."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",  # as on the user's machine, without the flags of the tests
    }


def check_commands(text: str) -> None:
    """Check that the commands of a block exist and know their flags, without running them."""
    subprocess.run(["bash", "-n", "-c", text], check=True)
    for line in text.replace("\\\n", " ").splitlines():
        words = _words(line)
        if words[:2] == ["python", "-m"] and words[2].startswith("stoa_jax"):
            _check_flags(words[2], words[3:])
        elif words[:1] == ["stoa"]:
            _check_stoa(words[1:])
        elif words and words[0].endswith(".sh") and words[0].startswith("launch/"):
            assert (ROOT / words[0]).exists(), f"{line}: there is no {words[0]}"


def _words(line: str) -> list[str]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return []
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # environment
        words = words[1:]
    return words


def _check_flags(module: str, arguments: list[str]) -> None:
    known = _help(module)
    for argument in arguments:
        if argument == "--":
            return  # what follows is for another program
        if not argument.startswith("--"):
            continue
        flag = argument.partition("=")[0]
        if flag.startswith("--config."):
            from stoa_jax.config_flags import known_keys

            assert flag.removeprefix("--config.") in known_keys(), f"{flag}: no such key"
        elif flag == "--config":
            _load(argument.partition("=")[2])
        else:
            assert flag in known, f"python -m {module}: no flag {flag}"


def _check_stoa(arguments: list[str]) -> None:
    """Check a command with the parser of `stoa` itself."""
    from stoa_jax import cli

    operators = {"&", "|", ">", "&&", ";"}
    end = next((i for i, word in enumerate(arguments) if word in operators), len(arguments))
    try:
        cli.parser().parse_args(arguments[:end])
    except SystemExit as error:
        raise AssertionError(f"stoa {shlex.join(arguments)}: not a command") from error


@functools.cache
def _help(module: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    return done.stdout + done.stderr


def _load(config: str) -> None:
    from stoa_jax.sweep import load_module

    path, _, argument = config.partition(":")
    argument = re.sub(r"from=.*", "from=synthetic", argument)  # the named weights do not exist here
    if not path.startswith("configs/") or "…" in config:
        return
    module = load_module(ROOT / path)
    make = getattr(module, "get_config", None) or module.sweep
    make(argument) if argument else make()
