"""Measure size, speed and error of dtypes and codecs on the activations of a store."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import ml_dtypes
import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from analysis.dataset.store_argument import accept_store_path
from analysis.progress import bar
from analysis.statistics.codec_errors import (
    SAMPLE_BYTES,
    Floats,
    measure_loss,
    sample_rows,
    stored_keys,
)
from analysis.statistics.codec_errors import Loss as Loss
from analysis.statistics.codec_errors import estimate_losses as estimate_losses
from flexcache.errors import AnalysisError
from flexcache.store.format.int8 import default_outliers, dequantize, quantize
from flexcache.store.format.shard import INNER_CHUNK_BYTES
from flexcache.store.read.store import Store
from flexcache.store.write.shard_file import ZSTD_LEVEL

ROUNDS = 5

EncodedChunks = list[NDArray[np.uint8]]


@dataclass(frozen=True)
class Codec:
    """A way to store rows.

    Attributes
    ----------
    name : str
        The dtype, and a codec after a plus sign.
    encode : callable
        Function of the stored rows and the same rows in float32 that returns chunks of bytes.
    decode : callable
        Function of the chunks and the shape of the rows that returns float32.
    """

    name: str
    encode: Callable[[NDArray[Any], Floats], EncodedChunks]
    decode: Callable[[EncodedChunks, tuple[int, ...]], Floats]


@dataclass(frozen=True)
class CodecResult:
    """Size, speed and errors of a codec on a store; returned by `compare`.

    ::

        result = codecs.compare(store)[0]
        result.codec, result.mean, result.worst

    Attributes
    ----------
    size, write, read : float
        Bytes, seconds to encode and write, and seconds to read and decode into float32, each divided by that of the
        stored dtype without compression in the same rounds.
    losses : tuple of Loss
        Errors by site and layer.
    """

    codec: str
    size: float
    write: float
    read: float
    losses: tuple[Loss, ...]

    @property
    def mean(self) -> float:
        """The mean relative error over all rows sampled."""
        return float(np.mean([loss.mean for loss in self.losses]))

    @property
    def others(self) -> float:
        """The mean relative error without the largest values of each row."""
        return float(np.mean([loss.others for loss in self.losses]))

    @property
    def worst(self) -> Loss:
        """The layer with the largest mean error."""
        return max(self.losses, key=lambda loss: loss.mean)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        return asdict(self)


def codecs(stored: np.dtype) -> list[Codec]:
    """Return the codecs to compare for rows of a dtype; the first one stores them as they are.

    >>> [codec.name for codec in codecs(np.dtype(np.float16))]
    ['float16', 'float16 + zstd', 'bfloat16', 'int8', 'int8 + zstd']
    """
    plain = [_cast(stored)]
    others = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
    narrower = [_cast(dtype) for dtype in others if dtype.itemsize <= stored.itemsize and dtype != stored]
    coarse = _int8()
    return [*plain, _packed(plain[0]), *narrower, coarse, _packed(coarse)]


@accept_store_path
def compare(
    store: Store,
    sites: Sequence[str] | None = None,
    layers: Any = "all",
    *,
    sample_bytes: int = SAMPLE_BYTES,
    rounds: int = ROUNDS,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool = True,
) -> list[CodecResult]:
    """Encode, write, read and decode sampled rows of every layer with every codec, in turn.

    ::

        for result in codecs.compare(store, ["resid_post"]):
            print(result.codec, result.size, result.mean)

    Parameters
    ----------
    sites, layers
        See `flexcache.store.read.selection.select`.
    sample_bytes
        Bytes of stored rows to sample from each layer: consecutive rows of a random committed unit.
    rounds
        Number of rounds, each of all codecs one after another; times are medians over rounds.
    folder
        Folder for temporary files; the temporary folder of the system by default.

    Returns
    -------
    list of CodecResult, the stored dtype first

    Raises
    ------
    UncommittedError
        No unit is committed.
    AnalysisError
        All values are stored as int8 already.
    SiteError
        See `flexcache.store.read.selection.select`.
    """
    keys = stored_keys(store, sites, layers, coarse=False)
    if not keys:
        raise AnalysisError(
            "all values are stored as int8 already",
            where=str(store.path),
            remedy="codecs.estimate_losses(store) estimates their error; compare codecs on a store of another dtype",
        )
    results: dict[str, dict[str, Any]] = {}
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(dir=folder) as place, bar(progress) as bars:
        for name, layer in bars.track(keys, description="encoding (layers)"):
            raw = store.read(name, layer, sample_rows(store, name, sample_bytes, random), raw=True)
            _try(codecs(store.reader(name).dtype), raw, (name, layer), Path(place) / "result", rounds, results)
    base = next(iter(results.values()))
    return [
        CodecResult(
            codec,
            sum(found["bytes"]) / sum(base["bytes"]),
            sum(found["write"]) / sum(base["write"]),
            sum(found["read"]) / sum(base["read"]),
            tuple(found["losses"]),
        )
        for codec, found in results.items()
        if len(found["losses"]) == len(base["losses"])
    ]


def _try(
    tried: Sequence[Codec],
    raw: NDArray[Any],
    key: tuple[str, int | None],
    path: Path,
    rounds: int,
    results: dict[str, dict[str, Any]],
) -> None:
    exact = raw.astype(np.float32)
    times: dict[str, list[tuple[float, float]]] = {codec.name: [] for codec in tried}
    for number in range(rounds + 1):
        for codec in tried:
            chunks, wrote, read, back = _round(codec, raw, exact, path)
            if number:  # the first round touches fresh memory
                times[codec.name].append((wrote, read))
                continue
            found = results.setdefault(codec.name, {"bytes": [], "write": [], "read": [], "losses": []})
            found["bytes"].append(sum(len(chunk) for chunk in chunks))
            found["losses"].append(measure_loss(*key, exact, back))
    for name, pairs in times.items():
        results[name]["write"].append(median(wrote for wrote, _ in pairs))
        results[name]["read"].append(median(read for _, read in pairs))


def _round(codec: Codec, raw: NDArray[Any], exact: Floats, path: Path) -> tuple[EncodedChunks, float, float, Floats]:
    began = time.perf_counter()
    chunks = codec.encode(raw, exact)
    with path.open("wb", buffering=0) as file:
        for chunk in chunks:
            file.write(chunk.data)
    wrote = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        content = np.frombuffer(file.read(), np.uint8)
    cuts = np.cumsum([len(chunk) for chunk in chunks])[:-1]
    back = codec.decode(np.split(content, cuts), raw.shape)
    return chunks, wrote - began, time.perf_counter() - wrote, back


def _cast(dtype: np.dtype) -> Codec:
    def encode(raw: NDArray[Any], exact: Floats) -> EncodedChunks:
        with np.errstate(over="ignore"):
            rows = raw if raw.dtype == dtype else exact.astype(dtype)
        return [np.ascontiguousarray(rows).reshape(-1).view(np.uint8)]

    def decode(chunks: EncodedChunks, shape: tuple[int, ...]) -> Floats:
        return np.asarray(chunks[0].view(dtype).reshape(shape).astype(np.float32))

    return Codec(dtype.name, encode, decode)


def _int8() -> Codec:
    def encode(raw: NDArray[Any], exact: Floats) -> EncodedChunks:
        return [part.reshape(-1).view(np.uint8) for part in quantize(exact, default_outliers(exact.shape[1]))]

    def decode(chunks: EncodedChunks, shape: tuple[int, ...]) -> Floats:
        scales = np.frombuffer(chunks[1].tobytes(), np.float32).reshape(shape[0], -1)
        return dequantize(chunks[0].view(np.int8).reshape(shape).astype(np.float32), scales)

    return Codec("int8", encode, decode)


def _packed(codec: Codec) -> Codec:
    """Return a codec followed by Zstandard, in chunks of the size of an inner chunk."""
    zstd = Zstd(level=ZSTD_LEVEL)

    def encode(raw: NDArray[Any], exact: Floats) -> EncodedChunks:
        packed: EncodedChunks = []
        for chunk in codec.encode(raw, exact):
            chunks = [chunk[at : at + INNER_CHUNK_BYTES] for at in range(0, len(chunk), INNER_CHUNK_BYTES)]
            packed += [np.frombuffer(zstd.encode(chunk), np.uint8) for chunk in chunks]
        return packed

    def decode(chunks: EncodedChunks, shape: tuple[int, ...]) -> Floats:
        whole = np.concatenate([np.frombuffer(zstd.decode(chunk.tobytes()), np.uint8) for chunk in chunks])
        size = int(np.prod(shape))
        return codec.decode([whole] if codec.name != "int8" else [whole[:size], whole[size:]], shape)

    return Codec(f"{codec.name} + zstd", encode, decode)
