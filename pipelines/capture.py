"""flexcache capture: a model from a folder or the hub, over a corpus, into a store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexcache.documents import Documents, open_documents
from flexcache.options import Generation
from flexcache.parallel.launch import launch
from flexcache.store.read.store import Store
from flexcache.store.write.create import check_target
from pipelines.config import CaptureConfig


@dataclass(frozen=True)
class Loaded:
    """What a configuration names, loaded: a model with its weights, its tokenizer, a corpus, functions; and options."""

    model: Any
    tokenizer: Any
    documents: Documents
    functions: dict[str, Any]
    options: dict[str, Any]


def load(config: CaptureConfig, progress: bool) -> Loaded:
    """Load what a capture needs; what can be wrong with the rest shows before a large model is loaded."""
    import transformers

    from flexcache.hooks.locate.vision import reads_images
    from flexcache.hooks.read.measure import input_device
    from flexcache.images.input import model_input
    from flexcache.model import longest_input
    from flexcache.recording.forward.capture_targets import find_targets
    from flexcache.recording.forward.image_inputs import check_images

    check_target(config.store)
    documents = config.documents.open()
    config.model.parallel.config()  # refuses a number of processes that does not fit, before anything is loaded
    if not progress:
        transformers.utils.logging.disable_progress_bar()
    # A misspelt site or function shows before a large model is loaded.
    skeleton = config.skeleton()
    documents = open_documents(documents, images_first=reads_images(skeleton))
    tokenizer = config.load_tokenizer(documents)
    spec = config.spec(skeleton)
    targets = find_targets(skeleton, spec, **config.functions(tokenizer))
    if config.generate is None:
        check_images(skeleton, spec, targets, model_input(skeleton, tokenizer, documents.content))
    spec.within(longest_input(skeleton, tokenizer)).check()
    info: dict[str, Any] = {
        "name": Path(config.model.name).name if Path(config.model.name).is_dir() else config.model.name,
        "revision": config.model.revision,
        "files": config.model.weights(),
    }
    model = config.load_model()
    if config.generate is not None:
        documents = _completions(config, config.generate, model, tokenizer, documents, progress)
    options = {
        "buffer_bytes": config.buffer_mb << 20,
        "heartbeat_timeout": config.heartbeat_timeout,
        "model_info": info,
    }
    return Loaded(model, tokenizer, documents, config.functions(tokenizer, input_device(model)), options)


def run(
    config: CaptureConfig, *, allow_mixed: bool = False, allow_changed_model: bool = False, progress: bool = True
) -> Store:
    """Capture, or go on with a capture, as the configuration says; beside any others that do the same."""
    import flexcache

    progress = progress and launch().rank == 0
    loaded = load(config, progress)
    store = flexcache.capture(
        loaded.model,
        loaded.tokenizer,
        loaded.documents,
        config.store,
        **config.capture_options(),
        **loaded.functions,
        **loaded.options,
        allow_mixed=allow_mixed,
        allow_changed_model=allow_changed_model,
        progress=progress,
    )
    leave()
    return store


def _completions(
    config: CaptureConfig, generation: Generation, model: Any, tokenizer: Any, documents: Documents, progress: bool
) -> Documents:
    """Return prompts with completions, which are made where they are not there yet."""
    from flexcache.recording.generate import generate
    from flexcache.recording.run.progress import CaptureProgress

    with CaptureProgress(progress) as bars:
        advance = bars.generating(documents.count)
        return generate(model, tokenizer, documents, config.completions, generation, advance, config.heartbeat_timeout)


def leave() -> None:
    """Leave the process group that transformers made for a model on several processes."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
