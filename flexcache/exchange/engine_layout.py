"""Read the layers and the engine of samples from options, and from files next to the samples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any, TypedDict

from flexcache.errors import ConfigError, DamagedError
from flexcache.exchange.engine_samples import ENGINE_FORMATS, SampleFile, has_final
from flexcache.site import STANDARD
from flexcache.store.read.selection import ArrayKey

SETTINGS = ("engine.json", "data_config.json", "config.json")
"""Files that are read if they lie beside the samples: our own, that of speculators before 0.5, a model's."""
LAYER_IDS = (
    *("layer_ids", "eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids"),
    *("aux_hidden_states_layers", "target_layer_ids"),
)
FINAL_STATES = ("normed", "raw")


class EngineOptions(TypedDict, total=False):
    """Keywords of `flexcache.import_folder` for the samples of engines."""

    layer_ids: Sequence[int] | str | None
    final_state: str | None
    engine: str | Mapping[str, Any] | None


@dataclass(frozen=True)
class EngineLayout:
    """Sites and layers of the states of a sample, and the engine that computed them.

    Attributes
    ----------
    targets : list of (str, int or None)
        Site and layer of each state.
    layers : int
        Number of states of layers; the last hidden state may follow.
    depth : int or None
        Number of blocks of the model, if the states have layers.
    engine : dict
        Name, version and settings of the engine, as far as they are known.
    model : str or None
        Name of the model, if a file says it.
    """

    targets: list[ArrayKey]
    layers: int
    depth: int | None
    engine: dict[str, Any] = field(default_factory=dict)
    model: str | None = None


def read_layout(
    folder: Path, kind: str, files: Sequence[SampleFile], site: str | None, depth: int | None, options: EngineOptions
) -> EngineLayout:
    """Return the layout of the samples in a folder.

    The engine's layer ids are mapped to blocks: id i of vLLM is the input of block i, so it is ``resid_post`` of layer
    i - 1; other formats number the outputs of blocks.

    Raises
    ------
    ConfigError
        The layer ids are not known, not numbers of blocks, or given twice with other values; or it is not known what
        the last hidden state is.
    """
    said = _read_settings(folder)
    if site is not None and kind != "npy":
        raise ConfigError(f"{kind} has no use for a site", remedy="leave it out: the format says what the states are")
    final = has_final(files, kind)
    given = options.get("layer_ids")
    ids = None if given is None and site is not None and site not in STANDARD else _layer_ids(folder, given, said)
    shift = 1 if kind == "speculators" and files[0].path.suffix == ".safetensors" else 0
    name = site or "resid_post"
    targets: list[ArrayKey] = [(name, None)] if ids is None else [(name, one - shift) for one in ids]
    depth = depth if depth is not None else _number(said, "depth")
    for (_, layer), one in zip(targets, ids or [], strict=False):
        if layer is not None and (layer < 0 or (depth is not None and layer >= depth)):
            what = "the input of the first block, not the output of a block" if one == 0 else "not that of a block"
            raise ConfigError(
                f"layer id {one} is {what}",
                where=kind,
                expected=f"ids from {shift}" + (f" to {depth - 1 + shift}" if depth is not None else ""),
                remedy="give the ids that the engine was given, and the number of layers of the model",
            )
    if final:
        targets.append(_final_target(kind, options.get("final_state") or _said_final(said), depth))
    elif options.get("final_state"):
        raise ConfigError("the samples have no last hidden state apart from the layers", remedy="leave final_state out")
    if len(set(targets)) < len(targets):
        raise ConfigError("two states are of one layer", found=str([layer for _, layer in targets]))
    numbers = [layer for _, layer in targets if layer is not None]
    return EngineLayout(
        targets=targets,
        layers=len(targets) - final,
        depth=(depth or max(numbers) + 1) if numbers else None,
        engine=_engine(kind, options.get("engine"), said),
        model=_first_text(said, "model", "target_model_path"),
    )


