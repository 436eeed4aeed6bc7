"""The configuration file of replays: edits, the cells where they are made, and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, PositiveInt

from flexcache.errors import ConfigError, nearest
from flexcache.model import ModelSource
from flexcache.provenance import import_object
from flexcache.validation import Options, unknown_key, validate
from pipelines.config.sections import ObjectiveSource, model_or_name
from pipelines.config.yaml_file import read_yaml

if TYPE_CHECKING:
    from analysis.replay import Edit, Grid
    from analysis.replay.edits.held_out import FittedEdit
    from flexcache.store.read.store import Store

EDITS = {
    "identity": "Identity",
    "zero": "Zero",
    "mean": "Mean",
    "scale": "Scale",
    "clamp": "Clamp",
    "set": "SetNeurons",
    "steer": "Steer",
    "project_out": "ProjectOut",
    "noise": "Noise",
    "patch": "Patch",
    "interpolate": "Interpolate",
    "interchange": "Interchange",
    "resample": "Resample",
    "erase": "Erase",
    "function": "Function",
}
"""Names of edits in a file, and in `analysis.replay`."""


class ReceiverSource(Options):
    """The end of the path along which edits act; see `analysis.replay.Receiver`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str = Field(description="the site that receives, such as q")
    layer: int = Field(description="its layer, negative from the end")
    heads: int | list[int] | None = Field(None, description="heads of q, k, v or z that receive; all by default")
    positions: Any = Field("all", description="tokens that receive: all, last, first, a number, or by document id")


class Cells(Options):
    """The grid of edits; see `analysis.replay.grid`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str = Field("resid_post", description="the site that is edited")
    layers: Any = Field("all", description="layers that are edited, one at a time")
    positions: Any = Field(
        "last",
        description="last, first, all, each, a number, a list of these, or positions by document id",
    )
    heads: Literal["each"] | int | list[int] | None = Field(
        None, description="edit each head of q, k, v or z by itself, or each of some"
    )
    receiver: ReceiverSource | None = Field(
        None, description="path patching: the only site by way of which edits reach the output"
    )

    def grid(self) -> Grid:
        """Return the grid."""
        from analysis.replay import Receiver, grid

        receiver = None if self.receiver is None else Receiver(**self.receiver.model_dump())
        return grid(self.site, self.layers, self.positions, heads=self.heads, receiver=receiver)


def _listed(value: Any) -> Any:
    """Return one name as a list."""
    return [value] if isinstance(value, str) else value


class AttributionSource(Options):
    """Attribution from gradients, with a replay of the largest cells and of a sample."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["patching", "ig"] = Field("patching", description="attribution patching, or integrated gradients")
    steps: int | None = Field(
        None, ge=1, description="for ig: points between document and donor at which the model computes the gradient"
    )
    top: int = Field(32, ge=0, description="cells of the largest attribution that are replayed")
    sample: int = Field(32, ge=0, description="cells drawn uniformly, and first tokens, that are replayed")
    donors: Any = Field(description="donor documents, as for the edit patch: an id, a mapping, or same_length")
    layers: Any = Field("all", description="layers of the attribution")
    objective: ObjectiveSource | None = Field(
        None, description="the objective of the capture, if it was a function of your own"
    )


class LogitAttributionSource(Options):
    """Direct logit attribution of the answers; see `analysis.logit_attribution.compute`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: Literal["last", "all"] | int = Field(
        "last", description="tokens whose logits are attributed: last, all, or a position"
    )
    heads: bool | None = Field(None, description="split attention by head, from z; by default if z is stored")


class ReplayConfig(Options):
    """The configuration of a sweep of edits. Paths are relative to the folder in which the command runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: Annotated[ModelSource, BeforeValidator(model_or_name)] = Field(
        description="the model of the store: its folder or name on the hub, or a mapping that says more"
    )
    at: Cells = Field(Cells(), description="where edits are made")
    edits: list[dict[str, Any]] = Field(
        min_length=1, description="edits, each a kind with its settings, or a chain of edits"
    )
    metrics: Annotated[list[str], BeforeValidator(_listed)] = Field(
        ["kl_sum"], description="metrics of the changed output, such as kl_sum"
    )
    baselines: Annotated[list[str], BeforeValidator(_listed)] = Field(
        ["identity"], description="identity, random_direction, norm_matched: edits to compare with"
    )
    answers: Any = Field(None, description="two tokens, by id or text; or a pair for each document id")
    documents: list[str] | PositiveInt | None = Field(
        None,
        description="ids of documents, or the number from the start; all by default; those of a fit are left out",
    )
    readout: str | int | list[int] = Field(
        "all",
        description="positions where metrics are measured: all, last, or a list; NaN where a document lacks one",
    )
    copies: int = Field(
        1, ge=1, description="cells that share a forward pass; more than 1 is faster, but not bit-exact"
    )
    groups: str = Field(
        "document", description="label column of the units of the bootstrap and of held-out documents, or document"
    )
    held_out: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="share of the groups on which edits with a target are judged; they are fitted to the others; "
        "with 0, they are fitted to all documents and judged on the same",
    )
    seed: int = Field(0, ge=0, description="seed of edits, bootstrap and held-out documents")
    accept: list[str] = Field([], description="differences from the captured model that are accepted, such as weights")
    scheduler: str | None = Field(
        None, description="processes, or the address of a Dask scheduler; this process by default"
    )
    workers: int = Field(2, ge=1, description="Dask processes that load the model")
    threads: int | None = Field(
        None, ge=1, description="intra-op threads of torch on a CPU; as in the capture by default"
    )
    attribution: AttributionSource | None = Field(None, description="attribute, and replay the largest and a sample")
    logit_attribution: LogitAttributionSource | None = Field(
        None, description="split the logits of the answers, or of next tokens, by head and MLP"
    )

    @property
    def names_functions(self) -> bool:
        """True if the file names functions to import."""
        return _names_function(self.edits)


