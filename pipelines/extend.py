"""flexcache extend: more documents, layers or sites, as a configuration says, in a store that is there."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from flexcache.errors import ConfigError, MismatchError
from flexcache.parallel.launch import launch
from flexcache.spec import Spec
from flexcache.store.manage.extension_transaction import ExtensionTransaction
from flexcache.store.read.store import Store
from pipelines.capture import leave, load
from pipelines.config import CaptureConfig

FIXED = (
    *("rows", "choice", "dtype", "max_length", "windows", "packing", "token_labels", "seed", "compression"),
    *("keep_text", "empty_documents"),
)


def run(
    config: CaptureConfig,
    *,
    new_only: bool = False,
    allow_mixed: bool = False,
    allow_changed_model: bool = False,
    progress: bool = True,
) -> Store:
    """Add what the configuration names and the store lacks, or go on with that."""
    import flexcache

    if config.generate is not None:
        raise ConfigError(
            "a store is not extended by completions yet to be made",
            where="generate",
            remedy="make them by flexcache.generate, or by a capture of their own, and give their files as documents",
        )
    _check_fixed(Store(config.store), config)
    progress = progress and launch().rank == 0
    loaded = load(config, progress)
    options = config.capture_options()
    named = config.sites is not None or config.transforms or config.layers != "all"
    store = flexcache.extend(
        loaded.model,
        loaded.tokenizer,
        loaded.documents,
        config.store,
        sites=options["sites"] if named else None,
        layers=options["layers"],
        **loaded.functions,
        new_only=new_only,
        max_tokens=config.max_tokens,
        **loaded.options,
        batch_tokens=config.batch_tokens,
        allow_mixed=allow_mixed,
        allow_changed_model=allow_changed_model,
        progress=progress,
    )
    leave()
    return store


def discard(path: Path, console: Console) -> None:
    """Drop an extension that is not finished."""
    store = Store(path)
    dropped = ExtensionTransaction(path).discard()
    console.print("the extension is dropped" if dropped else "no extension has begun")
    console.print(repr(store), highlight=False, markup=False)


def _check_fixed(store: Store, config: CaptureConfig) -> None:
    """Refuse a configuration that says other things of the rows than the store."""
    asked = config.spec().model_dump(mode="json")
    given = {*config.model_fields_set, *(["choice"] if "rows" in config.model_fields_set else [])}
    before = Spec.model_validate(store.spec).model_dump(mode="json")
    different = [
        f"{name}: {before[name]} in the store, {asked[name]} in the configuration"
        for name in FIXED
        if name in given and asked[name] != before[name]
    ]
    reads = store.spec.get("decoder") or {"inputs": config.decoder_inputs}
    if "decoder_inputs" in given and reads["inputs"] != config.decoder_inputs:
        different.append(
            f"decoder_inputs: {reads['inputs']} in the store, {config.decoder_inputs} in the configuration"
        )
    if different:
        raise MismatchError(
            "a store is extended under the options it was begun with",
            where=str(store.path),
            found="\n    ".join(["", *different]),
            remedy="leave these keys out of the configuration, or make a new store",
        )
