"""Special tokens around texts that have them already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flexcache
from flexcache.errors import ConfigError, MismatchError
from tests.corpora import build_store
from tests.models import tiny

BOS, EOS, THE, FOX, DOG = 1, 2, 4, 7, 11
TEXTS = {"plain": "the fox", "opened": "<s> the fox", "closed": "the fox </s>", "both": " <s> the fox </s>"}
ONCE, OPEN, CLOSE, TWICE = (
    [BOS, THE, FOX, EOS],
    [BOS, BOS, THE, FOX, EOS],
    [BOS, THE, FOX, EOS, EOS],
    [1, 1, 4, 7, 2, 2],
)


def documents(**texts: str) -> list[dict[str, str]]:
    return [{"id": name, "text": text} for name, text in (texts or TEXTS).items()]


def tokens(store: flexcache.Store) -> dict[str, list[int]]:
    ids = store.documents["id"].to_pylist()
    lines = zip(store.tokens["document"].to_pylist(), store.tokens["tokens"].to_pylist(), strict=True)
    return {ids[document]: found for document, found in lines}


def as_written_before(path: Path) -> None:
    """Remove from a store what versions without `special_tokens` do not write."""
    content = json.loads((path / "zarr.json").read_text())
    held = content["attributes"]["flexcache"]
    assert held["spec"].pop("special_tokens") == "always"
    held.pop("xxh3_128", None)
    (path / "zarr.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", {"plain": ONCE, "opened": ONCE, "closed": ONCE, "both": ONCE}),
        ("always", {"plain": ONCE, "opened": OPEN, "closed": CLOSE, "both": TWICE}),
        ("never", {"plain": [4, 7], "opened": [1, 4, 7], "closed": [4, 7, 2], "both": ONCE}),
    ],
)
def test_each_side_of_a_text_has_its_special_tokens_as_often_as_is_asked(
    choice: Any, expected: Any, tokenizer: Any, tmp_path: Path
) -> None:
    store = build_store(tmp_path / "run.zarr", documents(), tokenizer=tokenizer, special_tokens=choice)
    assert tokens(store) == expected
    assert store.spec.special_tokens == choice
    written = json.loads((tmp_path / "run.zarr/zarr.json").read_text())["attributes"]["flexcache"]
    assert ("special_tokens" in written["spec"], written["plan"].get("doubled_documents")) == (
        choice != "auto",
        3 if choice == "auto" else None,
    )


def test_a_store_of_texts_without_special_tokens_says_nothing_about_them(tokenizer: Any, tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr", documents(a="the fox", b="dog"), tokenizer=tokenizer)
    assert "special_tokens" not in json.dumps(store.spec.to_json())
    assert "doubled_documents" not in store.plan


@pytest.mark.parametrize(
    ("around", "text", "expected"),
    [
        ("$A </s>", "the fox </s>", [4, 7, 2]),  # as T5
        ("$A </s>", "</s> the fox", [2, 4, 7, 2]),
        ("<s> <pad> $A", "<s> <pad> the", [1, 3, 4]),  # two tokens in front, as GLM
        ("<s> <pad> $A", "<s> the", [1, 4]),
        ("<s> <pad> $A", "<pad> the", [1, 3, 3, 4]),
        ("<s> $A <pad> </s>", "the </s>", [1, 4, 2]),
        ("<s> $A", "the <s>", [1, 4, 1]),
        ("<s> $A", "<s>", [1]),
        ("$A", "<s> the", [1, 4]),
    ],
)
def test_other_tokens_in_front_and_behind(
    around: str, text: str, expected: list[int], tokenizer: Any, tmp_path: Path
) -> None:
    from tokenizers import processors

    used = [(name, number) for name, number in (("<s>", 1), ("</s>", 2), ("<pad>", 3)) if name in around]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(around, special_tokens=used)
    store = build_store(tmp_path / "run.zarr", documents(a=text, b="dog"), tokenizer=tokenizer)
    assert tokens(store)["a"] == expected


def test_a_tokenizer_without_tokens_for_the_letters_of_a_trial(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE({"<s>": 0, "x": 1}, []))
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
    assert tokenizer("a")["input_ids"] == [0]
    store = build_store(tmp_path / "run.zarr", documents(a="<s>x", b="x"), tokenizer=tokenizer)
    assert tokens(store) == {"a": [0, 1], "b": [0, 1]}


def test_truncated_texts_and_spans_of_characters_fit_their_own_special_tokens(tokenizer: Any, tmp_path: Path) -> None:
    text = "<s> the quick brown fox jumps over the lazy dog </s>"
    spans = [{"start": 4, "end": 7, "label": "article"}]
    given = [{"id": "a", "text": text, "part": spans}, {"id": "b", "text": text[4:-5], "part": spans}]
    options: dict[str, Any] = {"tokenizer": tokenizer, "token_labels": ["part"]}
    long = build_store(tmp_path / "long.zarr", given, max_length=11, **options)
    assert tokens(long)["a"] == tokens(long)["b"] == tokenizer(text[4:-5])["input_ids"]
    assert long.plan["truncated_documents"] == 0
    short = build_store(tmp_path / "short.zarr", given, max_length=5, **options)
    assert tokens(short)["a"] == tokens(short)["b"] == tokenizer(text[4:-5], truncation=True, max_length=5)["input_ids"]
    assert short.plan["truncated_documents"] == 2
    assert short.tokens["part"].to_pylist()[0] == [None, "article", None, None, None]


@pytest.mark.parametrize(
    ("packing", "special_tokens", "expected"),
    [
        ({"isolate": True}, "auto", [[1, 4, 7, 1, 11], [1, 7, 7, 7]]),
        ({"isolate": True}, "always", [[1, 1, 4, 7, 1, 11], [1, 7, 7, 7]]),
        ({"isolate": True}, "never", [[1, 4, 7, 11], [7, 7, 7]]),
        ({}, "auto", [[1, 4, 7, 2, 11], [1, 2, 7, 7, 7]]),
        ({}, "always", [[1, 1, 4, 7, 2, 11], [1, 2, 7, 7, 7]]),
        ({}, "never", [[1, 4, 7, 2, 11, 2], [7, 7, 7]]),
        ({"bos": "bos"}, "never", [[1, 1, 4, 7, 2, 11], [1, 2, 7, 7, 7]]),
    ],
)
def test_packed_documents_open_once(
    packing: Any, special_tokens: Any, expected: Any, tokenizer: Any, tmp_path: Path
) -> None:
    given = documents(a="<s> the fox", b="dog", c="fox fox fox")
    options: dict[str, Any] = {"tokenizer": tokenizer, "special_tokens": special_tokens}
    store = build_store(tmp_path / "run.zarr", given, packing={"length": 6, **packing}, **options)
    assert store.tokens["tokens"].to_pylist() == expected
    assert store.coordinates["token_id"].values.tolist() == [1, 4, 7, 11, 7, 7, 7]
    assert store.coordinates["position"].values.tolist() == [0, 1, 2, 0, 0, 1, 2]


def test_an_isolated_document_that_opens_itself_is_computed_as_if_alone(tokenizer: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model, given = tiny("llama"), documents(a="the dog", b="<s> the fox", c="dog")
    packing = {"length": 10, "isolate": True}
    options: dict[str, Any] = {"layers": [1], "packing": packing, "progress": False}
    store = flexcache.capture(model, tokenizer, given, tmp_path / "run.zarr", **options)
    assert store.tokens["tokens"].to_pylist() == [[1, 4, 11, 1, 4, 7, 1, 11]]
    for name, alone, kept in (("b", [1, 4, 7], slice(0, 3)), ("c", [1, 11], slice(1, 2))):
        with torch.no_grad():
            states = model(torch.tensor([alone]), output_hidden_states=True).hidden_states[2][0].numpy()
        assert np.allclose(store.read("resid_post", 1, store.rows(document=name)), states[kept], atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"packing": {"length": 8}}, {"packing": {"length": 8, "isolate": True}}])
def test_a_store_of_an_earlier_version_goes_on_as_it_began(options: Any, tokenizer: Any, tmp_path: Path) -> None:
    path, new = tmp_path / "run.zarr", documents(c="<s> the fox </s>")
    given = documents(a="<s> the fox </s>", b="dog dog dog")
    options = {**options, "layers": [1], "progress": False}
    flexcache.capture(tiny("llama"), tokenizer, given, path, special_tokens="always", **options)
    before = flexcache.open(path).tokens["tokens"].to_pylist()
    as_written_before(path)
    flexcache.capture(tiny("llama"), tokenizer, given, path, **options)  # nothing to do: the plan is in the store
    store = flexcache.extend(tiny("llama"), tokenizer, new, path, progress=False)
    found = store.tokens["tokens"].to_pylist()
    assert found[: len(before)] == before
    assert found[len(before)][:3] == [1, 1, 4]
    whole = flexcache.capture(
        tiny("llama"), tokenizer, given + new, tmp_path / "w.zarr", special_tokens="always", **options
    )
    for name in "abc":
        rows = [one.coordinates["token_id"].values[one.rows(document=name)].tolist() for one in (store, whole)]
        assert rows[0] == rows[1]
    if "packing" not in options:
        labels = [{"id": name, "part": [{"start": 4, "end": 7, "label": "article"}]} for name in "ac"]
        store.join(labels, on="id", token_labels=["part"], tokenizer=tokenizer)
        values = flexcache.open(path).token_label("part").to_pylist()
        assert [values[row] for row in store.rows(document="c")] == [None, None, "article", None, None, None]


def test_a_store_with_texts_left_as_they_are_is_extended_in_that_way(
    tokenizer: Any, tmp_path: Path, capsys: Any
) -> None:
    path, notice = tmp_path / "run.zarr", "special tokens of their own, which are not added again"
    double = documents(a="<s> <s> the fox", b="dog")  # the text itself has two
    flexcache.capture(tiny("llama"), tokenizer, double, path, layers=[1])
    assert " ".join(capsys.readouterr().err.split()).count(f"special tokens: 1 text begins or ends with {notice}") == 1
    more = documents(c="<s> the fox", d="<s> dog", e="dog")
    store = flexcache.extend(tiny("llama"), tokenizer, more, path)
    assert " ".join(capsys.readouterr().err.split()).count(f"2 texts begin or end with {notice}") == 1
    assert tokens(store) == {"a": [1, 1, 4, 7, 2], "b": [1, 11, 2], "c": ONCE, "d": [1, 11, 2], "e": [1, 11, 2]}
    assert store.plan["doubled_documents"] == 3


def test_a_store_is_resumed_and_extended_with_its_own_choice_only(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    options: dict[str, Any] = {"layers": [1], "progress": False}
    flexcache.capture(tiny("llama"), tokenizer, documents(), path, special_tokens="never", **options)
    with pytest.raises(MismatchError, match="special_tokens: never in the store, nothing now"):
        flexcache.capture(tiny("llama"), tokenizer, documents(), path, **options)
    spec = flexcache.CaptureSpec(special_tokens="auto")
    with pytest.raises(MismatchError, match="special_tokens: never in the store, auto in the configuration"):
        flexcache.extend(tiny("llama"), tokenizer, documents(c="dog"), path, spec=spec, progress=False)
    store = flexcache.extend(tiny("llama"), tokenizer, documents(c="dog"), path, progress=False)
    assert tokens(store)["c"] == [DOG]


def test_a_choice_that_cannot_be_applied_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    def plain(texts: list[str]) -> list[list[int]]:
        return [[5] for _ in texts]

    with pytest.raises(ConfigError, match="special_tokens: never cannot be applied"):
        build_store(tmp_path / "run.zarr", documents(), tokenizer=plain, special_tokens="never")
    with pytest.raises(ConfigError, match="special_tokens"):
        build_store(tmp_path / "run.zarr", documents(), tokenizer=tokenizer, special_tokens="twice")
    with pytest.raises(ConfigError, match="special_tokens is for texts"):
        flexcache.CaptureSpec(special_tokens="never").check_images()


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("auto", [[1, 4, 7], [1, 4, 7]]), ("always", [[1, 1, 4, 7], [1, 4, 7]]), ("never", [[1, 4, 7], [4, 7]])],
)
def test_prompts_of_completions_begin_once(choice: Any, expected: Any, tokenizer: Any, tmp_path: Path) -> None:
    given, made = documents(a="<s> the fox", b="the fox"), tmp_path / "made"
    options: dict[str, Any] = {"max_new_tokens": 2}
    found = flexcache.generate(tiny("llama"), tokenizer, given, made, special_tokens=choice, **options)
    rows = [row for batch in found.batches() for row in batch.to_pylist()]
    assert [row["tokens"][: row["prompt_tokens"]] for row in rows] == expected
    generate: Any = {"generate": options, "special_tokens": choice}
    store = flexcache.capture(tiny("llama"), tokenizer, given, tmp_path / "run.zarr", progress=False, **generate)
    assert [found[: len(prompt)] for found, prompt in zip(tokens(store).values(), expected)] == expected
    other = "auto" if choice == "never" else "never"
    with pytest.raises(MismatchError, match="special_tokens"):
        flexcache.generate(tiny("llama"), tokenizer, given, made, special_tokens=other, **options)  # type: ignore[arg-type]


def test_completions_of_an_earlier_version_go_on_as_they_began(tokenizer: Any, tmp_path: Path) -> None:
    given, model = documents(a="<s> the fox"), tiny("llama")
    flexcache.generate(model, tokenizer, given, tmp_path, special_tokens="always", max_new_tokens=2)
    request = json.loads((tmp_path / "request").read_text())
    assert request.pop("special_tokens") == "always"
    (tmp_path / "request").write_text(json.dumps(request))
    for file in ("complete", "part-000000.parquet"):
        (tmp_path / file).unlink()
    found = flexcache.generate(model, tokenizer, given, tmp_path, max_new_tokens=2)
    assert [row["prompt_tokens"] for batch in found.batches() for row in batch.to_pylist()] == [4]
    assert "special_tokens" not in json.loads((tmp_path / "request").read_text())
    with pytest.raises(MismatchError, match="special_tokens"):
        flexcache.generate(model, tokenizer, given, tmp_path, special_tokens="never", max_new_tokens=2)


def test_a_file_sets_special_tokens(tmp_path: Path) -> None:
    from pipelines.config import read_config

    (tmp_path / "run.yaml").write_text("model: m\ndocuments: d.jsonl\nstore: s\nspecial_tokens: never\n")
    assert read_config(tmp_path / "run.yaml").special_tokens == "never"
    assert read_config(tmp_path / "run.yaml", ["special_tokens=always"]).special_tokens == "always"
