"""Write the reference pages that follow from the code: configuration keys and the command line."""

import argparse
import ast
import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "reference"


@dataclasses.dataclass(frozen=True)
class Key:
    """One configuration key, its default, and the comment beside it in the source."""

    name: str
    default: Any
    meaning: str


def config_keys() -> list[Key]:
    """Return every key of `stoa_jax.config.default()` except the model's, in source order."""
    from stoa_jax import config
    from stoa_jax.workdir import flat_config

    defaults = flat_config(config.default())
    comments = _comments(ROOT / "stoa_jax" / "config.py")
    keys = []
    for name, value in defaults.items():
        if name.startswith("model."):
            continue
        section = name.rpartition(".")[0]
        keys.append(Key(name, value, comments.get(name) or comments.get(section, "")))
    return keys


def model_fields() -> list[Key]:
    """Return every field of `ModelConfig` with its default in the variant `base`."""
    from stoa_jax.models.config import ModelConfig

    comments = _comments(ROOT / "stoa_jax" / "models" / "config.py")
    return [
        Key(f"model.{f.name}", f.default, comments.get(f.name, ""))
        for f in dataclasses.fields(ModelConfig)
    ]


def _comments(path: Path) -> dict[str, str]:
    """Map assigned names of a source file to the comment at their line, or the lines above it."""
    lines = path.read_text().splitlines()
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Assign):
            targets = node.targets
        else:
            continue
        comment = _comment_of(lines, node)
        for target in targets:
            name = ast.unparse(target).removeprefix("c.")
            if comment and re.fullmatch(r"[\w.]+", name):
                found.setdefault(name, comment)
    return found


def _comment_of(lines: list[str], node: ast.stmt) -> str:
    _, mark, trailing = lines[(node.end_lineno or node.lineno) - 1].partition("  # ")
    if mark:
        return trailing.strip()
    above = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.strip().startswith("# "):
            break
        above.insert(0, line.strip().removeprefix("# "))
    return " ".join(above)


def config_page() -> str:
    """Return the page of all configuration keys in Markdown."""
    parts = [
        "# Configuration keys",
        "Set any of these by flag: `--config.train.batch_size=256`. A key that does not exist is "
        "an error that names the nearest one. The defaults below are those of the variant `base`; "
        "the files in `configs/` override some of them.",
    ]
    section = None
    for key in config_keys():
        head = key.name.rpartition(".")[0] or "top level"
        if head != section:
            section = head
            parts += [f"## `{head}`", _table_head()]
        parts[-1] += f"\n{_row(key)}"
    parts += ["## `model`", _table_head() + "".join(f"\n{_row(k)}" for k in model_fields())]
    return "\n\n".join(parts) + "\n"


def _table_head() -> str:
    return "| key | default | meaning |\n|---|---|---|"


def _row(key: Key) -> str:
    default, meaning = (str(text).replace("|", "\\|") for text in (key.default, key.meaning))
    return f"| `{key.name}` | `{default or '(empty)'}` | {meaning} |"


def command_page() -> str:
    """Return the help texts of `stoa` and its subcommands in Markdown."""
    from stoa_jax import cli

    parts = ["# Command line", "What each command prints with `--help`."]
    for words in ([], *_commands(cli.parser())):
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            cli.main([*words, "--help"])
        parts.append(f"## `{' '.join(['stoa', *words])}`\n\n```text\n{text.getvalue()}```")
    return "\n\n".join(parts) + "\n"


def _commands(parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    """Yield the words of every subcommand of a parser, those of subcommands included."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield [name]
                yield from ([name, *words] for words in _commands(inner))


def write_pages(*_: Any) -> None:
    """Write all generated pages into docs/reference."""
    OUT.mkdir(exist_ok=True)
    for name, text in (("config.md", config_page()), ("cli.md", command_page())):
        path = OUT / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
