"""Stores filled by a forward pass of the caller: vLLM, nnsight, TransformerLens, JAX, or numpy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from flexcache.array_spec import ArraySpec
from flexcache.documents import open_documents
from flexcache.errors import ConfigError
from flexcache.identity.tokenizer import describe_tokenizer
from flexcache.recording.fields import RecordFields, split_fields
from flexcache.recording.planning.extension_request import more_arrays, more_documents, opened
from flexcache.recording.planning.planning import PlanInputs
from flexcache.recording.planning.store_identity import check_same, stored_identity
from flexcache.recording.planning.store_plan import plan_store
from flexcache.recording.run.existing_rows import ExistingRows
from flexcache.recording.run.fingerprint import check_fingerprint
from flexcache.recording.run.recorder import Recorder
from flexcache.recording.run_options import RunOptions
from flexcache.site import STANDARD, Layers, Site, plain_layers, resolve_layers
from flexcache.spec import CaptureSpec
from flexcache.store.format.int8 import with_scales
from flexcache.store.format.schema import read_attributes
from flexcache.store.manage.derive import merge_arrays
from flexcache.store.storage.location import StoreLocation, local, parse_location
from flexcache.store.write.create import check_target


def record(
    path: str | StoreLocation,
    documents: Any,
    spec: CaptureSpec | None = None,
    *,
    sites: Mapping[str, tuple[int, int] | int],
    model: str | dict[str, Any],
    tokenizer: Any = None,
    fingerprint: dict[str, Any] | None = None,
    extend: bool = False,
    new_only: bool = False,
    options: RunOptions | None = None,
    **fields: Unpack[RecordFields],
) -> Recorder:
    """Plan a store, or open one that was begun, and return its recorder; the forward pass is yours.

        with flexcache.record("run.zarr", docs, sites={"resid_post": (12, 768)}, model="gpt2 in vLLM") as recorder:
            for batch in recorder.batches():
                for layer, values in my_forward(batch.tokens):
                    recorder.put("resid_post", layer=layer, rows=batch.rows, values=values)

    Parameters
    ----------
    spec, options
        As for `flexcache.capture`; their fields can also be given one by one, as *fields*.
    sites
        ``(depth, features)`` of a site that exists once per layer, or ``features`` of one that exists once. The field
        *layers* says which layers of the former will be put.
    model
        The name of what computes the activations; a dict may say more. Compared when the store is opened again.
    tokenizer
        As for `flexcache.capture`, or a plain callable from texts to lists of token ids.
    fingerprint
        What the bits of the forward pass depend on, such as versions and device.
    extend, new_only
        Add to an existing store the sites and layers, or the documents, that it lacks; see `flexcache.extend`. The
        recorder yields the batches of the new rows only. They become part of the store when all are there and the
        recorder is closed.

    Raises
    ------
    ConfigError, DocumentsError, PlanError, MismatchError, CaptureError
        As for `flexcache.capture`.
    """
    where = "flexcache.record"
    path = parse_location(path)
    check_target(path)
    spec, content, options = split_fields(fields, RecordFields, spec, options, where)
    if spec.keep is not None:
        raise ConfigError(
            "a forward of your own cannot recompute virtual layers",
            where="keep",
            remedy="leave it out: all layers that are put are on disk; flexcache.capture has virtual layers",
        )
    if not isinstance(fingerprint, dict | None):
        raise ConfigError("the fingerprint cannot be used", where=where, expected="a dict", found=repr(fingerprint))
    _check_shapes(sites)
    layers = plain_layers(content.pop("layers", "all"))
    if not isinstance(model, str | dict):
        raise ConfigError("the model needs a name", expected="a name, or a dict that says more", found=repr(model))
    default = {} if "dtype" in spec.model_fields_set else {"dtype": "bfloat16"}
    spec = spec.with_fields(default | content, where)
    if spec.generate is not None:
        raise ConfigError(
            "a forward of your own generates nothing", where="generate", remedy="give documents with completions"
        )
    own = {"sites": dict.fromkeys(sites, layers), "transforms": {}, "objective": None, "decoder": None}
    spec = spec.model_copy(update=own)
    spec.check()
    if spec.dtype == "auto":
        raise ConfigError("dtype auto needs a model", remedy="name the dtype: bfloat16, float16 or float32")
    corpus = open_documents(documents)
    inputs = PlanInputs(
        documents=corpus,
        tokenizer=tokenizer,
        arrays=with_scales(_array(name, shape, layers, spec.dtype) for name, shape in sites.items()),
        spec=spec,
        model=model if isinstance(model, dict) else {"name": model, "class": model},
        tokenizer_identity=describe_tokenizer(tokenizer, corpus.content == "messages", spec.chat),
    ).match_store(path)
    settings: dict[str, Any] = {
        "fingerprint": fingerprint,
        "buffer_bytes": options.buffer_bytes,
        "allow_mixed": options.allow_mixed,
        "batch_tokens": spec.batch_tokens,
        "heartbeat_timeout": options.heartbeat_timeout,
    }
    if extend and (path / "zarr.json").exists():
        return _extension(local(path, "extending"), inputs, new_only, settings)
    plan_store(path, inputs)
    check_same(stored_identity(read_attributes(path)), inputs.identity(), path)
    return Recorder(path, **settings)


def _extension(path: Path, inputs: PlanInputs, new_only: bool, settings: dict[str, Any]) -> Recorder:
    store = opened(path)
    stored, given = stored_identity(read_attributes(path)), inputs.identity()
    sites = bool(merge_arrays(store.arrays, inputs.arrays)[1])
    for said in (stored, given):
        said["documents"] = said["documents"] if sites else {}
        said["arrays"] = {} if sites else said["arrays"]
        free = "sites" if sites else "max_tokens"
        said["spec"] = {name: value for name, value in said["spec"].items() if name != free}
    check_same(stored, given, path)
    check_fingerprint(store, settings["fingerprint"] or {}, settings["allow_mixed"])
    if sites:
        found = more_arrays(path, inputs.arrays, inputs.spec)
    else:
        most = inputs.spec.max_tokens
        found = more_documents(path, inputs.documents, inputs.tokenizer, new_only=new_only, max_tokens=most)
    if found is None:
        return Recorder(path, **settings)
    transaction = found.transaction
    settings |= {"on_start": transaction.check_open, "on_complete": transaction.commit}
    return Recorder(
        transaction.folder, **settings, keys=found.keys, existing=found.carried or ExistingRows(store, stop=0)
    )


def _check_shapes(sites: Any) -> None:
    """Raise ConfigError if *sites* is not a mapping from sites to their shapes."""
    right = isinstance(sites, Mapping) and bool(sites)
    for shape in sites.values() if right else ():
        numbers = shape if isinstance(shape, tuple | list) else (shape,)
        right = right and 1 <= len(numbers) <= 2 and all(isinstance(n, int) and n > 0 for n in numbers)
    if not right:
        raise ConfigError(
            "sites cannot be read",
            expected="a mapping from site to (depth, features), or to features, such as {'resid_post': (12, 768)}",
            found=repr(sites),
        )


def _array(name: str, shape: tuple[int, int] | int, layers: Layers, dtype: str) -> ArraySpec:
    if isinstance(shape, int):
        if name in STANDARD:
            raise ConfigError(f"site {name} exists once per layer", expected="(depth, features)", found=str(shape))
        return ArraySpec(name, name, None, None, shape, f"feature_{name}", dtype)
    depth, features = shape
    dim = Site.parse(name).feature_dim if name in STANDARD else "hidden"
    return ArraySpec(name, name, resolve_layers(layers, depth), depth, features, dim, dtype)
