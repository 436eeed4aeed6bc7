"""Images as documents: their sources, their encoding, and errors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flexcache.documents import open_documents
from flexcache.errors import DocumentsError
from flexcache.images import Patches, decode_image, encode_image
from tests.vision import arrays

ARRAYS = arrays(5)


def jpeg(array: np.ndarray, **more: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(array).save(sink, "JPEG", **more)
    return sink.getvalue()


FILES = [jpeg(array) for array in ARRAYS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images in two folders, and a file that is not an image."""
    root = tmp_path / "pictures"
    for number, content in enumerate(FILES):
        path = root / ("cats" if number % 2 else "dogs") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / "notes.md").write_text("not a picture")
    return root


def read(documents: Any) -> pa.Table:
    return pa.Table.from_batches(list(documents.batches()), documents.schema)


def test_images_of_a_folder_have_their_names_as_ids_and_their_folders_as_labels(folder: Path) -> None:
    documents = open_documents(folder)
    table = read(documents)
    assert table.column("id").to_pylist() == ["cats/1.jpg", "cats/3.jpg", "dogs/0.jpg", "dogs/2.jpg", "dogs/4.jpg"]
    assert table.column("image").to_pylist() == [FILES[number] for number in (1, 3, 0, 2, 4)]
    assert table.column("folder").to_pylist() == ["cats", "cats", "dogs", "dogs", "dogs"]
    (said,) = documents.describe()["files"]
    assert (said["files"], said["bytes"]) == (5, sum(map(len, FILES)))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_paths_in_a_table_are_relative_to_it(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{'cats' if number % 2 else 'dogs'}/{number}.jpg" for number in range(5)]
    path = folder / f"table.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"picture": name, "n": n}) for n, name in enumerate(names)))
    elif kind == "csv":
        path.write_text("picture,n\n" + "\n".join(f"{name},{n}" for n, name in enumerate(names)))
    else:
        pq.write_table(pa.table({"picture": names, "n": range(5)}), path)
    monkeypatch.chdir(tmp_path)
    for given in (path, folder):  # of a folder with a table in it, the table is the corpus
        documents = open_documents(given, image="picture")
        table = read(documents)
        assert table.column("image").to_pylist() == FILES
        assert table.column("n").to_pylist() == list(range(5))
    (folder / names[3]).unlink()
    with pytest.raises(DocumentsError, match="the file of an image cannot be read") as error:
        read(open_documents(path, image="picture"))
    assert ("'3'" if kind != "jsonl" else "line 4") in str(error.value.where)


def test_encoded_images_are_read_from_parquet_and_datasets(tmp_path: Path) -> None:
    import datasets

    pq.write_table(pa.table({"id": list("abcde"), "image": FILES}), tmp_path / "bytes.parquet")
    assert read(open_documents(tmp_path / "bytes.parquet")).column("image").to_pylist() == FILES
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    given = {"image": [{"bytes": content, "path": None} for content in FILES], "label": [0, 1, 0, 1, 1]}
    dataset = datasets.Dataset.from_dict(given, features=features)
    for source in (dataset, dataset.to_iterable_dataset()):
        table = read(open_documents(source))
        assert table.column("image").to_pylist() == FILES
        assert table.column("label").to_pylist() == [0, 1, 0, 1, 1]


def test_images_in_memory_become_png_without_loss(tmp_path: Path) -> None:
    grey = ARRAYS[0][..., 0]
    clear = np.dstack([ARRAYS[1], np.full(ARRAYS[1].shape[:2], 255, np.uint8)])
    for value, expected in (
        (ARRAYS[0], ARRAYS[0]),
        (Image.fromarray(ARRAYS[2]), ARRAYS[2]),
        (grey, np.dstack([grey] * 3)),
        (grey[..., None], np.dstack([grey] * 3)),
        (clear, ARRAYS[1]),
    ):
        assert np.array_equal(decode_image(encode_image(value, ""), ""), expected)
    assert encode_image({"bytes": None, "path": "a"}, "", _written(tmp_path)) == FILES[0]


def _written(folder: Path) -> Path:
    (folder / "a").write_bytes(FILES[0])
    return folder


def test_an_image_is_rotated_by_its_exif_data() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the left
    turned = decode_image(jpeg(ARRAYS[0], exif=exif), "")
    assert np.asarray(turned).shape == (ARRAYS[0].shape[1], ARRAYS[0].shape[0], 3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "a document without image: it is null"),
        (7, "not an image"),
        (np.zeros((4, 4, 3), np.float32), "an array that is not an image"),
        (np.zeros((3, 8, 8), np.uint8), "an array that is not an image"),
        (np.zeros((0, 8, 3), np.uint8), "an array that is not an image"),
        (Image.new("CMYK", (4, 4)), "cannot be kept as PNG"),
        (Image.new("I;16", (4, 4)), "more than eight bits"),
        ("nowhere.png", "the file of an image cannot be read"),
    ],
)
def test_an_invalid_image_is_refused_with_its_document(value: Any, message: str) -> None:
    documents = [{"id": "good", "image": ARRAYS[0]}, {"id": "bad", "image": value}]
    with pytest.raises(DocumentsError, match=message) as error:
        read(open_documents(documents))
    assert "document 1" in str(error.value.where)


@pytest.mark.parametrize("content", [b"", b"no picture", FILES[0][:-30], jpeg(ARRAYS[0])[:20]])
def test_damaged_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(DocumentsError, match="cannot be decoded") as error:
        decode_image(content, "document 'x'")
    assert error.value.where == "document 'x'"


def test_an_image_of_sixteen_bits_is_refused() -> None:
    sink = io.BytesIO()
    Image.new("I;16", (4, 4)).save(sink, "PNG")
    with pytest.raises(DocumentsError, match="more than eight bits"):
        decode_image(sink.getvalue(), "document 'deep'")


def test_documents_with_text_and_image_are_texts() -> None:
    table = pa.table({"text": ["a", "b"], "image": FILES[:2]})
    assert open_documents(table).schema.names == ["id", "text", "image"]
    with pytest.raises(DocumentsError, match="are mixed"):
        read(open_documents([{"text": "a"}, {"image": ARRAYS[0]}]))


def test_patches_have_positions_in_the_sequence() -> None:
    patches = Patches(("cls", "register_0"), 2, 3, ("detection_0",))
    assert patches.tokens == 9
    assert patches.specials == {"cls": 0, "register_0": 1, "detection_0": 8}
    rows, columns = patches.place(np.arange(9))
    assert rows.tolist() == [-1, -1, 0, 0, 0, 1, 1, 1, -1]
    assert columns.tolist() == [-1, -1, 0, 1, 2, 0, 1, 2, -1]
    assert all(patches.position(rows[i], columns[i]) == i for i in range(2, 8))
    assert patches.map(np.arange(9)).tolist() == [[2, 3, 4], [5, 6, 7]]
    assert patches.map(np.ones((6, 5))).shape == (2, 3, 5)
    assert Patches.from_json(json.loads(json.dumps(patches.to_json()))) == patches
    with pytest.raises(IndexError, match="no patch in row 2"):
        patches.position(2, 0)
    with pytest.raises(ValueError, match="9 tokens or 6 patches"):
        patches.map(np.arange(7))
