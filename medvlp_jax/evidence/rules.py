"""The offline extractor: words, scopes of negation and doubt, places, degrees, changes.

One pass over the words of a sentence finds the longest phrases of `lexicon`; cues open scopes that
run to the right until a closing word, as in NegEx; what stands beside a finding describes it. No
model, no download: less than half a millisecond a report.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from medvlp_jax.evidence import lexicon, terms
from medvlp_jax.evidence.terms import Span

MAX_WORDS = 10  # of a phrase, as the prompt of the language models asks
_SENTENCE = re.compile(r"(?:[^.;?!\n]+|\.(?=[0-9]))+")  # 1.8 is one number
_TOKEN = re.compile(r"[a-z0-9]+(?:\.[0-9]+)?|[,:()]")
_NORMAL = re.compile(lexicon.NORMAL)
_REACH = 6  # words between a part of the body and what is said of it


def extract(text: str) -> list[dict]:
    """Return the evidence of a report in the order of its sentences.

    Args:
      text: Findings and Impression.

    Returns:
      Items of the schema, see `schema`: present, uncertain and absent ones.
    """
    return [dict(item) for sentence in _SENTENCE.findall(text) for item in _read(sentence).items]


def is_normal(text: str) -> bool:
    """Say whether a report states anywhere that something is as it should be, and no `others`."""
    return _NORMAL.search(text.lower()) is not None and not others(text)


def others(text: str) -> bool:
    """Say whether a report speaks of an abnormality that is none of the lexicon's findings."""
    return any(_read(sentence).others for sentence in _SENTENCE.findall(text))


def _lower(sentence: str) -> str:
    """Return a sentence in lower case, letter for letter."""
    lower = sentence.lower()
    if len(lower) != len(sentence):  # a few letters have a longer small form
        lower = "".join(c.lower() if c.isascii() else c for c in sentence)
    return lower


class _Clause:
    """What one clause holds: its findings with their certainty, and the words around them."""

    def __init__(self):
        self.findings: list[list] = []  # [name, start, end, certainty]
        self.subjects: list[Span] = []
        self.states: list[tuple[Span, str]] = []
        self.spans: list[Span] = []
        self.others: list[str] = []  # certainties of what is no finding of the lexicon

    def speaks(self) -> bool:
        """Say whether there is a finding yet, also one said of a part of the body."""
        said = (
            state.roles["state"] != "normal" and _said(subject, state, certainty)
            for subject in self.subjects
            for state, certainty in self.states
        )
        return bool(self.findings) or any(said)

    def change(self, certainty: str, findings: list[list]) -> None:
        """Let what follows findings say how sure they are, and states that no finding follows."""
        last = max((finding[1] for finding in self.findings), default=0)
        for finding in findings:
            finding[3] = certainty
        self.others = [certainty] * len(self.others)
        for i, (state, _) in enumerate(self.states):
            if state.start >= last and state.roles["state"] != "normal":
                self.states[i] = state, certainty


class _Sentence(NamedTuple):
    """The evidence of a sentence, and whether it speaks of other abnormalities."""

    items: tuple[dict, ...] = ()
    others: bool = False


@functools.lru_cache(maxsize=1 << 15)
def _read(text: str) -> _Sentence:
    """Read one sentence; reports repeat their sentences word by word."""
    lower = _lower(text)
    texts = _TOKEN.findall(lower)
    spans = terms.match(texts)
    for span in spans:
        if "finding" in span.roles or "state" in span.roles or "other" in span.roles:
            break
    else:
        return _Sentence()
    words = list(_TOKEN.finditer(lower))
    at = {i: span for span in spans for i in range(span.start, span.end)}
    items, others = [], False
    for clause in _clauses(spans, texts):
        others |= not {"present", "uncertain"}.isdisjoint(clause.others)
        _join(clause)
        clause.findings.sort(key=lambda finding: finding[1])
        read = [finding for finding in clause.findings if finding[3] != "ignored"]
        items += [_item(finding, clause, words, at, text) for finding in read]
    return _Sentence(tuple(items), others)


# What changes how a clause is read; the other words only describe.
_ACTING = {"stop", "finding", "subject", "state", "ignore", "alternative"}
_ACTING |= {"deny", "deny_before", "doubt", "doubt_before", "last", "affirm", "other"}
_LISTS = frozenset(("or", "nor"))  # what they join is denied together


