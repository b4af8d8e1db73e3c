"""Penn Treebank tokenisation of captions, as the caption metrics expect it, without Java.

`pycocoevalcap` tokenises captions with a Java program before it scores them. We wrote this
tokeniser from that program's observed output. At each position of the text every rule is tried; the
longest match wins, and of equally long ones the first. `docs/evaluation.md` reports how closely the
two agree.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

# Tokens that the caption metrics drop.
PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split(" "))

# From a match to its tokens, and to the number of characters that they consume.
Action = Callable[[str], tuple[list[str], int]]


def tokenize(captions: Iterable[str]) -> list[list[str]]:
    """Split each caption into lower-case tokens.

    Whether an abbreviation ends a sentence also depends on how the next caption begins, as in the
    Java program, which reads one caption a line.
    """
    lines = [_LINE_BREAKS.sub(" ", caption) for caption in captions]
    following = [*lines[1:], None]
    return [_tokens(line, after) for line, after in zip(lines, following, strict=True)]


def caption_words(captions: Sequence[str]) -> list[str]:
    """Join each caption's tokens, without punctuation, by blanks, as the metrics compare it."""
    return [
        " ".join(token for token in tokens if token not in PUNCTUATION)
        for tokens in tokenize(captions)
    ]


def _tokens(line: str, after: str | None) -> list[str]:
    if _PLAIN.fullmatch(line) and not _SPLIT_WORDS.intersection(line.split()):
        return line.split()
    rules = _rules()
    text = line if after is None else f"{line}\n{after}"
    tokens, position, end = [], 0, len(line)
    while position < end:
        best, chosen, found = 0, None, None
        for patterns, action in rules:
            for pattern in patterns:
                match = pattern.match(text, position)
                # A look-ahead (group "ahead") counts toward the length but is not consumed.
                if match is not None and match.end() - position > best:
                    best, chosen, found = match.end() - position, action, match
        if chosen is None or found is None:  # drop a character that no rule matches
            position += 1
            continue
        ahead = found.groupdict().get("ahead")
        token = found.group()[: best - len(ahead)] if ahead else found.group()
        new, used = chosen(token)
        tokens += new
        position += used
    return [token.lower() for token in tokens]


_LINE_BREAKS = re.compile("\r\n|[\r\n\x0b\x0c\x85\u2028\u2029]")
_PLAIN = re.compile(r"[a-z]+(?: [a-z]+)*")

# Words that become two tokens, and the length of the first.
_SPLITS = {"cannot": 3, "gonna": 3, "gotta": 3, "lemme": 3, "gimme": 3, "wanna": 3}
_SPLIT_WORDS = frozenset(_SPLITS)

# Abbreviations by how they treat what follows. Lower case matches any case.
_ALWAYS = (  # never end a sentence: titles and the like
    "adj adm adv alex assoc asst atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr "
    "drs elec ens ft gen gov govs hon invt jos lieut lt m maj messrs mfg mlle mme mr mrs ms msgr "
    "mt mtg natl pfc ph pres prof profs pvt rep reps rev sen sens sfc sgt spc st ste supt supts "
    "vs wm"
).split()
_MAY_END = (  # before a capital or the end, a full stop is added
    "al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec "
    "esq est etc ext feb fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn "
    "mo mon mont neb nev nov oct okla penn plc pte pty ptys rd rt sep sept seq sq sr sys tel tenn "
    "thu thurs tue tues univ va vt wed wis wisc wyo ph.d"
).split()
_MAY_END_CAPITAL = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash".split()  # words otherwise
_BEFORE_NUMBER = "art ca fig figs no nos op pp prop".split()
# Words that, after an acronym, show that the sentence ended with it.
_STARTERS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last "
    "Many More Now Once One Other Our She Since So Some Such That The Their Then There These They "
    "This We What When While Yet You"
).split()

_FILES = (
    "bat bmp cgi class cpp c dll docx doc exe gif gz html htm h java jar jpeg jpg mov mp3 pdf php "
    "pl png ppt ps py sql tar txt wav xml x zip"
).split()
_FRACTIONS = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_BRACKETS = {
    "(": "-LRB-",
    ")": "-RRB-",
    "[": "-LSB-",
    "]": "-RSB-",
    "{": "-LCB-",
    "}": "-RCB-",
}
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&apos;": "'"}


def _whole(token: str):
    return [token], len(token)


def _nothing(token: str):
    return [], len(token)


def _as(value: str) -> Action:
    return lambda token: ([value], len(token))


def _first(count: int) -> Action:
    """Consume only the first characters; the rest is tokenised again."""
    return lambda token: ([token[:count]], count)


def _all_but(count: int) -> Action:
    return lambda token: ([token[:-count]], len(token) - count)


