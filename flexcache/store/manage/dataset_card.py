"""Write the README.md inside a store: its contents, and how to open it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexcache.array_spec import ArraySpec
from flexcache.store.format.int8 import OUTLIER, outlier_count, scale_name
from flexcache.store.format.text import layers_text


def card(name: str, arrays: list[ArraySpec], facts: list[tuple[str, str]], content: dict[str, Any]) -> str:
    """Return the text of a store's README.md; *facts* are names and values of the size of its plan."""
    model = content["provenance"]["model"]
    table = "\n".join(f"| {key} | {value} |" for key, value in facts)
    lines = "\n".join(
        f"| `{array.name}` | {layers_text(array)} | {', '.join(array.dims)} | {array.features} | {array.dtype} |"
        for array in arrays
    )
    first = next((array for array in arrays if array.slices), arrays[0])
    notes = _int8_text(name, arrays) + _virtual_text(arrays)
    layer = "" if not first.layers else f"layer={first.layers[-1]}, "
    return f"""# {name}

Activations of **{model.get("name")}** ({model.get("class", "unknown class")}), one row per kept token
(rows: {content["spec"]["rows"]}), written by FlexCache as a Zarr v3 group.

| | |
|---|---|
{table}

| array | layers | dims | features | dtype |
|---|---|---|---|---|
{lines}

Row *i* is the same token in every array. `documents.parquet` says which document it belongs to,
`sequences.parquet` holds the token ids, `token_id`, `position` and `document` are the coordinates of the rows.
{notes}Rows whose unit has no record in `ledger/0/` have not been captured: a plain Zarr reader shows them as NaN.

```python
import flexcache
store = flexcache.open("{name}")
store["{first.name}"]                                   # xarray.DataArray, lazily float32
store.read("{first.name}", {layer}rows=[0, 1, 2])       # numpy

import xarray as xr
xr.open_zarr("{name}")                                  # any Zarr v3 reader
```

Model, tokenizer, corpus, versions and configuration are in the attributes of `zarr.json`, under `flexcache`.
"""


def plan_facts(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the size of a plan as names and values for a card."""
    return [
        ("documents", f"{plan.get('documents', 0):,}"),
        ("rows", f"{plan['rows']:,}"),
        ("units", f"{plan['units']:,} of {plan['shard_rows']:,} rows"),
    ]


def _int8_text(name: str, arrays: list[ArraySpec]) -> str:
    """Return how int8 rows are read, and their error; an empty text if there are none."""
    named = {array.name: array for array in arrays}
    coarse = [array for array in arrays if array.dtype == "int8"]
    if not coarse:
        return ""
    kept = ", ".join(f"{outlier_count(array.name, named)} of {array.features} in `{array.name}`" for array in coarse)
    first = scale_name(coarse[0].name)
    return f"""Rows of int8 are multiplied by the scale of their row, the first value of a row of `{first}`.
The largest values of a row are kept exactly ({kept}):
{OUTLIER} stands for each of them, and they follow the scale. Other values are within half a scale of the model's.
`flexcache bench-codec {name}` prints the relative error by layer, with the largest values and without them.

"""


def _virtual_text(arrays: list[ArraySpec]) -> str:
    """Return what virtual layers are, and how they are read; an empty text if there are none."""
    if not any(array.virtual for array in arrays):
        return ""
    return """Virtual layers were computed and hashed by the capture, and are not on disk: a plain Zarr reader shows
NaN. `flexcache.attach(store, model)` recomputes them when they are read, and compares the hashes with the ledger.

"""
