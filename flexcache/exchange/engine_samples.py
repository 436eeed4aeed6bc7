"""Samples that inference engines write: a file for each prompt, with its token ids and the hidden states of layers.

Formats, each in its public source:

- speculators and vLLM (https://docs.vllm.ai/en/latest/features/speculative_decoding/extract_hidden_states/,
  https://github.com/vllm-project/speculators): safetensors with ``hidden_states`` (tokens, layers, features) and
  ``token_ids``; before version 0.5 of speculators ``data_N.pt`` with a list of (tokens, features), ``input_ids`` and
  ``loss_mask``
- SpecForge (https://github.com/sgl-project/SpecForge, scripts/prepare_hidden_states.py): ``data_N.ckpt`` or
  ``.ckpt.gz`` with ``input_ids``, ``loss_mask``, ``aux_hidden_state`` (1, tokens, layers · features) and
  ``hidden_state`` (1, tokens, features); for DFlash and DSpark ``hidden_states`` and ``target_last_hidden_states``
- TorchSpec (https://github.com/lightseekorg/TorchSpec, torchspec/data/preprocessing.py): ``.ckpt`` with
  ``aux_hidden_states`` and ``hidden_states`` of these shapes
- npy: ``NAME.npy`` (tokens, layers, features), with ``NAME.tokens.npy`` and perhaps ``NAME.loss_mask.npy``
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexcache.errors import ConfigError, DamagedError
from flexcache.exchange.file_tensors import find_files, list_tensors

LARGEST_TOKEN = 2**31 - 1
NPY_PARTS = (".tokens.npy", ".loss_mask.npy")


@dataclass(frozen=True)
class SampleFormat:
    """Endings of the files, and names of the tensors in them.

    Attributes
    ----------
    endings : tuple of str
    states : tuple of str
        Names for the states of layers; the first that a file has.
    final : tuple of str
        Names for the last hidden state, which the head reads.
    leading : bool
        True if states have a leading dim of one.
    engine : str or None
        The engine that writes the files.
    tokens, mask : tuple of str
        Names for the token ids and the loss mask.
    """

    endings: tuple[str, ...]
    states: tuple[str, ...] = ("hidden_states",)
    final: tuple[str, ...] = ()
    leading: bool = False
    engine: str | None = None
    tokens: tuple[str, ...] = ("token_ids", "input_ids")
    mask: tuple[str, ...] = ("loss_mask",)


ENGINE_FORMATS = {
    "speculators": SampleFormat((".safetensors", ".pt"), engine="vllm"),
    "specforge": SampleFormat(
        (".ckpt", ".ckpt.gz"),
        ("aux_hidden_state", "hidden_states"),
        ("hidden_state", "target_last_hidden_states"),
        leading=True,
        engine="sglang",
    ),
    "torchspec": SampleFormat((".ckpt",), ("aux_hidden_states",), ("hidden_states",), leading=True),
    "npy": SampleFormat((".npy",), (".npy",), tokens=NPY_PARTS[:1], mask=NPY_PARTS[1:]),
}


class SampleProblem(Exception):  # noqa: N818 - the reason for which a sample cannot be imported, collected with others
    """A sample that cannot be imported."""


@dataclass(frozen=True)
class Sample:
    """The token ids of a prompt, its loss mask, and its states, shape (tokens, features) each."""

    tokens: np.ndarray
    mask: np.ndarray | None
    states: list[np.ndarray]

    @property
    def shape(self) -> tuple[tuple[int, str], ...]:
        """The features and dtype of each state, which are the same in all samples of a folder."""
        return tuple((state.shape[1], state.dtype.name) for state in self.states)


@dataclass(frozen=True)
class SampleFile:
    """A file with one sample: its path, and its path in the folder without the ending, which is the document's id."""

    path: Path
    id: str

    @property
    def number(self) -> int | None:
        """The number in a name such as ``hs_7`` or ``data_7``, the line of the prompt in the engine's dataset."""
        match = re.fullmatch(r"(?:hs|data)_(\d+)", self.id.rpartition("/")[2])
        return int(match[1]) if match else None


def find_samples(folder: Path, kind: str) -> list[SampleFile]:
    """Return the samples of a folder in natural order.

    Raises
    ------
    StoreError
        The folder does not exist, or has no file of this kind.
    ConfigError
        The folder has samples of two versions of speculators.
    DamagedError
        Token ids lie there without states.
    """
    paths = find_files(folder, kind, ENGINE_FORMATS[kind].endings)
    if kind == "speculators":
        paths = [path for path in paths if path.suffix != ".pt" or path.name.startswith("data_")]
        if len({path.suffix for path in paths}) > 1:
            raise ConfigError(
                "the folder has samples of two versions of speculators, whose layer ids differ",
                where=str(folder),
                expected="files .safetensors, or files data_N.pt",
                remedy="import them from two folders",
            )
    if kind == "npy":
        parts = {path for path in paths if path.name.endswith(NPY_PARTS)}
        paths = [path for path in paths if path not in parts]
        alone = {_stem(path, NPY_PARTS) for path in parts} - {_stem(path, (".npy",)) for path in paths}
        if alone:
            raise DamagedError(
                "token ids have no states",
                where=str(folder),
                found=", ".join(sorted(alone)[:8]),
                expected="NAME.npy for each NAME.tokens.npy",
                remedy="fetch the files, or leave the ids out",
            )
    endings = ENGINE_FORMATS[kind].endings
    return [SampleFile(path, _stem(path.relative_to(folder), endings)) for path in paths]