def _also_stop(token: str):
    """Keep the full stop in the abbreviation and tokenise it again as the end of the sentence."""
    return [token], len(token) - 1


def _split_word(token: str):
    return _first(_SPLITS[token.lower()])(token)


def _quotes(token: str):
    text = token.replace("&apos;", "'").replace("&quot;", '"')
    for characters, value in (
        ("\x91\u2018\u201b\u2039", "`"),
        ("\x92\u2019\u203a", "'"),
        ("\x93\u201c\xab", "``"),
        ("\x94\u201d\xbb", "''"),
        ('"', "''"),
    ):
        text = re.sub(f"[{characters}]", value, text)
    return [text], len(token)


def _brackets(token: str):
    text = token
    for bracket in "()":
        text = text.replace(bracket, _BRACKETS[bracket])
    return [text], len(token)


def _phone(token: str):
    return [_brackets(token.replace(" ", "\u00a0"))[0][0]], len(token)


def _fraction(token: str):
    return [token.replace(" ", "\u00a0")], len(token)


def _unbreakable(token: str):
    return [token.replace(" ", "\u00a0")], len(token)


def _soft_hyphens(token: str):
    text = token.replace("\u00ad", "")
    return [text or "-"], len(token)


def _apostrophe(token: str):
    return [re.sub("&apos;|[\x92\u2019]", "'", token)], len(token)


def _currency(token: str):
    table = {"¢": "cents", "£": "#"}
    return [table.get(token, "$" if token in "\x80¤₠€" else token)], len(token)


@functools.cache
def _letters(kind: str = "") -> str:
    """Return the letters of the basic plane, or of a Unicode category, for a character class."""
    # Marks of many scripts, and a few symbols, that the Java program treats as letters.
    marks = (
        "2c2-2c5 2d2-2df 2e5-2eb 2ed 2ef-36f 375 378-379 384-385 3f6 483-487 55a-55f 591-5bd 5bf "
        "5c1-5c2 5c4-5c5 5c7 615-61a 64b-65e 670 6d6-6e4 6e7-6ed 6fd-6fe 70f 711 730-74c 7a6-7b0 "
        "7eb-7f3 900-903 93c 93e-94e 951-955 962-963 981-983 9bc 9be-9c4 9c7-9c8 9cb-9cd 9d7 "
        "9e2-9e3 a01-a03 a3c a3e-a4f a81-a83 abc abe-acf b82 bbe-bc2 bc6-bc8 bca-bcd c01-c03 "
        "c3e-c56 d3e-d44 d46-d48 e31 e34-e3a e47-e4e eb1 eb4-ebc ec8-ecd ad"
    )
    codes = {code for code in range(0x80, 0x10000) if chr(code).isalpha()}
    if kind:
        codes = {code for code in codes if unicodedata.category(chr(code)).startswith(kind)}
    for span in () if kind else marks.split():
        low, _, high = span.partition("-")
        codes.update(range(int(low, 16), int(high or low, 16) + 1))
    spans: list[list[int]] = []
    for code in sorted(codes):
        if spans and spans[-1][1] == code - 1:
            spans[-1][1] = code
        else:
            spans.append([code, code])
    return ("A-Z" if kind == "Lu" else "A-Za-z") + "".join(
        f"\\u{low:04x}-\\u{high:04x}" for low, high in spans
    )


@functools.cache
def _digits() -> str:
    return "0-9" + "".join(
        chr(code) for code in range(0x80, 0x10000) if unicodedata.category(chr(code)) == "Nd"
    )


def _words(words: Iterable[str]) -> str:
    """Return an alternation of the words, longest first, in any case; capitals stay capitals."""
    ordered = sorted(words, key=len, reverse=True)
    return "|".join(
        f"[{word[0]}](?i:{re.escape(word[1:])})" if word[0].isupper() else f"(?i:{re.escape(word)})"
        for word in ordered
    )