def _clauses(spans: list[Span], texts: list[str]) -> Iterator[_Clause]:
    """Split a sentence at closing words; give each finding its certainty."""
    clause, certainty = _Clause(), "present"
    for i, span in enumerate(spans):
        roles = span.roles
        if certainty == "absent" and _begins_anew(clause, spans, i, texts):
            yield clause
            clause, certainty = _Clause(), "present"
        clause.spans.append(span)
        if _ACTING.isdisjoint(roles):
            continue
        if "stop" in roles:
            yield clause
            clause, certainty = _Clause(), "present"
        elif "finding" in roles:
            clause.findings.append([roles["finding"], span.start, span.end, certainty])
        elif "other" in roles:
            clause.others.append(certainty)
        elif answer := _answer(clause, span, texts):
            clause.change(answer, _since_colon(clause, span, texts))
        elif "affirm" in roles:
            for finding in _affirmed(clause, span, texts) if certainty == "absent" else ():
                finding[3] = certainty = "present"
        elif "deny" in roles:
            certainty = "absent"
        elif "deny_before" in roles:
            certainty = certainty if clause.speaks() else "absent"
            clause.change("absent", clause.findings)
        elif "doubt_before" in roles:
            # "No effusion, and pneumonia cannot be excluded" leaves the effusion denied.
            last = len(clause.findings) - 1
            doubted = [f for i, f in enumerate(clause.findings) if f[3] != "absent" or i == last]
            clause.change("uncertain", doubted)
        elif certainty != "absent" and "ignore" in roles:
            certainty = "ignored"
        elif certainty == "present" and "alternative" in roles:
            certainty = "uncertain"
            if clause.findings and span.start - clause.findings[-1][2] < _REACH:
                clause.findings[-1][3] = "uncertain"
        elif certainty == "present" and "doubt" in roles:
            certainty = "uncertain"
        if "subject" in roles:
            clause.subjects.append(span)
        if "state" in roles:
            clause.states.append((span, certainty))
    yield clause


def _begins_anew(clause: _Clause, spans: list[Span], i: int, texts: list[str]) -> bool:
    """Say whether a degree after a comma or "and" ends a denial: "no effusion, mild edema".

    "No consolidation, large effusion, or pneumothorax" denies all three.
    """
    span = spans[i]
    if "severity" not in span.roles or texts[span.start - 1] not in (",", "and"):
        return False
    end = next((s.start for s in itertools.islice(spans, i, None) if "stop" in s.roles), None)
    return clause.speaks() and _LISTS.isdisjoint(texts[span.end : end])


def _answer(clause: _Clause, span: Span, texts: list[str]) -> str | None:
    """Return how sure the last words of a part say that what is before them is, or None.

    "Effusion: no", "effusion absent", "pneumonia unlikely".
    """
    if span.end < len(texts) and texts[span.end] not in (",", ")"):
        return None
    if "deny" in span.roles and span.start and texts[span.start - 1] == ":":
        return "absent"
    # "Effusion, right breast absent" says it of something else.
    said = max((finding[2] for finding in clause.findings), default=span.start)
    return None if "," in texts[said : span.start - 1] else span.roles.get("last")


def _since_colon(clause: _Clause, span: Span, texts: list[str]) -> list[list]:
    """Return the findings that an answer is about: "effusion: small, pneumothorax: none"."""
    colons = (i for i in range(span.start - 1) if texts[i] == ":")
    start = max(colons, default=0)
    return [finding for finding in clause.findings if finding[1] >= start]


def _affirmed(clause: _Clause, span: Span, texts: list[str]) -> list[list]:
    """Return the findings after a list of denials: "no effusion or edema, a mass is present"."""
    comma = max((i for i in range(span.start) if texts[i] == ","), default=0)
    denied, said = texts[clause.spans[0].start : comma], texts[comma : span.start]
    if _LISTS.isdisjoint(denied) or not _LISTS.isdisjoint(said):
        return []
    if any("deny" in s.roles for s in clause.spans if s.start > comma):
        return []
    return [finding for finding in clause.findings if finding[1] > comma]


def _join(clause: _Clause) -> None:
    """Add the findings that are said of a part of the body: "the heart is enlarged"."""
    free = list(clause.subjects)
    for state, certainty in clause.states:
        sayable = [s for s in clause.subjects if _said(s, state, certainty)]
        earlier = [s for s in sayable if s.end <= state.start and _near(clause, s, state)]
        later = [s for s in sayable if s.start >= state.end and _near(clause, state, s)]
        # "The heart and mediastinum are normal" says it of both; "the heart is normal, the aorta
        # calcified and tortuous" says two things of the last.
        for subject in [s for s in earlier if s in free or s is earlier[-1]] or later[:1]:
            if subject.start < state.start and subject in free:
                free.remove(subject)
            start, end = min(subject.start, state.start), max(subject.end, state.end)
            name, sure = _said(subject, state, certainty)
            clause.findings.append([name, start, end, sure])


def _said(subject: Span, state: Span, certainty: str) -> tuple[str, str] | None:
    """Return the finding that a state is of a part of the body, and its certainty; or None."""
    part, said = subject.roles["subject"], state.roles["state"]
    if said == "normal" and certainty == "present" and part in lexicon.DENIED_BY_NORMAL:
        return lexicon.DENIED_BY_NORMAL[part], "absent"
    if (part, said) not in lexicon.SAID:
        return None
    hedged = said in lexicon.HEDGED_STATES and certainty == "present"
    return lexicon.SAID[part, said], "uncertain" if hedged else certainty


def _near(clause: _Clause, left: Span, right: Span) -> bool:
    """Say whether two spans are close, with no finding between them."""
    between = (f for f in clause.findings if left.end <= f[1] and f[2] <= right.start)
    return right.start - left.end <= _REACH and not any(between)


