"""Write the README.md inside a store: its contents, and how to open it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexcache.spec import ArraySpec
from flexcache.store.format.text import layer_text


def card(name: str, arrays: list[ArraySpec], facts: list[tuple[str, str]], content: dict[str, Any]) -> str:
    """Return the text of a store's README.md; *facts* are names and values of the size of its plan."""
    model = content["provenance"]["model"]
    table = "\n".join(f"| {key} | {value} |" for key, value in facts)
    lines = "\n".join(
        f"| `{array.name}` | {layer_text(array.layers)} | {', '.join(array.dims)} | {array.features} | {array.dtype} |"
        for array in arrays
    )
    first = arrays[0]
    layer = "" if first.layers is None else f"layer={first.layers[-1]}, "
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
Rows whose unit has no record in `ledger/0/` have not been captured: a plain Zarr reader shows them as NaN.

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