@functools.cache
def _rules() -> list[tuple[list[re.Pattern[str]], Action]]:
    accented = "&[aeiouAEIOU](?:acute|grave|uml);"
    L, D = f"(?:[{_letters()}]|{accented})", f"[{_digits()}]"
    LD = f"(?:[{_letters()}{_digits()}]|{accented})"
    plain = _letters("L")
    apos = r"(?:['\x92\u2019]|&apos;)"
    hyphen = r"[-_\u058a\u2010\u2011]"
    space = r"[ \t\u00a0\u2000-\u200a\u3000]"
    blank = r"[ \t\u00a0\u2000-\u200a\u3000\n]"
    name = r"[A-Za-z][A-Za-z0-9_:.-]*"
    sgml = (
        rf"<(?:[!?][A-Za-z-][^>\n]*|{name}(?: +{name}(?: *= *(?:'[^'\n]*'|\"[^\"\n]*\"|{name}))?)*"
        rf" */?|/{name}) *>"
    )
    sentence_end = rf"(?P<ahead>{blank}(?:{blank}|[{_letters('Lu')}]|{sgml}|\Z))"
    word = rf"{L}{LD}*(?:[.!?]{L}{LD}*)*"
    acronym, acronyms = r"[A-Za-z](?:\.[A-Za-z])*", r"[A-Za-z](?:\.[A-Za-z])+"
    starts = rf"(?P<ahead>{blank}+(?:(?:{_words(_STARTERS)}){blank}|M(?i:[rs])\.{blank}|{sgml}))"
    part = rf"(?:[dDoOlL]{apos}[{plain}])?[{plain}{_digits()}]+"
    number = rf"(?:{D}*(?:[.:,\u00ad\u066b\u066c]{D}+)+|{D}+)"
    path = r"[^ \t\n\f\"<>|()]+[^ \t\n\f\"<>|.!?(){},-]"

    def rule(action: Action, *patterns: str) -> tuple[list[re.Pattern[str]], Action]:
        return [re.compile(pattern) for pattern in patterns], action

    return [
        rule(_split_word, *(f"(?i:{word})" for word in _SPLITS)),
        rule(_first(2), r"(?i:'t(?=is|was))(?P<ahead>(?i:is|was))"),
        rule(_unbreakable, sgml),
        rule(_as("--"), "(?i:&(?:MD|mdash|ndash);)|[\x96\x97\u2013-\u2015]"),
        rule(lambda t: ([_ENTITIES[t.lower()]], len(t)), "(?i:&amp;|&lt;|&gt;)"),
        rule(_soft_hyphens, rf"{word}(?P<ahead>{apos}(?i:[msd]|re|ve|ll))"),
        rule(_soft_hyphens, rf"[A-Za-z]+(?P<ahead>[nN]{apos}[tT])"),
        rule(_soft_hyphens, word),
        rule(
            _whole,
            rf"{apos}[nN]{apos}?",
            rf"[lLdDjJ]{apos}",
            rf"(?i:dunkin|somethin|ol){apos}",
            rf"{apos}(?i:em|cause|till?)",
            rf"[A-HJ-XZnN]{apos}[{plain}]{{2}}[{plain}]*",
            rf"{apos}[2-9]0[sS]",
            rf"{apos}{D}{{2}}(?P<ahead>{blank})",
            rf"[{plain}]+[aeiouyAEIOUY]{apos}[aeiouA-Z][{plain}]*",
            rf"(?i:c{apos}(?:est|mon)|cap{apos}n|ev{apos}ry|li{apos}l|nat{apos}l|e{apos}er|s{apos}mores)",
            rf"(?i:nor{apos}easter)",
        ),
        rule(_first(2), rf"[yY]{apos}(?P<ahead>{L})"),
        rule(_whole, rf"(?i:https?)://{path}"),
        rule(
            _whole,
            rf"www\.(?:[^ \t\n\f\"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}(?:/{path})?",
            rf"(?:[^ \t\n\f\"`'<>|.!?(){{}},-_$]+\.)+(?:com|net|org|edu)(?:/{path})?",
        ),
        rule(
            _whole,
            r"(?:<|&lt;)?[a-zA-Z0-9][^ \t\n\f\"<>|()\u00a0]*@(?:[^ \t\n\f\"<>|(){}.\u00a0]+\.)*"
            r"[^ \t\n\f\"<>|(){}.\u00a0]+(?:>|&gt;)?",
        ),
        rule(_whole, r"[@\uff20][a-zA-Z_][a-zA-Z_0-9]*", rf"[#\uff03]{L}+"),
        rule(_apostrophe, rf"{apos}(?i:[msd]|re|ve|ll)(?P<ahead>[^A-Za-z]|\Z)"),
        rule(_apostrophe, rf"[nN]{apos}[tT](?P<ahead>[^A-Za-z]|\Z)"),
        rule(_whole, rf"{D}{{1,2}}[-/]{D}{{1,2}}[-/]{D}{{2,4}}"),
        rule(_soft_hyphens, rf"[-+]?{number}"),
        rule(
            _whole,
            "[\u207a\u207b\u208a\u208b]?(?:[\u2070\xb9\xb2\xb3\u2074-\u2079]+|[\u2080-\u2089]+)",
        ),
        rule(_fraction, rf"(?:{D}{{1,4}}[- \u00a0])?{D}{{1,4}}(?:\\?/|\u2044){D}{{1,4}}"),
        rule(lambda t: ([_FRACTIONS.get(t, t)], len(t)), "[\xbc\xbd\xbe\u2153-\u215e]"),
        rule(_whole, r"[A-Z]*\$", "#"),
        rule(_currency, "[\xa2-\xa5\x80\u20a0\u20ac\u060b\u0e3f\u20a4\uffe0\uffe1\uffe5\uffe6]"),
        rule(_also_stop, rf"(?:{_words(_MAY_END + _MAY_END_CAPITAL)})\.{sentence_end}"),
        rule(
            _whole,
            rf"(?:{_words(_MAY_END + _MAY_END_CAPITAL)})\.(?P<ahead>[\s\S]{{2}})",
            rf"(?:{_words(_MAY_END + _MAY_END_CAPITAL)})\.",
        ),
        rule(_all_but(1), rf"[A-Za-z]\.{starts}"),
        rule(_also_stop, rf"{acronyms}\.{starts}"),
        rule(_whole, rf"{acronym}\."),
        rule(_whole, rf"(?:{_words(_ALWAYS)})\."),
        rule(_whole, rf"(?:{_words(_BEFORE_NUMBER)})\.(?P<ahead>{space}?{D})"),
        rule(
            _whole,
            rf"{word}\.(?P<ahead>[,;:\u3001])",
            rf"{part}(?:{hyphen}{part})*\.(?P<ahead>[,;:\u3001])",
        ),
        rule(_phone, r"\([0-9]{2,3}\) ?[0-9]{3,4}[- \u00a0]?[0-9]{3,5}"),
        rule(
            _phone,
            r"(?:\+\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0]"
            r"[0-9]{3,4}[- \u00a0]?[0-9]{3,5}",
        ),
        rule(_as("``"), r"(?:\"|&quot;)(?P<ahead>[A-Za-z0-9$])"),
        rule(_as("''"), r"\"|&quot;"),
        rule(_whole, "(?i:&quot;)"),
        rule(_brackets, r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]](?P<ahead>[^A-Za-z0-9]|\Z)"),
        rule(
            _brackets,
            r"[-^x=~<>']_[-^x=~<>']",
            r"\([-^x=~<>'][_.]?[-^x=~<>']\)",
            r"\([\^x=~<>']-[\^x=~<>'`]\)",
        ),
        rule(_nothing, "(?i:&nbsp;)"),
        rule(_whole, "&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);", r"(?i:c\+\+|c#)"),
        rule(lambda t: ([t.replace("&amp;", "&")], len(t)), r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"),
        rule(_whole, rf"{part}(?:{hyphen}{part})*"),
        rule(
            _whole,
            r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",
        ),
        rule(
            _soft_hyphens,
            rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:[A-Za-z0-9\u00ad]+|{acronyms}\.))+",
            rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{acronyms}\.|[A-Za-z0-9\u00ad]+))+",
        ),
        rule(_whole, rf"{LD}+(?:\.{LD}+)*\.(?i:{'|'.join(_FILES)})(?P<ahead>{blank}|[.?!,]|\Z)"),
        rule(lambda t: ([_BRACKETS[t]], 1), r"[()\[\]{}]"),
        rule(_as("--"), "-{2,4}"),
        rule(_whole, "-{5,}"),
        rule(_whole, "<<|>>"),
        rule(_as("-"), "-"),
        rule(_as("..."), r"\.{3,5}", r"(?:\.[ \u00a0]){2,4}\.", "\u2026"),
        rule(_whole, "[?!]+", r"\*+|@+|_+|#+"),
        rule(_as("`"), r"'(?P<ahead>[A-Za-z][^ \t\n\u00a0])"),
        rule(_whole, "``?|''?"),
        rule(_quotes, r"&apos;|[`\u2018-\u201f\x82\x84\x91-\x94\u2039\u203a\xab\xbb]{1,2}"),
        rule(_nothing, rf"{blank}+"),
        rule(_whole, "[.,;:%&<>=+*/\\\\^|~@_]"),
        rule(
            _whole,
            "[\xa1\xa5-\xa9\xac\xae-\xb4\xb6-\xb9\xbf\xd7\xf7\u037e\u0387\u0589\u05be\u05c0\u05c3"
            "\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060c\u0614\u061b\u061e\u061f\u066a\u066d\u06d4"
            "\u0700-\u070d\u07f6-\u07f8\u0964\u0965\u0e4f\u1fbd\u2016\u2017\u201a\u201e-\u2023"
            "\u2030-\u2038\u203b\u203e-\u2042\u2044\u207a-\u207e\u208a-\u208e\u2100\u2101"
            "\u2103-\u2106\u2108\u2109\u2114\u2116-\u2118\u211e-\u2123\u2125\u2127\u2129\u212e\u213a"
            "\u213b\u2140-\u2144\u214a-\u214d\u214f\u2190-\u2bff\u3001\u3002\u3012\u30fb"
            "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]",
        ),
    ]