def has_final(files: Sequence[SampleFile], kind: str) -> bool:
    """Return True if one of the first samples that can be read has the last hidden state."""
    if not ENGINE_FORMATS[kind].final:
        return False
    for file in files[:8]:
        with suppress(DamagedError):
            if _final_name(_arrays(file, kind), ENGINE_FORMATS[kind]) is not None:
                return True
    return False


def _final_name(arrays: dict[str, np.ndarray], form: SampleFormat) -> str | None:
    return next((name for name in form.final if name in arrays), None)


def read_sample(file: SampleFile, kind: str, layers: int, final: bool) -> Sample:
    """Read the sample of a file, whose arrays are mapped into memory where the format allows it.

    *layers* is the number of states of layers; with *final* the last hidden state follows them.

    Raises
    ------
    SampleProblem
        A tensor is missing, or its shape or dtype does not fit.
    DamagedError
        The file cannot be read.
    """
    form, arrays = ENGINE_FORMATS[kind], _arrays(file, kind)
    tokens = _line(_first(arrays, form.tokens, "token ids"), "token ids")
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) <= LARGEST_TOKEN:
        raise SampleProblem(f"token ids from {tokens.min()} to {tokens.max()}")
    states = _layer_states(arrays, form, layers)
    if final:
        states.append(_squeezed(_first(arrays, form.final, "last hidden state"), form))
    elif _final_name(arrays, form) is not None:
        raise SampleProblem("a last hidden state, which the first samples lack")
    if any(not (state.dtype.kind == "f" or state.dtype.name == "bfloat16") for state in states):
        raise SampleProblem(f"states of {states[0].dtype}; expected floating-point numbers")
    mask = next((_line(arrays[name], "loss mask") for name in form.mask if name in arrays), None)
    for array, what in [*((state, "states") for state in states), *([] if mask is None else [(mask, "mask values")])]:
        if len(array) != len(tokens):
            raise SampleProblem(f"{len(tokens)} token ids, but {len(array)} {what}")
    if not len(tokens):
        raise SampleProblem("no tokens")
    if mask is not None and not np.isin(mask, (0, 1)).all():
        raise SampleProblem("a loss mask with other values than 0 and 1")
    return Sample(tokens.astype(np.int32), None if mask is None else mask.astype(np.int8), states)


def _arrays(file: SampleFile, kind: str) -> dict[str, np.ndarray]:
    if kind != "npy":
        return {tensor.name: tensor.open() for tensor in list_tensors(file.path, file.path.name)}
    paths = {ending: file.path.with_name(file.path.stem + ending) for ending in (".npy", *NPY_PARTS)}
    return {
        name: list_tensors(path, path.name)[0].open()
        for name, path in paths.items()
        if path.exists() or path.is_symlink()
    }


def _first(arrays: dict[str, np.ndarray], names: Sequence[str], what: str) -> np.ndarray:
    for name in names:
        if name in arrays:
            return arrays[name]
    found = ", ".join(arrays)[:120] or "no tensor"
    raise SampleProblem(f"no {what} ({' or '.join(names)}) of a dtype that can be read; found: {found}")


def _line(array: np.ndarray, what: str) -> np.ndarray:
    """Return whole numbers of shape (tokens,) or (1, tokens) as the former."""
    if array.ndim == 2 and len(array) == 1:
        array = array[0]
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise SampleProblem(f"{what} of shape {array.shape} and {array.dtype}; expected whole numbers, one a token")
    return array


def _squeezed(array: np.ndarray, form: SampleFormat) -> np.ndarray:
    if form.leading and array.ndim == 3 and len(array) == 1:
        array = array[0]
    if array.ndim != 2:
        raise SampleProblem(f"states of shape {array.shape}; expected (tokens, features)")
    return array


def _layer_states(arrays: dict[str, np.ndarray], form: SampleFormat, layers: int) -> list[np.ndarray]:
    listed = [f"{name}.0" for name in form.states]
    array = _first(arrays, (*form.states, *listed), "hidden states")
    several = next((name for name in listed if name in arrays), None)
    if several is not None and array is arrays[several]:
        prefix = several.rpartition(".")[0]
        names = [f"{prefix}.{number}" for number in range(len(arrays)) if f"{prefix}.{number}" in arrays]
        found = [_squeezed(arrays[name], form) for name in names]
    elif array.ndim == 3 and not form.leading:
        found = list(array.swapaxes(0, 1))
    else:
        array = _squeezed(array, form)
        if not layers or array.shape[1] % layers:
            raise SampleProblem(f"states with {array.shape[1]} features, which are not those of {layers} layers")
        width = array.shape[1] // layers
        found = [array[:, start * width : (start + 1) * width] for start in range(layers)]
    if len(found) != layers:
        raise SampleProblem(f"states of {len(found)} layers; expected {layers}, one for each layer id")
    return found


def _stem(path: Path, endings: Sequence[str]) -> str:
    name = path.as_posix()
    ending = max((ending for ending in endings if name.endswith(ending)), key=len)
    return name.removesuffix(ending)
