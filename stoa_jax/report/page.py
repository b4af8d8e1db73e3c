"""The report as HTML: light and dark, for phones and wider screens, in one file."""

import html
from collections.abc import Iterable, Sequence

from stoa_jax.report.examples import Example, Group
from stoa_jax.report.tables import ABLATED, Line, number

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --paper: #fff; --soft: #59636e; --line: #d1d9e0;
  --panel: #f6f8fa; --good: #1a7f37; --bad: #cf222e; --curve: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --soft: #9198a1;
  --line: #3d444d; --panel: #151b23; --good: #3fb950; --bad: #f85149; --curve: #56b4e9; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { margin: .5rem 0 0; font-size: 1.6rem; } h2 { margin: 2.5rem 0 .5rem; font-size: 1.25rem; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
nav a { margin-right: 1rem; display: inline-block; padding: .25rem 0; }
a { color: inherit; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.notes { border-left: 4px solid var(--bad); padding: .25rem 1rem; background: var(--panel); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th, td summary { white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td summary { cursor: pointer; } td details p { margin: .25rem 0; max-width: 40rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr));
  gap: 1rem; }
figure, .card { margin: 0; border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-weight: 600; font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  gap: 1rem; }
.card.good-card { border-left: 4px solid var(--good); }
.card.bad-card { border-left: 4px solid var(--bad); }
.card h4 { margin: 0; font-size: .9rem; }
.film { overflow-x: auto; } .film img { height: 6rem; width: auto; display: block; }
.film.large img { height: 10rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .75rem; margin: .5rem 0 0;
  font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; }
ul.matches { display: flex; flex-wrap: wrap; gap: .4rem; padding: 0; list-style: none;
  margin: .5rem 0; font-size: .9rem; }
ul.matches li { border: 1px solid var(--line); border-left: .5rem solid var(--line);
  border-radius: .25rem; padding: 0 .5rem; }
"""


def text(value: object) -> str:
    """Escape a value as HTML text."""
    return html.escape(str(value), quote=True)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a table of HTML cells with the columns `numbers` aligned right."""

    def cell(tag: str, i: int, content: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        kind = ' class="number"' if i in numbers else ""
        return f"<{tag}{scope}{kind}>{content}</{tag}>"

    head = "".join(cell("th", i, text(name)) for i, name in enumerate(header))
    body = "\n".join(
        "<tr>" + "".join(cell("td", i, c) for i, c in enumerate(row)) + "</tr>" for row in rows
    )
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="table"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def results(lines: Sequence[Line]) -> str:
    """Return the table of metrics beside their baselines."""
    columns = [name for name in ABLATED.values() if any(name in line.ablated for line in lines)]
    header = ("metric", "n", "model", "trivial baseline", *columns)
    rows = []
    for line in lines:
        mark = " (partial)" if line.partial else ""
        name = f"<details><summary>{text(line.metric)}{mark}</summary><p>{text(line.protocol)}</p>"
        kind = {True: "good", False: "bad", None: ""}[line.beats_trivial]
        sign = {True: " ▲", False: " ▼", None: ""}[line.beats_trivial]
        trivial = f"{number(line.trivial)} ({line.trivial_name})" if line.trivial_name else "–"
        rows.append(
            (
                name + "</details>",
                str(line.n),
                f'<b class="{kind}">{text(number(line.value))}{sign}</b>',
                text(trivial),
                *(text(number(line.ablated.get(name))) for name in columns),
            )
        )
    legend = (
        '<p class="soft">▲ better than the trivial baseline, ▼ not better. '
        "Open a metric to see how it was measured.</p>"
    )
    return legend + table(header, rows, numbers=range(1, len(header)))


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a list of terms and values."""
    return "<dl>" + "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in pairs) + "</dl>"


def folded(summary: str, content: str) -> str:
    """Return content that is shown when its summary is opened."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def figure(name: str, svg: str) -> str:
    """Return one plot with its name."""
    return f"<figure><figcaption>{text(name)}</figcaption>{svg}</figure>"


def film(address: str, label: str, large: bool = False) -> str:
    """Return a film strip that scrolls sideways if it is too wide."""
    kind = "film large" if large else "film"
    return (
        f'<div class="{kind}" tabindex="0" role="region" aria-label="{text(label)}">'
        f'<img src="{address}" alt="{text(label)}"></div>'
    )


def example(item: Example) -> str:
    """Return one example as a card."""
    kind = {True: "good-card", False: "bad-card", None: ""}[item.good]
    score = f' <span class="soft">{text(item.score)}</span>' if item.score else ""
    picture = film(item.film, f"frames of {item.video}") if item.film else ""
    return (
        f'<div class="card {kind}"><h4>{text(item.video)}{score}</h4>{picture}'
        f"{definitions(item.said)}</div>"
    )


def group(item: Group) -> str:
    """Return the examples of one evaluation, good ones first."""
    parts = [
        f"<h3>{text(item.name)} <span class='soft'>({item.total} {text(item.kind)})</span></h3>"
    ]
    for heading, examples in (
        (item.headings[0], item.good),
        (item.headings[1], item.bad),
        ("Not judged: the true texts are not available", item.unjudged),
    ):
        if examples:
            cards = "\n".join(map(example, examples))
            parts.append(f'<p><b>{heading}</b></p><div class="cards">{cards}</div>')
    return "\n".join(parts)


def matches(title: str, address: str, items: Sequence[tuple[str, str]], facts) -> str:
    """Return a clip's film strip, and the words that trajectories and actions were matched to."""
    listed = "".join(f'<li style="border-left-color:{c}">{t}</li>' for c, t in items)
    return (
        f'<div class="card"><h4>{text(title)}</h4>{film(address, "frames with boxes", True)}'
        f'<ul class="matches">{listed}</ul>{definitions(facts)}</div>'
    )


def document(title: str, lead: str, notes: Sequence[str], sections: Sequence[tuple[str, str]]):
    """Return the whole page from (heading, HTML) sections."""
    links = "".join(f'<a href="#{_anchor(h)}">{text(h)}</a>' for h, _ in sections)
    body = "\n".join(f'<h2 id="{_anchor(h)}">{text(h)}</h2>\n{content}' for h, content in sections)
    warn = ""
    if notes:
        items = "".join(f"<li>{text(note)}</li>" for note in notes)
        warn = f'<div class="notes"><p>Not everything could be shown:</p><ul>{items}</ul></div>'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title><style>{STYLE}</style></head>
<body><header><h1>{text(title)}</h1><p class="soft">{text(lead)}</p>
<nav aria-label="sections">{links}</nav></header>
<main>{warn}
{body}
</main></body></html>
"""


def _anchor(heading: str) -> str:
    return "-".join(heading.lower().split())
