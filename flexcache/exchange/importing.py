"""Import activations from files of other tools into a store, planned, checked and committed like a capture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from flexcache.errors import ConfigError, nearest
from flexcache.exchange.engine_import import import_samples
from flexcache.exchange.engine_layout import EngineOptions, read_layout
from flexcache.exchange.engine_samples import ENGINE_FORMATS, find_samples
from flexcache.exchange.file_tensors import ENDINGS
from flexcache.exchange.sample_labels import SampleLabels
from flexcache.exchange.tensor_import import LAYER_PATTERN, import_tensors
from flexcache.keywords import check_keywords
from flexcache.paths import local_path
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.store.read.store import Store


def import_folder(
    folder: str | Path,
    target: str | Path,
    kind: str,
    *,
    site: str | None = None,
    layer_pattern: str | None = None,
    depth: int | None = None,
    token_ids: str | None = None,
    documents: str | Path | None = None,
    model: str | None = None,
    dtype: str | None = None,
    compression: str = "none",
    progress: ProgressCallback = ignore_progress,
    **options: Unpack[EngineOptions],
) -> Store:
    """Make a store from the tensors in a folder; repeat the call to resume.

    ::

        flexcache.import_folder("cached_activations", "run.zarr", "saelens", site="resid_post", model="gpt2")
        flexcache.import_folder("hidden_states", "run.zarr", "speculators", layer_ids=[2, 18, 33, 36], depth=36)

    A folder of an engine has one file for each prompt, which becomes a document with its token ids, and with its loss
    mask as a label of its tokens; see `flexcache.exchange.engine_samples`. All samples are checked before the store is
    begun. In folders of other kinds, a tensor has shape (tokens, features) or (documents, tokens, features). Tensors of
    one layer are concatenated in the natural order of their files. Padding is unknown: every vector becomes a row.

    Parameters
    ----------
    kind
        ``safetensors``; ``pt``, files of ``torch.save`` with tensors in dicts and lists, read with
        ``weights_only=True``; ``saelens``, a folder of SAELens' CacheActivationsRunner; or the samples of an engine:
        ``speculators`` (also of vLLM itself), ``specforge``, ``torchspec``, or ``npy``.
    site
        Site of the tensors: a standard site, or any other name. The formats of engines say what their states are,
        except for npy: ``resid_post`` by default.
    layer_pattern
        Regular expression with one group, the layer number, which is searched in the name of a tensor, then in that of
        its file. Tensors without a layer are left out. If no tensor has one and the site is not a standard site, the
        tensors have no layer.
    depth
        Number of layers of the model; by default one more than the highest layer found.
    token_ids
        Name of the tensors of token ids in the same files, or a file (.npy, .safetensors, .pt) with one, shape (tokens)
        or (documents, tokens); ``token_ids`` by default for saelens. Without token ids, every id is 0.
    documents
        Parquet file with a line for each document, as `flexcache.exchange.exporting.export` writes it: ``n_rows``, its
        number of tokens (one without such a column), ``id``, and labels. By default the first of three dims is the
        document; with two dims, each token is a document. For samples of an engine, the labels: a Parquet file, or a
        folder saved by datasets, with a line for each sample, or a line n for each sample ``hs_n`` or ``data_n``; its
        ``input_ids`` are compared, and its ``loss_mask`` is taken.
    model
        Name of the model of the activations.
    dtype
        Stored dtype; that of the tensors by default.
    layer_ids
        For samples of an engine: its layer ids in the order of the states, as numbers or as text such as ``2,18,33``;
        by default those in ``engine.json``, ``data_config.json`` or ``config.json`` in the folder. The id i of vLLM is
        the input of block i, so layer i - 1 of ``resid_post``; other formats number the outputs of blocks.
    final_state
        For samples with a last hidden state apart from the layers: ``normed``, after the last norm, which is stored as
        ``final_norm``; or ``raw``, the output of the last block.
    engine
        Engine of the samples: a name, ``name==version``, or a dict with ``name``, ``version`` and settings; kept in
        ``store.provenance.model["engine"]``.

    Returns
    -------
    Store
        The complete store.

    Raises
    ------
    ConfigError
        An option cannot be used.
    SiteError
        No tensor has a layer, although the site needs one.
    MismatchError
        Tensors differ in shape, documents or token ids do not fit them, or the target holds another store.
    DamagedError
        A file cannot be read; samples have states of another number than token ids, of another dtype or width than
        most, or that are not finite, all of which are found before the store is begun.
    RangeError
        A value is not finite, or the dtype cannot hold it.
    """
    check_keywords(import_folder, options, EngineOptions.__annotations__)
    if kind not in (*ENDINGS, *ENGINE_FORMATS):
        names = (*ENDINGS, *ENGINE_FORMATS)
        raise ConfigError(f"activations cannot be imported from {kind!r}", remedy=nearest(kind, names))
    place = local_path(folder)
    if kind in ENGINE_FORMATS:
        _check_unused(kind, layer_pattern=layer_pattern, token_ids=token_ids)
        files = find_samples(place, kind)
        layout = read_layout(place, kind, files, site, depth, options)
        return import_samples(
            place,
            target,
            kind,
            files,
            layout,
            labels=SampleLabels(None if documents is None else local_path(documents), files),
            model=model or layout.model or place.resolve().name,
            dtype=dtype,
            compression=compression,
            progress=progress,
        )
    _check_unused(kind, **options)
    if site is None:
        raise ConfigError(f"an import from {kind} needs a site", remedy="for example resid_post (--site resid_post)")
    return import_tensors(
        place,
        target,
        kind,
        site=site,
        layer_pattern=LAYER_PATTERN if layer_pattern is None else layer_pattern,
        depth=depth,
        token_ids=token_ids,
        documents=documents,
        model=model or place.resolve().name,
        dtype=dtype,
        compression=compression,
        progress=progress,
    )


def _check_unused(kind: str, **options: Any) -> None:
    """Raise ConfigError if an option was given that the format has no use for."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{kind} has no use for {name}", found=repr(value)[:80], remedy="leave it out")
