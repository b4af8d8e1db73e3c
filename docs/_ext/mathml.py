"""Render formulas as MathML while the site is built: pages then load no script from elsewhere."""

import re
from typing import Any

import latex2mathml.converter
from docutils import nodes

_NUMBER = re.compile(r"\\tag\{(\w+)\}")


def formula(tex: str, display: str) -> str:
    """Return the MathML of a formula; a `\\tag` becomes a number at the right."""
    number = _NUMBER.search(tex)
    written = latex2mathml.converter.convert(_NUMBER.sub("", tex).strip(), display=display)
    return written + (f'<span class="eqno">({number[1]})</span>' if number else "")


def _inline(self: Any, node: nodes.math) -> None:
    self.body.append(formula(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{formula(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
