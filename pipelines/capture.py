"""flexcache capture: run a model from a folder or the hub over a corpus, into a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexcache.documents import Documents, open_documents
from flexcache.parallel.launch import launch
from flexcache.store.read.store import Store
from flexcache.store.write.create import check_target
from pipelines.config import CaptureConfig


@dataclass(frozen=True)
class LoadedCapture:
    """The loaded parts of a configuration: model with weights, tokenizer, corpus, and functions.

    If the model has variants, it is a mapping from the name of each to its model.
    """

    model: Any
    tokenizer: Any
    documents: Documents
    functions: dict[str, Any]
    model_info: dict[str, Any]


def load(config: CaptureConfig, progress: bool, variants: bool = False) -> LoadedCapture:
    """Load what a capture needs; everything that can be checked without weights is checked before they are loaded."""
    import transformers

    from flexcache.hooks.locate.position_tables import longest_input
    from flexcache.hooks.locate.vision import reads_images
    from flexcache.hooks.read.measure import input_device
    from flexcache.images.input import model_input
    from flexcache.recording.forward.capture_targets import find_targets
    from flexcache.recording.forward.image_inputs import check_images

    for store in config.stores:
        check_target(store)
    documents = config.documents.open()
    config.model.parallel.config()  # raises ConfigError if the number of processes does not fit
    if not progress:
        transformers.utils.logging.disable_progress_bar()
    skeleton = config.skeleton()
    documents = open_documents(documents, images_first=reads_images(skeleton))
    tokenizer = config.load_tokenizer(documents)
    spec = config.spec(skeleton)
    targets = find_targets(skeleton, spec, **config.functions(tokenizer))
    if config.generate is None:
        check_images(skeleton, spec, targets, model_input(skeleton, tokenizer, documents.content))
    spec.within(longest_input(skeleton, tokenizer)).check()
    base = config.model.resolved()
    info: dict[str, Any] = {
        "name": Path(base.name).name if Path(base.name).is_dir() else base.name,
        "revision": base.revision,
        "files": config.model.weights(),
    }
    model = config.load_model(variants)
    first = next(iter(model.values())) if variants else model
    functions = config.functions(tokenizer, input_device(first))
    return LoadedCapture(model, tokenizer, documents, functions, info | (config.model_info or {}))


def run(
    config: CaptureConfig, *, allow_mixed: bool = False, allow_changed_model: bool = False, progress: bool = True
) -> Store:
    """Capture, or resume a capture, as the configuration says; other processes may do the same at the same time."""
    import flexcache

    made: Store = _run(flexcache.capture, config, allow_mixed, allow_changed_model, progress)
    return made


def run_variants(
    config: CaptureConfig, *, allow_mixed: bool = False, allow_changed_model: bool = False, progress: bool = True
) -> dict[str, Store]:
    """Capture the variants of a model, or resume that, each into a store in the folder that is given as the store."""
    import flexcache

    made: dict[str, Store] = _run(flexcache.capture_variants, config, allow_mixed, allow_changed_model, progress)
    return made


def _run(
    call: Callable[..., Any], config: CaptureConfig, allow_mixed: bool, allow_changed_model: bool, progress: bool
) -> Any:
    progress = progress and config.progress and launch().rank == 0
    loaded = load(config, progress, variants=config.model.adapters is not None)
    made = call(
        loaded.model,
        loaded.tokenizer,
        loaded.documents,
        config.store,
        config.spec(completed=False),
        **loaded.functions,
        options=config.run_options(
            allow_mixed=allow_mixed or config.allow_mixed,
            allow_changed_model=allow_changed_model or config.allow_changed_model,
            model_info=loaded.model_info,
            progress=progress,
        ),
    )
    leave_process_group()
    return made


def leave_process_group() -> None:
    """Leave the process group that transformers made for a model on several processes."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
