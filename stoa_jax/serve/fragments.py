"""Parts of the page as HTML: results, a clip's film, matches, messages."""

import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stoa_jax import film
from stoa_jax.serve.finder import Moment

if TYPE_CHECKING:
    from stoa_jax.inference.explain import Explanation
    from stoa_jax.inference.matched import Action, Trajectory
    from stoa_jax.inference.model import Answer

HEIGHT = 140  # pixels of a frame in the film
ATTENTION_HEIGHT = 84

STYLE = """
.dark { color-scheme: dark; }
.gradio-container { max-width: 76rem !important; margin: 0 auto !important; }
.page h1 { font-size: 1.6rem; font-weight: 700; margin: 0; }
.page h2 { font-size: 1.2rem; font-weight: 650; margin: .25rem 0; }
.page h3 { font-size: 1rem; font-weight: 600; margin: .75rem 0 .25rem; }
.page p { margin: .25rem 0; }
.page { --soft: #59636e; } .dark .page { --soft: #a5aeb8; }
.soft { color: var(--soft); }
.message { padding: .5rem .75rem; border-left: 4px solid var(--color-accent);
  background: var(--background-fill-secondary); border-radius: .25rem; }
.message.error { border-left-color: #cf222e; }
#results { display: grid !important; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
#results > * { min-width: 0 !important; }
video { width: 100%; max-height: 60vh; background: #000; border-radius: .375rem; display: block; }
#results video { aspect-ratio: 4 / 3; }
#results > * { gap: .5rem; }
#search { align-self: center; min-height: 3rem; }
#player video { max-height: 24rem; }
.film { overflow-x: auto; width: 0; min-width: 100%; }
.film img { max-width: none; display: block; border-radius: .25rem; }
ul.matches { list-style: none; padding: 0; margin: .5rem 0; display: grid; gap: .35rem; }
ul.matches li { border-left: .6rem solid var(--border-color-primary); padding-left: .6rem; }
.when { display: inline-flex; gap: 2px; vertical-align: middle; margin-left: .5rem; }
.when i { width: .6rem; height: .8rem; border-radius: 2px;
  background: var(--border-color-primary); }
.sentence { font-size: 1.05rem; } .sentence mark { background: none; color: inherit;
  border-bottom: 4px solid var(--border-color-primary); }
.sentence mark.verb { border-bottom: 4px double currentColor; }
:focus-visible { outline: 3px solid var(--color-accent) !important; outline-offset: 2px; }
#clip-file { display: block; width: 100%; padding: .5rem 0; color: inherit; }
#clip-form label { display: block; font-weight: 600; }
@media (max-width: 640px) { .page h1 { font-size: 1.35rem; }
  #search-row { flex-direction: column; } #search-row > * { width: 100%; } }
"""

# If a video fails after the search, the page asks the server why and shows its answer instead.
SCRIPT = """
<script>
window.stoaVideoFailed = async (video) => {
  let said = "This video cannot be played.";
  try {
    const answer = await fetch(video.src.split("#")[0], {headers: {Range: "bytes=0-0"}});
    if (!answer.ok) said = (await answer.json()).error || said;
  } catch (_) { said = "The server does not answer; is it still running?"; }
  const note = document.createElement("p");
  note.className = "message error"; note.setAttribute("role", "alert"); note.textContent = said;
  video.replaceWith(note);
};
window.stoaUpload = async (limit) => {
  const file = document.getElementById("clip-file")?.files[0];
  if (!file) return ["", "choose a video file first"];
  if (file.size > limit)
    return ["", `the file is larger than the limit of ${Math.round(limit / 2 ** 20)} MB`];
  try {
    const answer = await fetch("upload", {method: "POST", body: file,
      headers: {"X-Stoa-Upload": "1", "Content-Type": "application/octet-stream"}});
    const found = await answer.json();
    return [found.token || "", found.error || ""];
  } catch (_) { return ["", "the upload failed; is the server still running?"]; }
};
window.stoaShow = (id) => {
  const place = document.getElementById(id);
  if (!place) return;
  place.setAttribute("tabindex", "-1");
  place.focus({preventScroll: true});
  place.scrollIntoView({behavior: "auto", block: "start"});
};
</script>
"""


def text(value: object) -> str:
    """Escape a value as HTML text."""
    return html.escape(str(value), quote=True)


def header() -> str:
    """Return the header of the page."""
    return (
        '<header class="page"><h1>Find a moment in your videos</h1>'
        '<p class="soft">Describe what happens, or give a clip that looks like it. Then look '
        "closer: which objects the model followed, and which word it matched to each.</p></header>"
    )


