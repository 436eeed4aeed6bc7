"""Plan which blocks have to run for the rows of some sites and layers; needs no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flexcache.array_spec import ArraySpec
from flexcache.errors import AnalysisError
from flexcache.store.format.text import layer_text, size
from flexcache.store.read.selection import ArrayKey


class ReplayError(AnalysisError):
    """The model fails, or gives other values, when its rows are recomputed."""


RESIDUAL_INPUT, RESIDUAL_OUTPUT = "resid_pre", "resid_post"


@dataclass(frozen=True)
class Start:
    """Start of a replay: how many blocks are skipped, and the stored site and layer that replace them.

    ::

        replay.Start(12, "resid_post", 11)  # block 12 is the first to run
    """

    skipped: int
    site: str = ""
    layer: int | None = None

    def __str__(self) -> str:
        return f"{self.site} {self.layer}" if self.skipped else "the beginning"


BEGINNING = Start(0)
"""The start of a complete forward."""
Starts = Mapping[int, Start]
"""The starts that are possible, by the number of blocks that they skip; the beginning is always possible."""


@dataclass(frozen=True)
class Segment:
    """A part of a walk up the blocks: from a start to the last of the sites and layers that are read on the way.

    >>> Segment(Start(6, "resid_post", 5), (("mlp_post", 6), ("resid_pre", 8))).blocks
    range(6, 8)
    """

    start: Start
    keys: tuple[ArrayKey, ...]

    @property
    def blocks(self) -> range:
        """The blocks that run."""
        return range(self.start.skipped, max(blocks_needed(*key) for key in self.keys))


def blocks_needed(site: str, layer: int | None) -> int:
    """Return how many blocks must have run for a site and layer to be there.

    >>> blocks_needed("z", 3), blocks_needed("resid_pre", 3)
    (4, 3)
    """
    assert layer is not None, "only stacked sites are virtual"
    return layer if site == RESIDUAL_INPUT else layer + 1


def start_after(site: str, layer: int | None) -> Start | None:
    """Return the start that rows of a site and layer are; None unless they are a residual stream between blocks.

    >>> start_after("resid_post", 11), start_after("resid_pre", 0)
    (Start(skipped=12, site='resid_post', layer=11), None)
    """
    if layer is None or site not in (RESIDUAL_INPUT, RESIDUAL_OUTPUT):
        return None
    skipped = layer + (site == RESIDUAL_OUTPUT)
    return Start(skipped, site, layer) if skipped else None


def stored_starts(arrays: Mapping[str, ArraySpec]) -> dict[int, Start]:
    """Return the starts among the layers of some arrays that are on disk and not rounded to int8."""
    found: dict[int, Start] = {}
    for site in (RESIDUAL_INPUT, RESIDUAL_OUTPUT):
        array = arrays.get(site)
        if array is not None and array.dtype != "int8":
            starts = (start_after(site, layer) for layer in array.layers or () if layer not in array.virtual)
            found |= {start.skipped: start for start in starts if start is not None}
    return found


def divide(keys: Iterable[ArrayKey], starts: Starts) -> list[Segment]:
    """Return the segments of a walk that reads *keys* and runs as few blocks as the starts allow, each at most once.

    >>> divide([("z", 1), ("z", 7), ("z", 8)], {6: Start(6, "resid_post", 5)})  # doctest: +NORMALIZE_WHITESPACE
    [Segment(start=Start(skipped=0, site='', layer=None), keys=(('z', 1),)),
     Segment(start=Start(skipped=6, site='resid_post', layer=5), keys=(('z', 7), ('z', 8)))]
    """
    found: dict[int, list[ArrayKey]] = {}
    for site, layer in sorted(keys, key=lambda key: (key[1] or 0, key[0])):
        skipped = max((number for number in starts if number <= (layer or 0)), default=0)
        found.setdefault(skipped, []).append((site, layer))
    return [Segment(starts.get(skipped, BEGINNING), tuple(held)) for skipped, held in sorted(found.items())]


def plan_walk(
    keys: Sequence[ArrayKey],
    batches: Iterable[int],
    missing: Callable[[ArrayKey, int], bool],
    starts: Callable[[int], Starts],
) -> dict[Segment, list[int]]:
    """Return the segments of a walk over some batches, by number, each with the batches that it runs.

    *missing* says if a batch lacks rows of a site and layer; *starts* are those of a batch.
    """
    found: dict[Segment, list[int]] = {}
    for number in batches:
        lacking = [key for key in keys if missing(key, number)]
        for segment in divide(lacking, starts(number)):
            found.setdefault(segment, []).append(number)
    return found


@dataclass(frozen=True)
class ReadPlan:
    """The plan of a read; made by `flexcache.Store.explain`.

    Attributes
    ----------
    rows : int
        Rows of each site and layer.
    stored : tuple of (site, layer)
        Read from disk.
    cached : tuple of (site, layer)
        All rows are in the cache of the attached model.
    segments : mapping from Segment to (batches, tokens)
        The blocks that run from each start, and for how many batches of the capture and tokens without padding.
    bytes : int
        Bytes that are read from disk: rows, and residual streams at which the model starts.
    """

    rows: int
    stored: tuple[ArrayKey, ...]
    cached: tuple[ArrayKey, ...]
    segments: Mapping[Segment, tuple[int, int]]
    bytes: int

    @property
    def blocks(self) -> int:
        """Forwards of single blocks, over all batches."""
        return sum(len(segment.blocks) * batches for segment, (batches, _) in self.segments.items())

    @property
    def batches(self) -> int:
        """Forwards of batches, each of some blocks."""
        return sum(batches for batches, _ in self.segments.values())

    @property
    def tokens(self) -> int:
        """Tokens of these forwards."""
        return sum(tokens for _, tokens in self.segments.values())

    def __repr__(self) -> str:
        lines = [
            f"{self.rows:,} rows: {size(self.bytes)} from disk, {self.blocks:,} blocks in {self.batches:,} batches"
        ]
        lines += [f"  from disk: {_names(self.stored)}"] * bool(self.stored)
        lines += [f"  from the cache: {_names(self.cached)}"] * bool(self.cached)
        for segment, (batches, tokens) in self.segments.items():
            ran = segment.blocks
            blocks = f"blocks {ran[0]} to {ran[-1]}" if len(ran) > 1 else f"block {ran[0]}" if ran else "no block"
            lines.append(
                f"  recomputed: {_names(segment.keys)}, from {segment.start}, {blocks}, {batches:,} batches,"
                f" {tokens:,} tokens"
            )
        return "\n".join(lines)


def _names(keys: Sequence[ArrayKey]) -> str:
    by_site: dict[str, list[int]] = {}
    for name, layer in keys:
        by_site.setdefault(name, []).extend([] if layer is None else [layer])
    return ", ".join(f"{name} {layer_text(tuple(layers))}".strip() for name, layers in by_site.items())
