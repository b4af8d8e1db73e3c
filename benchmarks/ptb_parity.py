"""Compare our PTB tokeniser with the Java one on varied captions.

python benchmarks/ptb_parity.py            # 10,000 captions; needs Java and pycocoevalcap
python benchmarks/ptb_parity.py --golden tests/data/ptb.json --count 500
"""

import argparse
import json
import random

from stoa_jax.metrics import coco, ptb

SUBJECTS = (
    "a man|two women|the boy's dog|A girl in red|some kids|an old-timer|Mr. Smith|Dr. Jones|"
    "the U.S. team|J. K. Rowling|O'Brien|a 5-year-old|someone|people|the players|three cats|"
    "ladies|Jack & Jill|the Joneses' car|a woman's hand|they|he|she|somebody|a cook|"
    "minecraft character|a naïve café owner"
).split("|")
VERBS = (
    "is playing|are dancing|isn't moving|can't stop|is gonna jump|won't eat|cannot sing|"
    "has been cooking|was talking about|shows off|'s riding|folds|is re-entering|doesn't see|"
    "they're watching|wanna fold|explains how to use|rock 'n' rolls with|slices|"
    "is being interviewed by|drives|don't like|you'll see"
).split("|")
OBJECTS = (
    "a guitar|the ball|some food|paper airplanes|a video game|in the kitchen|on stage|"
    "with a knife|at 10:30 p.m.|for $5.50|in 3/4 time|at 1,000 km/h|during the '90s|"
    "in Washington, D.C.|on CNN.com|with e.g. salt|the no. 5 shirt|vs. a bear|by Mr. T.|"
    "in the St. Louis arena|a well-known song|on Mt. Fuji|and/or swimming|a 50% discount|"
    "in a 10x10 room|with 20°C water|to the 1st floor|until 2013|a 6'2\" man|the 1990s show|"
    "with 2.5 cups|a t-shirt|for 1/2 hour|in an 18-wheeler|Inc. logo|with etc. stuff"
).split("|")
ENDINGS = "|||.|.| .|!|!!!|?|...|..|....| ...|…|;|:)| :-(| -|--".split("|")
ODD = (
    "don't|DON'T|y'all|'tis|'twas|o'clock|ma'am|goin'|'em|'cause|'n'|cannot|gotta|lemme|I'd've|"
    "who's|dogs'|its'|\"quoted\"|'single'|``latex''|“curly”|‘one’|«guille»|‹x›|„low“|\"|'|`|''|"
    "``|(parens)|[brackets]|{braces}|<b>|</i>|<|>|<<|>>|(|)|[|]|well-known|mother-in-law|x-ray|-|"
    "--|---|-----|–|—|―|co-op|twenty-one|pre-1990|1,000|3.14|.5|5.|10:30|1/2|1 1/2|½|2⅓|50%|5th|"
    "1990s|'90s|'85|10am|5p.m.|-5|+7|555-1234|(555) 555-1234|1-800-555-1234|12/25/2013|1-2-03|$5|"
    "$5.50|US$5|£5|€10|¥500|5¢|#1|#tag|@user|http://www.foo.com/a?b=c|https://youtu.be/x_y-z|"
    "www.foo.com|foo.com|foo.org/path|a.b@c.com|<a@b.com>|file.txt|photo.jpg|20.doc|U.S.|u.s.|"
    "U.K.|a.m.|p.m.|e.g.|i.e.|etc.|vs.|Mr.|Mrs.|Dr.|St.|Jr.|Inc.|Co.|Jan.|Calif.|no.|No.|Fig.|"
    "Prof.|Ph.D.|J.|A.B.|Mass.|ill.|AT&T|R&D|a&b|&|&amp;|&lt;|&quot;|&nbsp;|&#39;|café|naïve|"
    "日本語|русский|ελληνικά|한국어|العربية|עברית|हिन\u094dदी|ไทย|e\u0301|ﬁ|Ǆ|ß|ÅÄÖ|İ|\U0001f600|"
    "\U0001f44d\U0001f3fd|❤\ufe0f|\U0001f468\u200d\U0001f469\u200d\U0001f467|☺|→|★|°|²|m²|H₂O|©|"
    "®|™|§|¶|•|·|¿|¡|\u00a0|\u200b|\u00ad|soft\u00adhyphen|\t|  |*|**|*star*|_|__|foo_bar|~|^|"
    "^_^|(-_-)|:)|:-)|;)|:D|:P|:(|=)|<3|xD|/|//|\\|a/b|and/or|24/7|w/o|km/h|+|=|a+b|C++|C#|%|$|#|"
    "@|!|!!|?!|??|,|,,|;|:|::|.|..|...|. . .|…|hello,world|a:b|end.Start|end.start|I|The|the|He|"
    "In|a|A|1|5|rock'n'roll|ba'ath|xi'an|l'amour|qu'il|d'oh|McDonald's|HTTP://FOO.COM|R.E.M.|"
    "S.W.A.T.|p.s.|o.k."
).split("|")


def captions(count: int, seed: int = 0) -> list[str]:
    """Generate captions with unusual pieces alone, in sentences and glued together."""
    rng = random.Random(seed)
    return [_caption(rng) for _ in range(count)]


def _caption(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.2:  # odd pieces only, with blanks or glued
        pieces = [rng.choice(ODD) for _ in range(rng.randint(1, 8))]
        return "".join(piece + rng.choice(["", " ", " ", " "]) for piece in pieces).strip()
    parts = [rng.choice(SUBJECTS), rng.choice(VERBS), rng.choice(OBJECTS)]
    if rng.random() < 0.4:
        parts += [rng.choice(["and", "while", ", then", "; but", "because", "."])]
        parts += [rng.choice(SUBJECTS), rng.choice(VERBS), rng.choice(OBJECTS)]
    if kind < 0.7:  # a sentence with odd pieces among its words
        for _ in range(rng.randint(1, 3)):
            parts.insert(rng.randint(0, len(parts)), rng.choice(ODD))
    text = " ".join(parts) + rng.choice(ENDINGS)
    case = rng.random()
    if case < 0.1:
        return text.upper()
    return text[:1].upper() + text[1:] if case < 0.5 else text


def main() -> None:
    """Print how many captions differ, and the first of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--golden", default="", help="write the captions and Java's tokens here")
    parser.add_argument("--show", type=int, default=20)
    args = parser.parse_args()
    texts = captions(args.count, args.seed)
    theirs = coco.java_tokenize(texts)
    if args.golden:
        with open(args.golden, "w", encoding="utf-8") as file:
            json.dump([texts, [" ".join(tokens) for tokens in theirs]], file, indent=0)
    ours = ptb.tokenize(texts)
    differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    for i in differing[: args.show]:
        print(f"{texts[i]!r}\n  ours {ours[i]}\n  Java {theirs[i]}")
    share = 100 * len(differing) / len(texts)
    print(f"{len(texts)} captions: {len(differing)} differ ({share:.2f} %)")


if __name__ == "__main__":
    main()
