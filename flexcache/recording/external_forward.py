"""Stores filled by a forward of your own: vLLM, nnsight, TransformerLens, JAX, or numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexcache.documents import open_documents
from flexcache.errors import ConfigError
from flexcache.model import describe_tokenizer
from flexcache.options import Choice, Packing, Windows, parse_rows
from flexcache.recording.planning.extension_request import more_arrays, more_documents, opened
from flexcache.recording.planning.planning import Source, check_same, plan_store, stored_identity
from flexcache.recording.run.fingerprint import check_fingerprint
from flexcache.recording.run.recorder import DEFAULT_BUFFER, Recorder
from flexcache.site import STANDARD, Layers, Site, plain_layers, resolve_layers
from flexcache.spec import ArraySpec, Spec, check_running, listed, validate
from flexcache.store.format.int8 import with_scales
from flexcache.store.format.schema import read_attributes
from flexcache.store.manage.staging import merge_arrays
from flexcache.store.storage.location import StoreLocation, local, parse_location
from flexcache.store.write.create import check_target
from flexcache.store.write.worker import HEARTBEAT_TIMEOUT


def record(
    path: str | StoreLocation,
    documents: Any,
    *,
    sites: Mapping[str, tuple[int, int] | int],
    model: str | dict[str, Any],
    tokenizer: Any = None,
    layers: Layers = "all",
    rows: str | Mapping[str, Any] | Choice = "all",
    dtype: Any = "bfloat16",
    max_length: int | None = None,
    max_tokens: int | None = None,
    windows: Windows | Mapping[str, Any] | None = None,
    packing: Packing | Mapping[str, Any] | None = None,
    token_labels: Sequence[str] = (),
    batch_tokens: int = 4096,
    seed: int = 0,
    compression: str = "none",
    keep_text: bool = True,
    empty_documents: str = "error",
    fingerprint: dict[str, Any] | None = None,
    buffer_bytes: int = DEFAULT_BUFFER,
    allow_mixed: bool = False,
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
    extend: bool = False,
    new_only: bool = False,
) -> Recorder:
    """Plan a store, or go on with one, and return its recorder; the forward is yours.

        with flexcache.record("run.zarr", docs, sites={"resid_post": (12, 768)}, model="gpt2 in vLLM") as recorder:
            for batch in recorder.batches():
                for layer, values in my_forward(batch.tokens):
                    recorder.put("resid_post", layer=layer, rows=batch.rows, values=values)

    Parameters
    ----------
    sites
        ``(depth, features)`` of a site that exists once per layer, or ``features`` of one that exists once.
    model
        What the activations come from; a dict may say more than a name. Compared when the store is gone on with.
    tokenizer
        As for `flexcache.capture`; a plain callable from texts to token lists will do.
    layers
        Which layers of the stacked sites will be put.
    fingerprint
        What the bits of the forward depend on, such as versions and device.

    extend, new_only
        Add what a store that is there lacks of it: sites and layers, or documents, see `flexcache.extend`. The recorder
        yields the batches of what is new, and takes its rows alone; once all are there, and the recorder is closed,
        they are part of the store.

    Other parameters, and errors, are those of `flexcache.capture`.
    """
    path = parse_location(path)
    check_target(path)
    running = check_running(buffer_bytes, heartbeat_timeout, fingerprint, "record")
    _check_shapes(sites)
    layers = plain_layers(layers)
    if not isinstance(model, str | dict):
        raise ConfigError("the model is to be named", expected="a name, or a dict that says more", found=repr(model))
    spec = validate(
        Spec,
        {
            "sites": dict.fromkeys(sites, layers),
            **parse_rows(rows),
            "dtype": dtype,
            "max_length": max_length,
            "max_tokens": max_tokens,
            "windows": windows,
            "packing": packing,
            "token_labels": listed(token_labels, str, "token_labels"),
            "batch_tokens": batch_tokens,
            "seed": seed,
            "compression": compression,
            "keep_text": keep_text,
            "empty_documents": empty_documents,
        },
        "record",
    )
    spec.check()
    if spec.dtype == "auto":
        raise ConfigError("dtype auto needs a model", remedy="name the dtype: bfloat16, float16 or float32")
    corpus = open_documents(documents)
    source = Source(
        documents=corpus,
        tokenizer=tokenizer,
        arrays=with_scales(_array(name, shape, layers, spec.dtype) for name, shape in sites.items()),
        spec=spec,
        model=model if isinstance(model, dict) else {"name": model, "class": model},
        tokenizer_identity=describe_tokenizer(tokenizer, corpus.content == "messages"),
    )
    options: dict[str, Any] = {
        "fingerprint": fingerprint,
        "buffer_bytes": running.buffer_bytes,
        "allow_mixed": allow_mixed,
        "batch_tokens": spec.batch_tokens,
        "heartbeat_timeout": running.heartbeat_timeout,
    }
    if extend and (path / "zarr.json").exists():
        return _extension(local(path, "extending"), source, new_only, options)
    plan_store(path, source)
    check_same(stored_identity(read_attributes(path)), source.identity(), path)
    return Recorder(path, **options)


def _extension(path: Path, source: Source, new_only: bool, options: dict[str, Any]) -> Recorder:
    store = opened(path)
    stored, given = stored_identity(read_attributes(path)), source.identity()
    sites = bool(merge_arrays(store, source.arrays)[1])
    for said in (stored, given):
        said["documents"] = said["documents"] if sites else {}
        said["arrays"] = {} if sites else said["arrays"]
        free = "sites" if sites else "max_tokens"
        said["spec"] = {name: value for name, value in said["spec"].items() if name != free}
    check_same(stored, given, path)
    check_fingerprint(store, options["fingerprint"] or {}, options["allow_mixed"])
    if sites:
        found = more_arrays(path, source.arrays, source.spec)
    else:
        most = source.spec.max_tokens
        found = more_documents(path, source.documents, source.tokenizer, new_only=new_only, max_tokens=most)
    if found is None:
        return Recorder(path, **options)
    transaction = found.transaction
    options |= {"on_start": transaction.check_open, "on_complete": transaction.commit}
    return Recorder(transaction.folder, **options, keys=found.keys, existing=found.carried)


def _check_shapes(sites: Any) -> None:
    """Raise ConfigError if the sites are no mapping to their shapes."""
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
