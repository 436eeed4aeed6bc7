from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flexcache
from analysis.dataset import tokens
from analysis.dataset.tokens import Vocabulary
from analysis.readout import examples
from flexcache.errors import AnalysisError
from tests.analysis.stores import value_store
from tests.analysis.test_moments import LENGTHS

WORDS = Vocabulary(tuple(f" <w{i}>" for i in range(11)), frozenset({0}))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    values = np.random.default_rng(0).normal(size=(2, sum(LENGTHS), 5))
    return value_store(tmp_path_factory.mktemp("stores") / "s.zarr", values, LENGTHS)


@pytest.mark.parametrize("per_document", [1, 3])
def test_the_top_tokens_of_a_neuron_are_those_of_a_full_sort(store: flexcache.Store, per_document: int) -> None:
    found = examples.top(store, "resid_post", 1, 3, count=40, per_document=per_document, words=WORDS, progress=False)
    values = store.read("resid_post", 1)[:, 3].astype(np.float64)
    document, expected, seen = store.coordinates["document"].values, [], {}
    for row in np.argsort(-values, kind="stable"):
        seen[document[row]] = seen.get(document[row], 0) + 1
        if seen[document[row]] <= per_document:
            expected.append(row)
    assert [example.value for example in found] == values[expected[:40]].tolist()
    position, ids = store.coordinates["position"].values, store.coordinates["token_id"].values
    for example, row in zip(found, expected):
        assert example.position == position[row]
        assert example.tokens[example.place] == f" <w{ids[row]}>"
        assert example.values[example.place] == example.value
        assert len(example.tokens) <= 25
        assert "[[" in str(example)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"count": 2.5}, {"per_document": 0}, {"context": -1}])
def test_numbers_that_ask_for_no_example_are_refused(store: flexcache.Store, wrong: dict[str, Any]) -> None:
    with pytest.raises(AnalysisError, match=f"{next(iter(wrong))} cannot be used"):
        examples.top(store, "resid_post", 1, 3, progress=False, **wrong)


@pytest.mark.parametrize("per_document", [1, 2])
def test_a_document_with_all_the_largest_values_leaves_room_for_others(per_document: int, tmp_path: Path) -> None:
    lengths = [3, 400, 1, *[5] * 60]
    values = np.random.default_rng(0).normal(size=(1, sum(lengths), 2))
    values[0, 3:403] += 100
    store = value_store(tmp_path / "s.zarr", values, lengths)
    found = examples.top(store, "resid_post", 0, 1, count=30, per_document=per_document, progress=False)
    documents = [example.document for example in found]
    assert len(found) == 30
    assert documents.count("d1") == per_document
    own, document = store.read("resid_post", 0)[:, 1], store.coordinates["document"].values
    best = sorted((v for d in set(document) for v in sorted(own[document == d])[-per_document:]), reverse=True)
    assert [example.value for example in found] == [float(value) for value in best[:30]]
    everything = examples.top(store, "resid_post", 0, 1, count=1000, per_document=per_document, progress=False)
    assert len(everything) == sum(min(length, per_document) for length in lengths)


def test_a_direction_ranks_rows_by_their_product(store: flexcache.Store) -> None:
    direction = np.array([1.0, -2.0, 0.5, 0.0, 3.0])
    found = examples.top(store, "resid_post", 0, direction, count=1, progress=False)
    values = store.read("resid_post", 0).astype(np.float64) @ direction
    assert found[0].value == pytest.approx(values.max(), rel=1e-12)
    assert found[0].tokens[0].startswith("#")


def test_html_is_escaped_and_balanced(store: flexcache.Store) -> None:
    found = examples.top(store, "resid_post", 1, 3, count=3, words=WORDS, progress=False)
    page = examples.html(found)
    assert "<w" not in page
    assert "&lt;w" in page
    opened: list[str] = []

    class Balanced(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Balanced().feed(page)
    assert opened == []
    assert page.count('class="example"') == 3


def test_directions_of_another_length_are_refused(store: flexcache.Store) -> None:
    with pytest.raises(AnalysisError, match="another length"):
        examples.top(store, "resid_post", 0, [1.0, 2.0])
    with pytest.raises(AnalysisError, match="features 0 to 4"):
        examples.top(store, "resid_post", 0, 9)


class Tokenizer:
    all_special_ids = (0,)

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.pieces[i] for i in ids]


@pytest.mark.parametrize(
    ("pieces", "texts"),
    [
        (("<s>", "Ġthe", "re", "Ġ42", "Ċ", "Ã©", "##"), ("<s>", " the", "re", " 42", "\n", "é", "##")),
        (("<s>", "▁the", "re", "▁42", "▁", "é", "##"), ("<s>", " the", "re", " 42", " ", "é", "##")),
    ],
)
def test_tokens_are_classified_for_any_marker_of_word_starts(pieces: tuple[str, ...], texts: tuple[str, ...]) -> None:
    words = tokens.vocabulary(tokenizer=Tokenizer(*pieces))
    assert words is not None
    assert words.texts == texts
    types = tokens.token_types(words)
    named = [types.names[code] for code in types.codes]
    assert named == ["special", "word start", "word inside", "number", "space", "word inside", "punctuation"]


def test_marked_word_pieces_are_inside_words() -> None:
    words = tokens.vocabulary(tokenizer=Tokenizer("[CLS]", "the", "##re"))
    assert words is not None
    assert words.texts[1:] == (" the", "re")


def test_a_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match="cannot be loaded"):
        tokens.vocabulary(tokenizer=tmp_path / "nothing")