def message(said: str, error: bool = False) -> str:
    """Format a message to the visitor; screen readers announce it immediately."""
    if not said:
        return ""
    kind, role = ("message error", "alert") if error else ("message", "status")
    return f'<div class="page"><p class="{kind}" role="{role}">{text(sentence(said))}</p></div>'


def sentence(said: str) -> str:
    """Add a full stop to a message, and a capital unless it begins with a file name."""
    said = " ".join(said.split())
    first = said.split(" ", 1)[0]
    if first.isalpha():
        said = said[:1].upper() + said[1:]
    return said + ("" if said.endswith((".", "!", "?", "…")) else ".")


def upload_field(limit_bytes: int, limit_seconds: float) -> str:
    """Return the upload field for a clip, with its limits."""
    return (
        '<div class="page" id="clip-form"><label for="clip-file">A video file to search by</label>'
        f'<p class="soft" id="clip-limits">At most {limit_bytes / 2**20:.3g} MB and '
        f"{limit_seconds:.0f} seconds. It is deleted after the search.</p>"
        '<input id="clip-file" type="file" accept="video/*,.mkv,.avi" '
        'aria-describedby="clip-limits"></div>'
    )


def clock(seconds: float) -> str:
    """Format a time as 0:07 or 1:02:03."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}:{minutes:02d}:{whole % 60:02d}"
    return f"{minutes}:{whole % 60:02d}"


def span(moment: Moment) -> str:
    """Format the time span of a moment."""
    if moment.start is None or moment.end is None:
        return ""
    if round(moment.start) == round(moment.end):  # too short for the clock's resolution
        return f"{moment.start:.1f} s to {moment.end:.1f} s"
    return f"{clock(moment.start)} to {clock(moment.end)}"


def video(moment: Moment, label: str) -> str:
    """Return the player, starting at the moment, or the reason why there is none."""
    if moment.gone:
        return message(moment.gone, error=True)
    part = ""
    if moment.start is not None:
        end = "" if moment.end is None else f",{moment.end:.2f}"
        part = f"#t={moment.start:.2f}{end}"
    return (
        f'<video src="clip/{moment.row}{part}" controls playsinline preload="metadata" '
        f'aria-label="{text(label)}" onerror="stoaVideoFailed(this)"></video>'
    )


def result(number: int, moment: Moment) -> str:
    """Return one result: its player, and how well it fits."""
    label = f"Result {number}: {moment.name}"
    when = f", {span(moment)}" if span(moment) else ""
    if moment.probability is not None:
        fit = f"{100 * moment.probability:.0f} % match"
    else:
        fit = f"similarity {moment.score:.2f}"
    if moment.matched is False:
        fit += ", below the threshold"
    return (
        f'<article class="page" aria-label="{text(label)}">{video(moment, label + when)}'
        f"<h3>{number}. {text(moment.name)}</h3>"
        f'<p class="soft">{text((when + ", " + fit).lstrip(", "))}</p></article>'
    )


def summary(moments: Sequence[Moment], query: str) -> str:
    """Return the number of results, and whether any of them is a match."""
    if not moments:
        return message("the library is empty; add videos with `stoa index add`")
    gone = sum(bool(m.gone) for m in moments)
    matches, below = (sum(m.matched is is_match for m in moments) for is_match in (True, False))
    said = f"{len(moments)} moments for {query}"
    if below and not matches:
        said = f"no match for {query}: nothing reaches the threshold. The nearest moments are shown"
    elif below:
        found = "1 match" if matches == 1 else f"{matches} matches"
        said = f"{found} for {query}, and {below} near moments below the threshold"
    if gone:
        said += f"; {gone} of them cannot be shown any more"
    return message(said)


def title(moment: Moment) -> str:
    """Return the heading of the selected moment."""
    return f'<div class="page"><h2>{text(_label(moment))}</h2></div>'


def player(moment: Moment) -> str:
    """Return the player of the selected moment."""
    return f'<div class="page">{video(moment, _label(moment))}</div>'


def _label(moment: Moment) -> str:
    return f"{moment.name}, {span(moment)}" if span(moment) else moment.name


def caption(said: str) -> str:
    """Return the model's caption of the moment."""
    return f'<div class="page"><h3>Caption</h3><p>{text(said) or "(nothing)"}</p></div>'


def answers(question: str, found: "Sequence[Answer]") -> str:
    """Return answers with their probabilities."""
    items = "".join(
        f'<li>{text(a.text)} <span class="soft">{100 * a.probability:.0f} %</span></li>'
        for a in found
    )
    return f'<div class="page"><p class="soft">{text(question)}</p><ol>{items}</ol></div>'


