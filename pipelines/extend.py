"""flexcache extend: add the documents, layers or sites that a configuration names to an existing store."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from flexcache.errors import ConfigError
from flexcache.parallel.launch import launch
from flexcache.store.manage.extension_transaction import ExtensionTransaction
from flexcache.store.read.store import Store
from pipelines.capture import leave_process_group, load
from pipelines.config import CaptureConfig


def run(
    config: CaptureConfig,
    *,
    new_only: bool = False,
    allow_mixed: bool = False,
    allow_changed_model: bool = False,
    progress: bool = True,
) -> Store:
    """Add what the configuration names and the store lacks, or resume that."""
    import flexcache
    from flexcache.recording.planning.store_identity import check_fixed

    if config.model.adapters is not None:
        raise ConfigError(
            "a store holds one variant of a model, and is extended with that",
            where="model.adapters",
            remedy="leave it out, and name the adapter of the store: model: {adapter: FOLDER}",
        )
    spec = config.spec()
    check_fixed(Store(config.store), spec)
    progress = progress and config.progress and launch().rank == 0
    loaded = load(config, progress)
    store = flexcache.extend(
        loaded.model,
        loaded.tokenizer,
        loaded.documents,
        config.store,
        spec=spec,
        **loaded.functions,
        new_only=new_only,
        batch_tokens=config.batch_tokens,
        options=config.run_options(
            allow_mixed=allow_mixed or config.allow_mixed,
            allow_changed_model=allow_changed_model or config.allow_changed_model,
            model_info=loaded.model_info,
            progress=progress,
        ),
    )
    leave_process_group()
    return store


def discard(path: Path, console: Console) -> None:
    """Discard an extension that is not finished."""
    store = Store(path)
    dropped = ExtensionTransaction(path).discard()
    console.print("the extension is discarded" if dropped else "no extension has begun")
    console.print(repr(store), highlight=False, markup=False)