def _final_target(kind: str, state: str | None, depth: int | None) -> ArrayKey:
    """Return the site of the last hidden state: after the last norm, or the output of the last block."""
    if state is None and kind == "specforge":
        state = "normed"  # SGLang gives what the head reads
    if state not in FINAL_STATES:
        raise ConfigError(
            "it is not known what the last hidden state is" if state is None else f"there is no final state {state!r}",
            where=kind,
            expected="normed, the states after the last norm (final_norm), as SGLang and transformers give them; or"
            " raw, the output of the last block (resid_post), as vLLM gives it",
            remedy="give --final-state normed or raw (final_state=…)",
        )
    if state == "normed":
        return "final_norm", None
    if depth is None:
        raise ConfigError(
            "the last hidden state is the output of the last block, whose number is not known",
            remedy="give the number of layers of the model (--depth, depth=…)",
        )
    return "resid_post", depth - 1


def _layer_ids(folder: Path, given: Any, said: Mapping[str, Any]) -> list[int]:
    found = [value for key, value in _walk(said) if key in LAYER_IDS and _is_ids(value)]
    known = [ids for number, ids in enumerate(found) if ids not in found[:number]]
    if given is not None:
        try:
            ids = [int(one) if isinstance(given, str) else index(one) for one in _parts(given)]
        except (TypeError, ValueError):
            ids = []
        if not ids:
            raise ConfigError("the layer ids cannot be read", expected="whole numbers", found=repr(given)[:80])
        if known and ids not in known:
            raise ConfigError(
                "the layer ids are not those in the files beside the samples",
                where=str(folder),
                expected=" or ".join(map(str, known)),
                found=str(ids),
                remedy="leave them out, or correct the file",
            )
        return ids
    if len(known) != 1:
        raise ConfigError(
            "it is not known which layers the states are of",
            where=str(folder),
            found=" and ".join(map(str, known)) or f"no layer ids in {', '.join(SETTINGS)}",
            remedy="give the layer ids of the engine in the order of the states: --layer-ids 2,18,33,36"
            " (layer_ids=[2, 18, 33, 36])",
        )
    return [int(one) for one in known[0]]


def _parts(given: Any) -> Sequence[Any]:
    return given.split(",") if isinstance(given, str) else list(given)


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    )


def _engine(kind: str, given: str | Mapping[str, Any] | None, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return name, version and settings of the engine; what is given comes before what files say."""
    engine: dict[str, Any] = {}
    if (name := ENGINE_FORMATS[kind].engine) is not None:
        engine["name"] = name
    versions = next((value for key, value in _walk(said) if key == "package_versions"), None)
    if isinstance(versions, Mapping) and engine.get("name") in versions:
        engine["version"] = str(versions[engine["name"]])
    own = said.get("engine.json", {}).get("engine")
    for one in (own, given):
        if isinstance(one, str):
            name, _, version = one.partition("==")
            engine = {"name": name.strip(), **({"version": version.strip()} if version else {})}
        elif isinstance(one, Mapping):
            engine |= one
        elif one is not None:
            raise ConfigError("the engine cannot be read", expected="a name, name==version, or a dict", found=repr(one))
    try:
        return dict(json.loads(json.dumps(engine)))
    except (TypeError, ValueError) as error:
        raise ConfigError("the engine cannot be written as JSON", found=str(error)) from error


def _said_final(said: Mapping[str, Any]) -> str | None:
    """Return the last hidden state that files say: our own key, or that of TorchSpec's configuration."""
    for key, value in _walk(said):
        if key == "final_state" and isinstance(value, str):
            return value
        if key == "last_hidden_states_prenorm" and isinstance(value, bool):
            return "raw" if value else "normed"
    return None


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the contents of the files in `SETTINGS` that lie in the folder."""
    found = {}
    for name in SETTINGS:
        path = folder / name
        if path.is_file():
            try:
                content = json.loads(path.read_bytes())
            except (OSError, ValueError, RecursionError) as error:
                raise DamagedError(
                    "a file beside the samples cannot be read",
                    where=str(path),
                    expected="JSON",
                    found=str(error),
                    remedy="correct it, or move it away",
                ) from error
            found[name] = content if isinstance(content, dict) else {}
    return found


def _walk(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield all keys of nested dicts with their values."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield key, value
            yield from _walk(value)


def _number(said: Mapping[str, Any], key: str) -> int | None:
    value = said.get("engine.json", {}).get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _first_text(said: Mapping[str, Any], *keys: str) -> str | None:
    return next((value for key, value in _walk(said) if key in keys and isinstance(value, str)), None)