def _names_function(edits: Sequence[Mapping[str, Any]]) -> bool:
    return any("function" in edit or _names_function(edit.get("chain") or ()) for edit in edits)


def read_replay(path: Path, changes: Sequence[str] = ()) -> ReplayConfig:
    """Read a configuration file, with changes such as ``readout=last`` or ``model.dtype=float32``.

    Raises
    ------
    ConfigError
        The file or a change cannot be read, or a key or value is wrong.
    """
    return validate(ReplayConfig, read_yaml(path, changes, "model: …"), str(path))


def make_edit(store: Store, config: ReplayConfig, depth: int, given: Mapping[str, Any], where: str) -> Edit:
    """Return the edit that a file describes: ``{zero: {dims: [507]}}``, or ``{chain: [{…}, {…}]}``.

    A direction (steer, project_out, interchange) is the path of an ``.npy`` file, or ``{target: label}``: the
    difference of the means of the label's two classes, fitted for each layer. ``erase: {target: label}`` is LEACE,
    fitted for each layer. Both are fitted to documents that are not judged, see `ReplayConfig.held_out`. A donor
    (patch, interpolate, interchange) is an id, a mapping from id to id, or ``{same_length: seed, differing: label}``.

    Raises
    ------
    ConfigError
        The description cannot be read.
    """
    from analysis import replay

    if len(given) != 1:
        raise ConfigError("an edit cannot be read", where=where, expected="one kind and its settings", found=str(given))
    ((kind, settings),) = given.items()
    if kind == "chain":
        parts = [make_edit(store, config, depth, part, where) for part in settings]
        chained = parts[0]
        for part in parts[1:]:
            chained = chained >> part
        return chained
    if kind not in EDITS:
        raise ConfigError(f"there is no edit {kind!r}", where=where, remedy=nearest(kind, (*EDITS, "chain")))
    if kind == "function":
        import_object(str(settings), where)
        return replay.Function(str(settings))
    options: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in dict(settings or {}).items()}
    if "donor" in options:
        options["donor"] = donors(store, options["donor"])
    made: type[Edit] = getattr(replay, EDITS[kind])
    try:
        direction = next((name for name in ("vector", "directions") if name in options), None)
        if direction is not None:
            given_direction = options.pop(direction)
            if isinstance(given_direction, str):
                return made(**{direction: np.load(given_direction, allow_pickle=False)}, **options)
            options |= given_direction
        elif kind != "erase":
            return made(**options)
        layers = [int(layer) for layer in config.at.grid().resolve(store, depth)[0] if layer is not None]
        split: dict[str, Any] = {"held_out": config.held_out, "groups": config.groups, "seed": config.seed}
        fitted: type[FittedEdit] = getattr(replay, EDITS[kind])
        return fitted.fit_store(store, options.pop("target"), config.at.site, layers or "all", **split, **options)
    except (TypeError, KeyError, OSError, ValueError) as error:
        raise ConfigError(
            f"edit {kind} cannot be made from these settings",
            where=where,
            expected=f"settings {', '.join(field.name for field in fields(made))}",
            found=f"{error}",
        ) from error


def donors(store: Store, given: Any) -> Any:
    """Return the donors of a configuration as a setting of `analysis.replay.Patch`."""
    from analysis.replay import same_length

    if isinstance(given, Mapping) and "same_length" in given:
        keys = ("same_length", "differing")
        for name in given:
            if name not in keys:
                raise unknown_key(str(name), keys, "donor")
        seed = given["same_length"]
        if isinstance(seed, str):
            raise ConfigError(
                "same_length is the seed of the draw",
                expected="a whole number",
                found=repr(seed),
                remedy=f"write {{same_length: 0, differing: {seed}}}",
            )
        return same_length(store, seed, given.get("differing"))
    return given


def read_answers(given: Any, tokenizer: Any) -> Any:
    """Return answers as token ids; a text must be a single token."""
    if given is None:
        return None
    if isinstance(given, Mapping):
        return {str(name): read_answers(pair, tokenizer) for name, pair in given.items()}
    if not isinstance(given, list) or len(given) != 2:
        raise ConfigError("answers cannot be read", expected="two tokens, or a pair by document id", found=repr(given))
    from flexcache.recording.arguments import one_token

    return tuple(one_token(value, tokenizer) for value in given)
