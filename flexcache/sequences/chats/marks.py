"""Find the characters of a rendered chat that come from each text of its messages.

A template is a program: it may strip a text, split it at ``</think>``, drop it in earlier turns, write it as JSON, or
test what it begins with. So the chat is rendered a second time, with a mark in place of each character of the texts:
a code point that Unicode has not assigned, one for each character. The length of a text, and everything that a template
can do with a text without reading its words, is then unchanged, and each mark in the second rendering says which
character of which text stands there. The find is proved by putting the characters back: the result must be the first
rendering. Only white space at the ends of a marked piece may be missing, because a template strips white space but not
marks, and characters may be escaped as in JSON.

Templates that read the words of a text need further attempts. In each, fewer characters have marks:

1. all of them, and the numbers in the arguments of tool calls;
2. without those numbers, which become text when they are marked;
3. without the occurrences of tags and the like: string literals of the template, such as ``</think>``;
4. without any literal of the template, white space, quotes and backslashes;
5. without the keys of arguments, which a template may sort.

Characters without a mark belong to the text if they lie between marked ones as they do in the text, or next to them at
an end; white space at an end does not. If no attempt fits all texts together, each is tried alone. What is left over is
refused by `flexcache.sequences.chats.render_chat`.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np

from flexcache.sequences.chats.message_texts import MessageText, map_texts

PLANES = (range(0x40000, 0xE0000), range(0xF0000, 0x10FFFE))
"""Code points for marks: unassigned ones, or those for private use if a chat has any of the former."""
ATTEMPTS = range(5)

Form = Callable[[str], str]
FORMS: tuple[Form, ...] = (
    lambda text: text,
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: json.dumps(text)[1:-1],
    lambda text: repr(text)[1:-1],
)
"""The ways in which a template writes a text: as it is, or with escapes."""


@dataclass(frozen=True)
class Found:
    """A piece of a text in a rendering: characters *start* to *stop* are *low* to *high* of text number *text*."""

    start: int
    stop: int
    text: int
    low: int
    high: int
    form: Form

    def place(self, character: int, source: str) -> int:
        """Return the place in the rendering of a character of the text."""
        return self.start + len(self.form(source[self.low : character]))


class Marking:
    """One attempt: texts whose characters have marks, if *chosen* and the attempt allows it."""

    def __init__(
        self, texts: Sequence[MessageText], attempt: int, literals: Sequence[str], plane: range, chosen: Iterable[int]
    ) -> None:
        self.texts, self.plane = texts, plane
        self._starts = np.cumsum([0, *(len(text.text) for text in texts)])
        self.marked = [np.zeros(len(text.text), bool) for text in texts]
        self._literal_edges: list[set[int]] = [set() for _ in texts]
        for number in chosen:
            self.marked[number], self._literal_edges[number] = _markable(texts[number], attempt, literals)

    @property
    def passes(self) -> int:
        """Number of renderings that are needed to mark all characters."""
        return -(-int(self._starts[-1]) // len(self.plane))

    def substitute(self, number: int, turn: int) -> Any:
        """Return a text with the marks of one of the `passes`; without marks, the value itself."""
        text, first = self.texts[number].text, int(self._starts[number]) - turn * len(self.plane)
        low, high = max(0, -first), min(len(text), len(self.plane) - first)
        marked = self.marked[number][low:high] if low < high else np.zeros(0, bool)
        if not marked.any():
            return self.texts[number].value
        codes = np.arange(len(marked)) + (self.plane.start + first + low)
        held = np.frombuffer(text[low:high].encode("utf-32-le", "surrogatepass"), "<u4")
        inside = np.where(marked, codes, held).astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
        return text[:low] + inside + text[high:]

    def find(self, rendered: str, marked: str, turn: int) -> list[Found] | None:
        """Return the pieces of texts in a rendering, from one with marks; None if the two do not agree."""
        matched = _match(rendered, self._segments(marked, turn), self.texts)
        return None if matched is None else self._extended(_joined(matched, rendered, self.texts), rendered)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(f"[{chr(self.plane.start)}-{chr(self.plane.stop - 1)}]+")

    def _segments(self, marked: str, turn: int) -> list[str | tuple[int, int, int]]:
        """Return literal texts and runs of marks (text, low, high) one after the other."""
        segments: list[str | tuple[int, int, int]] = []
        at, marked = 0, _unescaped(marked)
        for run in self._pattern.finditer(marked):
            if run.start() > at:
                segments.append(marked[at : run.start()])
            codes = np.frombuffer(run[0].encode("utf-32-le"), "<u4").astype(np.int64)
            places = codes - self.plane.start + turn * len(self.plane)
            owner = np.searchsorted(self._starts, places, side="right") - 1
            cuts = np.flatnonzero((np.diff(places) != 1) | (np.diff(owner) != 0)) + 1
            for piece in np.split(np.arange(len(places)), cuts):
                text = int(owner[piece[0]])
                low = int(places[piece[0]] - self._starts[text])
                segments.append((text, low, low + len(piece)))
            at = run.end()
        return [*segments, marked[at:]]

    def _extended(self, pieces: list[Found], rendered: str) -> list[Found]:
        """Return pieces with the characters next to them that could not be marked, as far as they stand there."""
        result: list[Found] = []
        for number, piece in enumerate(pieces):
            source, marked = self.texts[piece.text].text, self.marked[piece.text]
            before, after = np.flatnonzero(marked[: piece.low]), np.flatnonzero(marked[piece.high :])
            low = int(before[-1]) + 1 if len(before) else 0
            high = piece.high + int(after[0]) if len(after) else len(source)
            floor = result[-1].stop if result else 0
            ceiling = pieces[number + 1].start if number + 1 < len(pieces) else len(rendered)
            heads = [source[at : piece.low] for at in self._edges(piece.text, low, piece.low)]
            tails = [source[piece.high : at] for at in reversed(self._edges(piece.text, piece.high, high))]
            for head, form in itertools.product(heads, FORMS):
                start = piece.start - len(form(head))
                if start >= floor and rendered[start : piece.start] == form(head):
                    piece = replace(piece, start=start, low=piece.low - len(head))
                    break
            for tail, form in itertools.product(tails, FORMS):
                stop = piece.stop + len(form(tail))
                if stop <= ceiling and rendered[piece.stop : stop] == form(tail):
                    piece = replace(piece, stop=stop, high=piece.high + len(tail))
                    break
            result.append(piece)
        return result

    def _edges(self, number: int, low: int, high: int) -> list[int]:
        """Return the places between *low* and *high* where characters without a mark can begin or end a piece."""
        inside = self.texts[number].text[low:high]
        first, last = low + len(inside) - len(inside.lstrip()), low + len(inside.rstrip())
        return sorted({first, last, *(at for at in self._literal_edges[number] if first <= at <= last)})


def choose_plane(text: str) -> range | None:
    """Return the code points for the marks of a rendered chat, None if it has characters of all planes."""
    used = {ord(character) >> 16 for character in set(text)}
    return next((plane for plane in PLANES if not used & {code >> 16 for code in (*plane[::0x10000], plane[-1])}), None)


@lru_cache(maxsize=16)
def template_literals(template: str) -> tuple[str, ...]:
    """Return the string literals of a template, the longest first.

    >>> template_literals("{% if '</think>' in m.content %}{{ m['role'] }}{% endif %}")
    ('</think>', 'role')
    """
    from jinja2 import Environment, TemplateError

    found = set()
    try:
        for _, kind, value in Environment().lex(template):
            if kind == "string":
                found.add(str(ast.literal_eval(value)))
    except (TemplateError, ValueError, SyntaxError):  # rendering reports it
        pass
    return tuple(sorted(filter(None, found), key=lambda text: (-len(text), text)))


def _markable(text: MessageText, attempt: int, literals: Sequence[str]) -> tuple[np.ndarray, set[int]]:
    """Return True for each character of a text that has a mark in an attempt, and where literals begin and end."""
    found, edges = np.ones(len(text.text), bool), set[int]()
    number = text.kind == "value" and not isinstance(text.value, str)
    if (number and attempt >= 1) or (text.kind == "key" and attempt >= 4):
        return ~found, edges
    if attempt >= 2:
        for literal in literals:
            tag = not (literal.isalnum() or literal.isspace()) and len(literal) > 1
            if tag or attempt >= 3:
                for hit in re.finditer(f"(?={re.escape(literal)})", text.text):
                    found[hit.start() : hit.start() + len(literal)] = False
                    edges |= {hit.start(), hit.start() + len(literal)} if tag else set()
    if attempt >= 3:
        found &= np.array([not (c.isspace() or c in "\"'\\" or not c.isprintable()) for c in text.text], bool)
    return found, edges


def _unescaped(marked: str) -> str:
    """Return a rendering in which marks that were escaped, as in JSON or by Python, are characters again."""
    if "\\u" in marked:
        pair = r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})"
        marked = re.sub(
            pair, lambda m: (b"".join(int(h, 16).to_bytes(2, "big") for h in m.groups())).decode("utf-16-be"), marked
        )
    return re.sub(r"\\U(00[01][0-9a-f]{5})", lambda m: chr(int(m[1], 16)), marked) if "\\U00" in marked else marked


def _match(
    rendered: str, segments: Sequence[str | tuple[int, int, int]], texts: Sequence[MessageText]
) -> list[Found] | None:
    """Return the pieces that make a rendering of segments, None if there are none."""
    failed: set[tuple[int, int]] = set()
    trail: list[tuple[Iterator[tuple[int, Found | None]], Found | None]] = []
    at, step = 0, _written(rendered, 0, segments[0], texts)
    while True:
        number = len(trail)
        following = next(step, None)
        if following is None:
            if not trail:
                return None
            step, _ = trail.pop()
            continue
        at, piece = following
        if (number + 1, at) in failed:
            continue
        failed.add((number + 1, at))
        if number + 1 == len(segments):
            if at == len(rendered):
                return [found for found in (*(piece for _, piece in trail), piece) if found is not None]
            continue
        trail.append((step, piece))
        step = _written(rendered, at, segments[number + 1], texts)


def _written(
    rendered: str, at: int, segment: str | tuple[int, int, int], texts: Sequence[MessageText]
) -> Iterator[tuple[int, Found | None]]:
    """Yield the places where a segment that begins at *at* can end, with the piece of a text that it then is."""
    if isinstance(segment, str):
        if rendered.startswith(segment, at):
            yield at + len(segment), None
        return
    number, low, high = segment
    text = texts[number]
    sources = [text.text] if isinstance(text.value, str) else [text.text, str(text.value)]
    for source in sources:
        for form in FORMS:
            if form is not FORMS[0] and form(source[low:high]) == source[low:high]:
                continue
            is_there = partial(_is_written, rendered, at, form)
            for begin, end in _stripped(source, low, high, is_there):
                written = form(source[begin:end])
                if rendered.startswith(written, at):
                    stop = at + len(written)
                    yield stop, Found(at, stop, number, begin, end, form) if begin < end else None


def _is_written(rendered: str, at: int, form: Form, text: str) -> bool:
    return rendered.startswith(form(text), at)


def _stripped(source: str, low: int, high: int, is_there: Callable[[str], bool]) -> Iterator[tuple[int, int]]:
    """Yield a piece, and the pieces with less and less white space at its ends, if the space in front is there."""
    inside = source[low:high].strip()
    if not inside:
        yield from ((begin, high) for begin in range(low, high + 1))
        return
    first = low + len(source[low:high]) - len(source[low:high].lstrip())
    last = low + len(source[low:high].rstrip())
    for begin in range(low, first + 1):
        if is_there(source[begin:first]):
            yield from ((begin, end) for end in range(high, last - 1, -1))


def _joined(pieces: list[Found], rendered: str, texts: Sequence[MessageText]) -> list[Found]:
    """Return pieces, joined where only what is between them in the text is between them in the rendering."""
    result: list[Found] = []
    for piece in pieces:
        last = result[-1] if result else None
        if last is not None and last.text == piece.text and last.high <= piece.low:
            between, there = texts[piece.text].text[last.high : piece.low], rendered[last.stop : piece.start]
            forms = [form for form in FORMS if form(between) == there]
            if forms:
                escaped = next((form for form in (last.form, piece.form, forms[0]) if form is not FORMS[0]), FORMS[0])
                result[-1] = replace(last, stop=piece.stop, high=piece.high, form=escaped)
                continue
        result.append(piece)
    return result


def find_texts(
    rendered: str,
    messages: list[dict[str, Any]],
    render: Callable[[list[dict[str, Any]]], str | None],
    literals: Sequence[str],
) -> tuple[list[MessageText], list[Found], list[int]]:
    """Return the texts of messages, their pieces in a rendering, and the numbers of the texts that no attempt finds.

    *render* returns the text of other messages, None if the template rejects them. A text that the template leaves out
    has no piece.
    """
    texts: list[MessageText] = []

    def keep(text: MessageText) -> Any:
        texts.append(text)
        return text.value

    map_texts(messages, keep)
    plane = choose_plane("".join([rendered, *(text.text for text in texts)]))

    def find_in(marking: Marking) -> list[Found] | None:
        found: list[Found] = []
        for turn in range(marking.passes):
            numbers = iter(range(len(texts)))

            def substitute(_: MessageText, turn: int = turn, numbers: Iterator[int] = numbers) -> Any:
                return marking.substitute(next(numbers), turn)

            marked = render(map_texts(messages, substitute))
            pieces = None if marked is None else marking.find(rendered, marked, turn)
            if pieces is None:
                return None
            found += pieces
        return _joined(sorted(found, key=lambda piece: piece.start), rendered, texts)

    if plane is None:
        return texts, [], list(range(len(texts)))
    found, left = [], list(range(len(texts)))
    for attempt in ATTEMPTS:
        marking = Marking(texts, attempt, literals, plane, left)
        if (together := find_in(marking)) is not None:
            found, left = together, [number for number in left if not marking.marked[number].any()]
            break
    unplaced = []
    for number in left:
        if not texts[number].text.strip() or texts[number].kind == "key" or not isinstance(texts[number].value, str):
            continue
        for attempt in (0, 2, 3):
            marking = Marking(texts, attempt, literals, plane, [number])
            alone = find_in(marking) if marking.marked[number].any() else None
            if alone is not None:
                found += alone
                break
        else:
            unplaced.append(number)
    return texts, sorted(found, key=lambda piece: piece.start), unplaced
