"""Capture: a model runs over documents once, and the activations at its sites become a store."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flexcache import hooks
from flexcache.documents import open_documents
from flexcache.errors import CaptureError
from flexcache.model import describe_model, describe_tokenizer, evaluating, longest_input, pad_id, vocabulary
from flexcache.plan import RowSelection
from flexcache.recorder.arrays import all_taps, locate, measure_arrays
from flexcache.recorder.batch import Batch
from flexcache.recorder.cuda import CudaLane, pinned_slab
from flexcache.recorder.fingerprint import fingerprint
from flexcache.recorder.planning import Source, check_same, plan_store, stored_identity
from flexcache.recorder.progress import CaptureProgress, time_table
from flexcache.recorder.recorder import DEFAULT_BUFFER, Recorder
from flexcache.site import Layers
from flexcache.spec import SitesLike, Spec, parse_sites, validate
from flexcache.store.display import size
from flexcache.store.schema import read_attributes
from flexcache.store.slabs import anonymous_slab
from flexcache.store.store import Store


def capture(
    model: torch.nn.Module,
    tokenizer: Any,
    documents: Any,
    path: str | Path,
    *,
    sites: SitesLike = "resid_post",
    layers: Layers = "all",
    rows: RowSelection = "all",
    dtype: str = "auto",
    max_length: int | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    compression: str = "none",
    keep_text: bool = True,
    empty_documents: str = "error",
    buffer_bytes: int = DEFAULT_BUFFER,
    allow_mixed: bool = False,
    model_info: dict[str, Any] | None = None,
    progress: bool = True,
) -> Store:
    """Run a model over documents and store the activations at *sites*; go on where an earlier run stopped.

    The model is left as it was: hooks are removed, training mode restored. The forward stops after the last site
    has fired, so later blocks and the lm_head are never computed.

    Parameters
    ----------
    model
        Any transformers model with token ids as input, on any device.
    tokenizer
        The model's tokenizer; None where documents have ``tokens``.
    documents
        Dicts ``{"id", "text" | "tokens", any labels}``, or a path; see `flexcache.open_documents`.
    path
        The store. Where one made from the same arguments exists, its missing units are captured.
    sites, layers
        A site or several, see `flexcache.site`; *layers* holds for those that do not name their own.
    rows
        ``"all"`` tokens, the ``"last"`` or ``"first"`` of each document, or the ``"mean"`` over it.
    dtype
        As stored: bfloat16, float16 or float32; ``"auto"`` is as computed.
    max_length
        Tokens after which a document is truncated; by default what the model can read.
    batch_tokens
        Most tokens of a forward, padding included.
    buffer_bytes
        Bound on the memory for rows on their way to the disk.
    allow_mixed
        Go on with a store that was begun on another device, version or thread count.
    model_info
        More about the model for the provenance: its ``name``, ``revision``, the hashes of its ``files``.

    Returns
    -------
    Store, complete

    Raises
    ------
    SiteError
        A site or layer that the model does not have, or that its forward does not reach.
    DocumentsError, ConfigError, PlanError
        Before anything is computed.
    RangeError
        A value is not finite or does not fit *dtype*. Committed units are kept.
    MismatchError
        The store at *path* was made from something else.
    CaptureError
        The disk refused a write. Committed units are kept.
    """
    spec = validate(
        Spec,
        {
            "sites": parse_sites(sites, layers),
            "rows": rows,
            "dtype": dtype,
            "max_length": max_length or longest_input(model, tokenizer),
            "batch_tokens": batch_tokens,
            "seed": seed,
            "compression": compression,
            "keep_text": keep_text,
            "empty_documents": empty_documents,
        },
        "capture",
    )
    path = Path(path)
    with evaluating(model), CaptureProgress(progress) as bars:
        located = locate(model, spec)
        taps = all_taps(located)
        source = Source(
            documents=open_documents(documents),
            tokenizer=tokenizer,
            arrays=measure_arrays(model, spec, located),
            spec=spec,
            model=describe_model(model) | (model_info or {}),
            tokenizer_identity=describe_tokenizer(tokenizer),
            vocabulary=vocabulary(model),
            notes={"user_hooks": hooks.user_hooks(model)},
        )
        hooks.check_identity(model, taps)
        amount = plan_store(path, source, bars.planning(None))
        check_same(stored_identity(read_attributes(path)), source.identity(), path)
        for name, text in amount.lines() if amount else ():
            bars.say(f"  {name}: {text}")
        began = time.perf_counter()
        device = _device(model)
        recorder = Recorder(
            path,
            fingerprint=fingerprint(model),
            buffer_bytes=buffer_bytes,
            allow_mixed=allow_mixed,
            allocate=pinned_slab if device.type == "cuda" else anonymous_slab,
        )
        if recorder.pending():
            pad = pad_id(model, tokenizer)
            try_largest(model, taps, recorder, pad)
            run(model, taps, recorder, pad, bars)
            tally, seconds = recorder.tally, time.perf_counter() - began
            bars.console.print(time_table(tally, seconds))
            speed = f"{tally.tokens / seconds:,.0f} tokens/s, {size(tally.bytes / seconds)}/s"
            bars.say(f"{tally.rows:,} rows, {size(tally.bytes)} in {seconds:.1f} s ({speed}) → {path}")
        else:
            bars.say(f"{path} is complete: nothing to do")
    return Store(path)


def try_largest(model: torch.nn.Module, taps: tuple[hooks.Tap, ...], recorder: Recorder, pad: int) -> None:
    """Run the largest batch of the plan and keep nothing, so that a lack of memory shows before anything is written.

    Raises
    ------
    CaptureError
        It does not fit.
    """
    device = _device(model)
    with hooks.Taps(model, taps, lambda tap, values: None) as trial:
        largest = recorder.largest()
        try:
            forward(trial, largest, pad, device)
        except torch.OutOfMemoryError as error:
            raise CaptureError(
                "the largest batch of the plan does not fit into the device's memory",
                where=f"{largest.shape[0]} sequences of up to {largest.shape[1]} tokens",
                found=str(error).splitlines()[0],
                remedy="lower batch_tokens (and max_length, where one document is longer), in a new store",
            ) from error


def run(
    model: torch.nn.Module,
    taps: tuple[hooks.Tap, ...],
    recorder: Recorder,
    pad: int,
    bars: CaptureProgress | None = None,
) -> None:
    """Fill a recorder's pending units: every batch is run as far as the taps need, and its kept rows are recorded."""
    device = _device(model)
    total = sum(len(recorder.unit_rows(unit)) for unit in recorder.pending())
    with hooks.Taps(model, taps, _sink(recorder, device)) as live, recorder:
        advance: Callable[[int], None] = bars.capturing(recorder, total) if bars else lambda rows: None
        for batch in recorder.batches():
            forward(live, batch, pad, device)
            advance(len(batch.rows))


def forward(taps: hooks.Taps, batch: Batch, pad: int, device: torch.device) -> None:
    """Run the model over one batch, right-padded, as far as its taps need."""
    taps.forward(
        input_ids=torch.from_numpy(batch.input_ids(pad)).to(device),
        attention_mask=torch.from_numpy(batch.attention_mask()).to(device),
    )


def _sink(recorder: Recorder, device: torch.device) -> Callable[[hooks.Tap, torch.Tensor], None]:
    if device.type != "cuda":
        return lambda tap, values: recorder.record(tap.array, tap.layer, values)
    lane = CudaLane(device)
    dtypes = {name: getattr(torch, array.dtype) for name, array in recorder.store.arrays.items()}

    def take(tap: hooks.Tap, values: torch.Tensor) -> None:
        content, n_rows = lane.rows(recorder.current(), values, dtypes[tap.array])
        recorder.append(tap.array, tap.layer, content, n_rows, lane.copy)

    return take


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters(), torch.empty(0)).device
