"""flexcache capture: a model from a folder or the hub, over a corpus, into a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexcache.parallel.launch import launch
from flexcache.store.store import Store
from pipelines.config import CaptureConfig


def run(config: CaptureConfig, *, allow_mixed: bool = False, progress: bool = True) -> Store:
    """Capture, or go on with a capture, as the configuration says; beside any others that do the same."""
    import torch
    import transformers

    import flexcache
    from flexcache.hooks.measure import input_device
    from flexcache.recorder.reading import locate

    progress = progress and launch().rank == 0
    documents = config.documents.open()
    config.model.parallel.config()  # refuses a number of processes that does not fit, before anything is loaded
    if not progress:
        transformers.utils.logging.disable_progress_bar()
    tokenizer = config.load_tokenizer(documents)
    # A misspelt site or function shows before a large model is loaded.
    locate(config.model.skeleton(), config.spec(), **config.functions(tokenizer))
    info: dict[str, Any] = {
        "name": Path(config.model.name).name if Path(config.model.name).is_dir() else config.model.name,
        "revision": config.model.revision,
        "files": config.model.weights(),
    }
    model = config.load_model()
    store = flexcache.capture(
        model,
        tokenizer,
        documents,
        config.store,
        **config.capture_options(),
        **config.functions(tokenizer, input_device(model)),
        buffer_bytes=config.buffer_mb << 20,
        allow_mixed=allow_mixed,
        patience=config.patience,
        model_info=info,
        progress=progress,
    )
    if torch.distributed.is_initialized():  # by transformers, for a model on several processes
        torch.distributed.destroy_process_group()
    return store