def plain_film(frames: Sequence[np.ndarray], why: str) -> str:
    """Return the frames that the model reads, without matches."""
    picture = film.strip(frames, height=HEIGHT)
    return (
        f'<div class="page"><h3>Film</h3>{_film(picture, f"{len(frames)} frames of the clip")}'
        f'<p class="soft">{text(why)}</p></div>'
    )


def explanation(found: "Explanation") -> str:
    """Return the film with coloured trajectories, and the word that each was matched to."""
    trajectories, actions = found.trajectories, found.actions
    count = len(found.frames)
    boxes = np.zeros((len(trajectories), count, 4), np.float32)
    shown = np.zeros((len(trajectories), count), bool)
    for i, trajectory in enumerate(trajectories):
        boxes[i], shown[i] = trajectory.boxes, trajectory.shown
    names = ", ".join(t.name for t in trajectories) or "no objects"
    label = f"{count} frames of the clip with the trajectories of {names}"
    parts = [
        f'<p class="sentence">{_marked(found.text, trajectories, actions)}</p>',
        f'<p class="soft">{100 * found.probability:.0f} % that the sentence belongs to the clip'
        "</p>",
        "<h3>Film and trajectories</h3>",
        _film(film.strip(found.frames, boxes, shown, HEIGHT), label),
    ]
    if trajectories:
        items = "".join(
            f'<li style="border-left-color:{film.hex_colour(i)}">{_match(t.name, t)}'
            f"{_when(t.shown, film.hex_colour(i))}</li>"
            for i, t in enumerate(trajectories)
        )
        parts.append(f'<ul class="matches" aria-label="trajectories and nouns">{items}</ul>')
    else:
        parts.append('<p class="soft">No detections of this video: no trajectories to show.</p>')
    for i, action in enumerate(actions):
        name = f"action {i + 1}"
        picture = film.attention_strip(_seen(found), action.attention, ATTENTION_HEIGHT)
        where = f"where {name} looks in each frame"
        parts.append(f"<h3>{_match(name, action)}</h3>{_film(picture, where)}")
    if actions:
        parts.append('<p class="soft">Bright: the patches that the action query attends to.</p>')
    return f'<div class="page">{"".join(parts)}</div>'


def _film(picture: np.ndarray, label: str) -> str:
    return (
        f'<div class="film" tabindex="0" role="region" aria-label="{text(label)}">'
        f'<img alt="{text(label)}" width="{picture.shape[1]}" height="{picture.shape[0]}" '
        f'src="{film.data_address(picture)}"></div>'
    )


def _match(name: str, match: "Trajectory | Action") -> str:
    word = f"<b>{text(match.word)}</b>" if match.word is not None else "no word (Ø)"
    score = f' <span class="soft">{100 * match.word_score:.0f} %</span>' if match.word_score else ""
    return f"{text(name)} → {word}{score}"


def _when(shown: np.ndarray, colour: str) -> str:
    """Return the frames in which a trajectory is visible, as a row of small bars."""
    numbers = ", ".join(str(t + 1) for t in np.flatnonzero(shown))
    label = f"seen in frames {numbers} of {len(shown)}"
    bars = "".join(f'<i style="background:{colour}"></i>' if s else "<i></i>" for s in shown)
    return f'<span class="when" role="img" aria-label="{label}">{bars}</span>'


def _marked(said: str, trajectories: "Sequence[Trajectory]", actions: "Sequence[Action]") -> str:
    """Mark matched nouns in their trajectory's colour, and verbs with a double underline."""
    colours: dict[str, str] = {}
    for i, trajectory in enumerate(trajectories):
        if trajectory.word is not None:
            colours.setdefault(trajectory.word.lower(), film.hex_colour(i))
    verbs = {action.word.lower() for action in actions if action.word is not None}
    out = []
    for part in re.split(r"(\w+)", said):
        word = part.lower()
        if word in colours:
            out.append(f'<mark style="border-bottom-color:{colours[word]}">{text(part)}</mark>')
        elif word in verbs:
            out.append(f'<mark class="verb">{text(part)}</mark>')
        else:
            out.append(text(part))
    return "".join(out)


def _seen(found: "Explanation") -> list[np.ndarray]:
    """Return the part of each frame that the model sees."""
    height, width = found.frames[0].shape[:2]
    x1, y1, x2, y2 = np.round(found.crop * [width, height, width, height]).astype(int)
    return [frame[y1:y2, x1:x2] for frame in found.frames]
