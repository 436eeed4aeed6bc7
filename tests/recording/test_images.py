"""Captures of images: the content of a store, its independence of the files, and refused options."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import flexcache
from analysis import probes
from analysis.readout import examples
from analysis.statistics import moments
from flexcache.errors import AnalysisError, ConfigError, DocumentsError, MismatchError, SiteError, StoreError
from flexcache.images import decode_image
from flexcache.recording.forward.batch_reader import BatchReader
from tests.models import tiny
from tests.recording.test_recorder import shard_hashes
from tests.vision import DEPTH, GRID, image_documents, processor, tiny_vision

DOCUMENTS = image_documents(24)
PAGE = Path(__file__).parents[2] / "docs" / "images.md"
QUIET: dict[str, Any] = {"progress": False, "batch_tokens": 48}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def states(model: torch.nn.Module, image: np.ndarray) -> torch.Tensor:
    """Return the hidden states of one image, shape (depth + 1, tokens, hidden)."""
    pixels = processor()(images=[Image.fromarray(image)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return torch.cat(model(pixel_values=pixels, output_hidden_states=True).hidden_states)


def test_a_store_holds_the_hidden_states_of_each_image_by_token(tmp_path: Path) -> None:
    model = tiny_vision("dinov2_registers")
    store = flexcache.capture(
        model, processor(), DOCUMENTS, tmp_path / "run.zarr", sites=["resid_pre", "resid_post"], **QUIET
    )
    tokens = 3 + GRID**2
    assert store.complete
    assert store.n_rows == 24 * tokens
    assert len(store.documents) == 24
    coordinates = store.dataset().coords
    assert set(coordinates["token_id"].values.tolist()) == {-1}
    for document in DOCUMENTS[:5]:
        expected = states(model, document["image"])
        rows = store.rows(document=document["id"])
        assert coordinates["position"].values[rows].tolist() == list(range(tokens))
        for layer in range(DEPTH):
            assert np.allclose(store.read("resid_pre", layer, rows), expected[layer], atol=1e-5)
        assert np.allclose(store.read("resid_post", 0, rows), expected[1], atol=1e-5)


def test_rows_equal_those_of_a_plain_hook_on_the_same_batches_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_vision("vit", torch.bfloat16)
    store = flexcache.capture(model, processor(), DOCUMENTS, tmp_path / "run.zarr", layers=[1], **QUIET)
    seen: list[torch.Tensor] = []
    handle = model.layers[1].register_forward_hook(lambda _, args, output: seen.append(output.clone()))
    reader, rows = BatchReader(store.path), []
    assert store.n_units > 1
    for unit in range(store.n_units):
        for batch in reader.read_unit(unit):
            assert batch.images is not None
            pixels = processor()(images=[decode_image(image, "") for image in batch.images], return_tensors="pt")
            with torch.no_grad():
                model(pixel_values=pixels["pixel_values"].to(torch.bfloat16))
            rows.append(torch.cat([seen[-1][line, a:b] for line, (a, b) in enumerate(batch.keep)]))
    handle.remove()
    assert np.array_equal(store.read("resid_post", 1), torch.cat(rows).float().numpy())


def test_image_files_are_stored_unchanged(tmp_path: Path) -> None:
    sink = io.BytesIO()
    Image.fromarray(DOCUMENTS[1]["image"]).save(sink, "JPEG", quality=90)
    (tmp_path / "a.jpg").write_bytes(sink.getvalue())
    given: list[Any] = [
        DOCUMENTS[0]["image"],
        tmp_path / "a.jpg",
        sink.getvalue(),
        Image.fromarray(DOCUMENTS[2]["image"]),
    ]
    store = flexcache.capture(
        tiny_vision("vit"), processor(), [{"image": one} for one in given], tmp_path / "run.zarr", layers=[0], **QUIET
    )
    assert np.array_equal(decode_image(store.image("0"), ""), given[0])
    assert store.image("1") == store.image("2") == sink.getvalue()
    assert np.array_equal(decode_image(store.image("3"), ""), DOCUMENTS[2]["image"])
    assert "image" not in store.tokens.column_names
    with pytest.raises(StoreError, match="are not images"):
        text = [{"tokens": [3, 4]}]
        flexcache.capture(tiny("llama"), None, text, tmp_path / "text.zarr", layers=[0], progress=False).image(0)


@pytest.mark.parametrize("rows", ["last", "first", "mean", {"specials": False}])
def test_some_rows_of_images_can_be_chosen(rows: Any, tmp_path: Path) -> None:
    model = tiny_vision("deit")
    store = flexcache.capture(model, processor(), DOCUMENTS[:6], tmp_path / "run.zarr", layers=[0], rows=rows, **QUIET)
    for document in DOCUMENTS[:3]:
        whole = states(model, document["image"])[1]
        found = store.read("resid_post", 0, store.rows(document=document["id"]))
        expected = (
            whole[2:]
            if isinstance(rows, dict)
            else {"last": whole[-1:], "first": whole[:1], "mean": whole.mean(0)[None]}[rows]
        )
        assert np.allclose(found, expected, atol=1e-5)


def test_resume_recompute_and_extension_need_only_the_store(tmp_path: Path) -> None:
    model, folder = tiny_vision("clip_vision"), tmp_path / "pictures"
    folder.mkdir()
    for number, document in enumerate(DOCUMENTS):
        Image.fromarray(document["image"]).save(folder / f"{number:02}.png")
    whole = flexcache.capture(model, processor(), folder, tmp_path / "whole.zarr", **QUIET)
    records = sorted((tmp_path / "whole.zarr" / "ledger" / "0").iterdir())
    assert len(records) > 1
    before = shard_hashes(whole.path)
    records[0].unlink()
    listed = flexcache.open_documents(folder)
    again = flexcache.capture(model, processor(), listed, tmp_path / "whole.zarr", **QUIET)
    assert again.complete
    assert shard_hashes(again.path) == before
    for picture in folder.iterdir():
        picture.unlink()
    assert all(part.equal for part in flexcache.recompute(model, whole.path, units=9))
    grown = flexcache.extend(model, None, whole.path, sites=["attn_out"], layers=[0], progress=False)
    assert grown.layers("attn_out") == (0,)
    assert all(part.equal for part in flexcache.recompute(model, whole.path, units=9))


def test_a_store_is_extended_by_more_images(tmp_path: Path) -> None:
    model = tiny_vision("vit")
    store = flexcache.capture(model, processor(), DOCUMENTS[:9], tmp_path / "run.zarr", layers=[0], **QUIET)
    old = store.read("resid_post", 0)
    grown = flexcache.extend(model, processor(), store.path, DOCUMENTS[9:12], progress=False)
    assert len(grown.documents) == 12
    assert np.array_equal(grown.read("resid_post", 0, range(len(old))), old)
    assert np.array_equal(decode_image(grown.image("picture-11"), ""), DOCUMENTS[11]["image"])
    changed = [{**DOCUMENTS[2], "image": DOCUMENTS[3]["image"]}]
    with pytest.raises(DocumentsError, match="in the store with other contents"):
        flexcache.extend(model, processor(), store.path, changed, progress=False)
    with pytest.raises(MismatchError, match="image processor is not the one"):
        flexcache.extend(model, processor(image_mean=[0.1] * 3), store.path, DOCUMENTS[12:], progress=False)


@pytest.mark.slow
def test_a_function_may_be_the_image_processor(tmp_path: Path) -> None:
    model = tiny_vision("vit")
    store = flexcache.capture(model, by_hand, DOCUMENTS[:4], tmp_path / "hand.zarr", layers=[0], **QUIET)
    same = flexcache.capture(model, processor(), DOCUMENTS[:4], tmp_path / "run.zarr", layers=[0], **QUIET)
    assert np.allclose(store.read("resid_post", 0), same.read("resid_post", 0), atol=1e-4)
    assert store.provenance.tokenizer["function"].endswith("by_hand")
    with pytest.raises(MismatchError, match="cannot be rebuilt"):
        flexcache.recompute(model, store.path)
    assert all(part.equal for part in flexcache.recompute(model, store.path, tokenizer=by_hand))


def by_hand(pictures: list[Image.Image]) -> np.ndarray:
    resized = [np.asarray(picture.resize((24, 24), Image.Resampling.BILINEAR), np.float32) for picture in pictures]
    return (np.stack(resized).transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5


def test_probes_labels_and_statistics_work_on_patches(tmp_path: Path) -> None:
    model = tiny_vision("vit")
    labelled = [{**document, "half": [None, *(["upper"] * 5 + ["lower"] * 4)]} for document in DOCUMENTS]
    store = flexcache.capture(model, processor(), labelled, tmp_path / "run.zarr", token_labels=["half"], **QUIET)
    assert store.token_labels == ("half",)
    row, _ = store.patches.place(store.coordinates["position"].values)
    upper = np.array([value == "upper" for value in store.token_label("half").to_pylist()])
    assert (upper <= (row <= 1)).all()
    assert upper.sum() == 24 * 5
    with pytest.raises(AnalysisError, match="tokens of images have no ids"):
        moments.compute(store, "resid_post", by=["token_id"])
    mean = moments.compute(store, "resid_post", by=["layer"])["mean"]
    assert np.allclose(mean.values, store["resid_post"].values.mean(axis=1), atol=1e-5)
    (example, *_) = examples.top(store, "resid_post", 1, 5)
    assert example.tokens[example.place].strip() == store.patches.name(example.position)
    assert {" cls", " 0,0"} <= set(example.tokens) or example.position > 5
    sweep = probes.sweep(store, target="bright", site="resid_post", probe=probes.Ridge(), groups="document")
    assert sweep.results.sizes["layer"] == DEPTH


def test_units_of_large_images_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexcache.plan.SHARD_BYTES", 50_000)
    options = {**QUIET, "batch_tokens": 480, "layers": [0]}
    small = [{"image": np.full((4, 4, 3), number, np.uint8)} for number in range(60)]
    rows = [
        flexcache.capture(tiny_vision("vit"), processor(), documents, tmp_path / name, **options).shard_rows
        for name, documents in (("large.zarr", image_documents(60)), ("small.zarr", small))
    ]
    assert rows == [128, 256]


@pytest.mark.slow
def test_the_page_on_images_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf.AutoModel, "from_pretrained", lambda name: tiny_vision("dinov2_registers"))
    monkeypatch.setattr(hf.AutoImageProcessor, "from_pretrained", lambda name, backend: processor())
    (tmp_path / "pictures").mkdir()
    for document in DOCUMENTS:
        Image.fromarray(document["image"]).save(tmp_path / "pictures" / f"{document['id']}.png")
    names: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), names)
    assert (tmp_path / "norms.png").stat().st_size > 0
    assert names["sweep"].best.score > 0.9  # positions are added to the stream
    assert names["sweep"].results.sizes["layer"] == DEPTH


def test_gradients_of_a_custom_objective(tmp_path: Path) -> None:
    model = tiny_vision("vit")
    with pytest.raises(ConfigError, match="need a custom objective"):
        flexcache.capture(model, processor(), DOCUMENTS[:4], tmp_path / "no.zarr", sites=["resid_post.grad"], **QUIET)
    store = flexcache.capture(
        model,
        processor(),
        DOCUMENTS[:4],
        tmp_path / "run.zarr",
        sites=["resid_post.grad"],
        objective=first_feature,
        **QUIET,
    )
    assert store.layers("resid_post.grad") == tuple(range(DEPTH))
    assert np.abs(store.read("resid_post.grad", 0)).max() > 0


def first_feature(output: Any, batch: Any) -> torch.Tensor:
    return output.last_hidden_state[:, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": {"length": 32}}, "packing is for texts"),
        ({"windows": {"length": 32}}, "windows is for texts"),
        ({"max_length": 4}, "max_length is for texts"),
        ({"rows": {"roles": ["user"]}}, "rows by roles, turns or parts is for texts"),
        ({"rows": {"character_spans": "bright"}}, "rows by character_spans is for texts"),
    ],
)
def test_options_for_texts_are_refused_for_images(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        flexcache.capture(tiny_vision("vit"), processor(), DOCUMENTS, tmp_path / "run.zarr", **options, **QUIET)
    assert not (tmp_path / "run.zarr").exists()


def test_model_documents_and_processor_must_belong_together(tmp_path: Path) -> None:
    path, text = tmp_path / "run.zarr", [{"tokens": [3, 4, 5]}]
    with pytest.raises(ConfigError, match="reads text, and the documents are images"):
        flexcache.capture(tiny("llama"), processor(), DOCUMENTS, path, **QUIET)
    with pytest.raises(ConfigError, match="reads images, and the documents are not"):
        flexcache.capture(tiny_vision("vit"), processor(), text, path, **QUIET)
    with pytest.raises(ConfigError, match="no image processor is given"):
        flexcache.capture(tiny_vision("vit"), None, DOCUMENTS, path, **QUIET)
    with pytest.raises(ConfigError, match="pixels of several sizes"):
        uneven = processor(size={"shortest_edge": 24})
        flexcache.capture(tiny_vision("vit"), uneven, DOCUMENTS, path, **QUIET)
    with pytest.raises(SiteError, match="cannot run on an image"):
        flexcache.capture(tiny_vision("vit"), processor(size={"height": 32, "width": 32}), DOCUMENTS, path, **QUIET)
    with pytest.raises(DocumentsError, match="there is no image processor to read them"):
        flexcache.record(path, DOCUMENTS, sites={"resid_post": (2, 8)}, model="mine", dtype="float32")
    assert not path.exists()


def test_a_damaged_image_is_named_before_anything_runs(tmp_path: Path) -> None:
    sink = io.BytesIO()
    Image.fromarray(DOCUMENTS[0]["image"]).save(sink, "PNG")
    cut = [*DOCUMENTS[:3], {"id": "cut", "image": sink.getvalue()[:-400], "bright": True}]
    with pytest.raises(DocumentsError, match="cannot be decoded") as error:
        flexcache.capture(tiny_vision("vit"), processor(), cut, tmp_path / "run.zarr", **QUIET)
    assert "'cut'" in str(error.value.where)
    assert not (tmp_path / "run.zarr").exists()