def _item(finding: list, clause: _Clause, words, at, text: str) -> dict:
    """Return one finding with its words and what they say of it."""
    name, start, end, certainty = finding
    low, high = _phrase(start, end, words, at)
    inside = [span for span in clause.spans if low <= span.start and span.end <= high]
    severity = _detail("severity", inside, finding, clause)
    change = _detail("change", inside, finding, clause)
    attributes = [
        " ".join(word[0] for word in words[span.start : span.end])
        for span in inside
        if "attribute" in span.roles and "finding" not in span.roles
    ]
    location = _location(low, high, finding, clause, words, at, text)
    i = clause.findings.index(finding)
    if not location and i and _is_same(clause, clause.findings[i - 1], finding):
        earlier = clause.findings[i - 1]
        bounds = _phrase(earlier[1], earlier[2], words, at)
        location = _location(*bounds, earlier, clause, words, at, text)
    return {
        "phrase": text[words[low].start() : words[high - 1].end()],
        "finding": name,
        "location": location,
        "attributes": list(dict.fromkeys(attributes)),
        "severity": severity,
        "certainty": certainty,
        "change": change,
    }


def _is_same(clause: _Clause, earlier: list, finding: list) -> bool:
    """Say whether a finding is another name of the one before it."""
    return any(
        "same" in s.roles for s in clause.spans if earlier[2] <= s.start and s.end <= finding[1]
    )


def _describes(span: Span | None) -> bool:
    if span is None or "finding" in span.roles:
        return False
    roles = span.roles
    return any(r in roles for r in ("place", "severity", "attribute", "change", "link", "subject"))


def _phrase(start: int, end: int, words, at) -> tuple[int, int]:
    """Widen [start, end) over the words that describe it, to at most MAX_WORDS words."""
    low, high = start, end
    while low and _describes(at.get(low - 1)) and high - low < MAX_WORDS:
        low -= 1
    while high < len(words) and _describes(at.get(high)) and high - low < MAX_WORDS:
        high += 1

    def loose(i):
        return at.get(i) is not None and set(at[i].roles) == {"link"}

    while low < start and loose(low) and not words[low][0][0].isdigit():
        low += 1
    while high > end and loose(high - 1) and words[high - 1][0] not in ("cm", "mm"):
        high -= 1
    return low, high


def _detail(role: str, inside: list[Span], finding: list, clause: _Clause) -> str | None:
    """Return what the phrase says, or else the nearest word of the clause that no other owns."""
    for span in inside:
        if role in span.roles and not (role == "severity" and _is_state(span, finding)):
            return span.roles[role]
    found = [s for s in clause.spans if role in s.roles and _owned(s, finding, clause)]
    nearest = min(found, key=lambda s: _distance(s, finding), default=None)
    return nearest.roles[role] if nearest else None


def _is_state(span: Span, finding: list) -> bool:
    """Say whether a word of degree is itself the finding: "the heart is large"."""
    return "state" in span.roles and finding[1] <= span.start and span.end == finding[2]


def _owned(span: Span, finding: list, clause: _Clause) -> bool:
    """Say whether no other finding of the clause stands nearer to a span, or between."""
    own = _distance(span, finding)
    return all(_distance(span, other) > own for other in clause.findings if other is not finding)


def _distance(span: Span, finding: list) -> int:
    return max(finding[1] - span.end, span.start - finding[2], 0)


def _location(low: int, high: int, finding, clause, words, at, text: str) -> str:
    """Return the place in the phrase, or else the nearest in the clause; "" where none is said."""
    runs = _runs(low, high, words, at, skip=(finding[1], finding[2]))
    if not runs:
        first, last = clause.spans[0].start, clause.spans[-1].end
        near = _runs(first, last, words, at, skip=(finding[1], finding[2]))
        spans = [(run, Span(*run, {})) for run in near]
        owned = [(_distance(s, finding), run) for run, s in spans if _owned(s, finding, clause)]
        runs = [min(owned)[1]] if owned else []
    sided = [run for run in runs if any(w[0] in _SIDES for w in words[slice(*run)])]
    if not runs:
        return ""
    a, b = (sided or runs)[0]
    return text[words[a].start() : words[b - 1].end()].lower()


_SIDES = frozenset(lexicon.SIDES.split("|"))


def _runs(low: int, high: int, words, at, skip) -> list[tuple[int, int]]:
    """Return [start, end) of words of anatomy joined by links, at most with a link inside."""
    runs, begin, last = [], None, None
    for i in range(low, high):
        span = at.get(i)
        placed = span is not None and ("place" in span.roles or "subject" in span.roles)
        # The words of a finding said of a part of the body hold its place, those of others do not.
        own = skip[0] <= i < skip[1]
        if placed and "finding" not in span.roles and "state" not in span.roles:
            begin = i if begin is None else begin
            last = i + 1
        elif begin is not None and not (
            span is not None and "link" in span.roles and words[i][0] in ("of", "the") and not own
        ):
            runs.append((begin, last))
            begin = None
    if begin is not None:
        runs.append((begin, last))
    return runs
