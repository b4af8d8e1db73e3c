"""Collect every user error that the package raises, from its source."""

import ast
import dataclasses
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "stoa_jax"


@dataclasses.dataclass(frozen=True)
class Raised:
    """One `raise` of `UserError` or a subclass; {} stands for values in its message."""

    module: str  # relative to the package, data/build/run.py
    line: int
    message: str


def collect() -> list[Raised]:
    """Return every `raise UserError(...)`, subclasses included, whose message is in the source."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    kinds = _subclasses(trees.values())
    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = node.exc.func.id if isinstance(node.exc.func, ast.Name) else ""
                if name in kinds and node.exc.args:
                    message = _text(node.exc.args[-1])
                    found.append(Raised(str(path.relative_to(PACKAGE)), node.lineno, message))
    return found


def _subclasses(trees) -> set[str]:
    bases = {
        node.name: {ast.unparse(base).split(".")[-1] for base in node.bases}
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    kinds = {"UserError"}
    while more := {name for name, of in bases.items() if of & kinds} - kinds:
        kinds |= more
    return kinds


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.IfExp):
        return _text(node.body)
    return "{}"
