"""Remove sites and layers from a store, in steps that each leave a store that reads correctly."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexcache.errors import SiteError, StoreError
from flexcache.keep import mean_blocks
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.site import Layers
from flexcache.spec import ArraySpec
from flexcache.store.format.ledger import read_plan_record, reading, write_plan_record
from flexcache.store.format.schema import ATTRIBUTE, read_attributes, schema_of
from flexcache.store.format.shard import shard_folder
from flexcache.store.manage.dataset_card import card, plan_facts
from flexcache.store.manage.derive import add_history, changed_spec, narrow_spec
from flexcache.store.manage.extension_transaction import check_not_extending
from flexcache.store.read.selection import ArrayKey, by_array, captured_keys, select
from flexcache.store.read.store import Store
from flexcache.store.storage.atomic_files import fsync_folder, write_durably, write_json
from flexcache.store.storage.disk_errors import clear_errors
from flexcache.store.storage.location import local
from flexcache.store.write.claims import CLAIMS, Claiming
from flexcache.store.write.election import working
from flexcache.store.write.worker import Worker

NOTE = "removing.json"
"""File that lists what is being removed; it exists from before the first change until after the last."""


class Removal:
    """A planned removal of sites or layers from a store; `run` applies it.

    ::

        removal = flexcache.Removal("run.zarr", ["attn_weights"])
        print(removal.bytes())
        removal.run()

    The removal first writes a note of what is removed, then changes the metadata, then the ledger records, then deletes
    the files, and last the note. Once the metadata is changed, readers no longer see what is removed; all else reads as
    before. If a removal is interrupted, the next one finishes it, whatever it is asked to remove.

    Parameters
    ----------
    sites, layers
        Sites and layers to remove, see `flexcache.store.select`. Virtual layers lose their digests. Residual streams
        from which virtual layers are recomputed can be removed, since the token ids stay; `price` says what it costs.

    Attributes
    ----------
    gone : list of (str, int or None)
        The arrays and layers to remove.
    unfinished : bool
        True if an earlier removal was interrupted, so that this one only finishes it.

    Raises
    ------
    SiteError
        The store has no such site or layer, or would have no site left.
    StoreError
        There is no store at *path*.
    """

    def __init__(self, path: str | Path, sites: Sequence[str] | None = None, layers: Layers = "all") -> None:
        self.path = local(path, "flexcache rm")
        store = Store(self.path)
        self.unfinished = (self.path / NOTE).exists()
        self.gone: list[ArrayKey] = (
            self._noted() if self.unfinished else captured_keys(select(store, sites, layers, virtual=True))
        )
        if not self.unfinished and len(self.gone) == len(captured_keys(store.arrays.values())):
            raise SiteError(
                "the store would have no site left",
                where=str(self.path),
                found=", ".join(store.sites),
                remedy="delete the folder if nothing in it is needed",
            )

    def price(self) -> str:
        """Return what reading virtual layers will cost if residual streams are removed; an empty text if no more."""
        store = Store(self.path)
        left = self._left(store)
        remaining = set(captured_keys(left))
        before, after = (mean_blocks(arrays, remaining) for arrays in (store.arrays.values(), left))
        if after <= before:
            return ""
        return f"a virtual layer is then recomputed by {after:.1f} blocks on average, instead of {before:.1f}"

    def bytes(self) -> int:
        """Return the bytes of the files to remove."""
        return sum(file.stat().st_size for folder in self._folders() for file in folder.rglob("*") if file.is_file())

    def run(self, progress: ProgressCallback = ignore_progress) -> int:
        """Apply the removal, and return the bytes freed.

        Raises
        ------
        StoreError
            Another process fills the store, or an extension is unfinished.
        CaptureError
            The disk refuses.
        """
        check_not_extending(self.path, staged=True)
        with clear_errors(self.path), working(self.path, lambda: Store(self.path).complete) as (worker, claims):
            self._check_alone(worker, claims)
            return self._remove(progress)

    # Steps, each of which can be repeated

    def _remove(self, progress: ProgressCallback) -> int:
        if not self.unfinished:
            write_json(self.path / NOTE, {"schema": 1, "remove": [list(key) for key in self.gone]})
        self._change_metadata()
        self._change_records()
        freed = self._delete_files(progress)
        (self.path / NOTE).unlink()
        fsync_folder(self.path)
        return freed

    def _change_metadata(self) -> None:
        """Remove the arrays and layers from the metadata, the dataset card and the plan record."""
        store = Store(self.path)
        left = {array.name: array for array in self._left(store)}
        if left != store.arrays:
            given = read_attributes(self.path)
            content = add_history(given, {"removed": by_array(self.gone)})
            content["schema"] = schema_of(left.values())
            content["spec"] = changed_spec(given["spec"], narrow_spec(store, list(left.values())))
            content["arrays"] = {name: array.to_json() for name, array in left.items()}
            if "files" in content["plan"]:
                n_files = store.n_units * sum(len(array.slices) for array in left.values())
                content["plan"] = {**content["plan"], "files": n_files}
            with _rewriting(self.path / "zarr.json") as metadata:
                metadata["attributes"][ATTRIBUTE] = content
                members = metadata.get("consolidated_metadata", {}).get("metadata", {})
                for name in [name for name in members if name in store.arrays]:
                    if name in left:
                        _set_layers(members[name], left[name])
                    else:
                        del members[name]
        for name in {name for name, _ in self.gone} & set(left):
            with _rewriting(self.path / name / "zarr.json") as metadata:
                _set_layers(metadata, left[name])
        content = read_attributes(self.path)
        text = card(self.path.resolve().name, list(left.values()), plan_facts(content["plan"]), content)
        write_durably(self.path / "README.md", text.encode())
        whole = {f"{name}/zarr.json" for name, _ in self.gone if name not in left}
        write_plan_record(self.path, [name for name in read_plan_record(self.path) if name not in whole])

    def _change_records(self) -> None:
        """Remove the files from the ledger records."""
        ledger = Store(self.path).ledger
        folders = tuple(shard_folder(*key) for key in self.gone)
        for record in ledger:
            files = {name: file for name, file in record.files.items() if not name.startswith(folders)}
            virtual = {name: held for name, held in record.virtual.items() if not name.startswith(folders)}
            if len(files) + len(virtual) < len(record.names):
                ledger.commit(replace(record, files=files, virtual=virtual))

    def _delete_files(self, progress: ProgressCallback) -> int:
        total, freed = self.bytes(), 0
        progress(0, total)
        for folder in self._folders():
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    size = file.stat().st_size
                    file.unlink()
                    freed += size
                    progress(freed, total)
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                fsync_folder(folder.parent)
        return freed

    # Private

    def _left(self, store: Store) -> list[ArraySpec]:
        gone = set(self.gone)
        left = []
        for array in store.arrays.values():
            kept, virtual = (
                tuple(layer for layer in layers if (array.name, layer) not in gone)
                for layers in (array.layers or (), array.virtual)
            )
            if array.layers is None and (array.name, None) not in gone:
                left.append(array)
            elif kept or virtual:
                left.append(replace(array, layers=kept, virtual=virtual))
        return left

    def _folders(self) -> list[Path]:
        """Return the folders to remove: those of layers, and of arrays without layers left."""
        arrays = Store(self.path).arrays
        known = set(captured_keys(arrays.values()))
        whole = {name for name, _ in self.gone if not any(n == name for n, _ in known - set(self.gone))}
        layers = [self.path / name / "c" / str(layer) for name, layer in self.gone if name not in whole]
        return [folder for folder in [*(self.path / name for name in sorted(whole)), *layers] if folder.exists()]

    def _noted(self) -> list[ArrayKey]:
        with reading("the note of an earlier removal", self.path / NOTE, "delete the note, and remove the site again"):
            listed = json.loads((self.path / NOTE).read_bytes())["remove"]
            found: list[ArrayKey] = [(str(name), None if layer is None else int(layer)) for name, layer in listed]
            if any(Path(name).name != name or name in ("", "..") for name, _ in found):
                raise ValueError("a site is outside the store")
            return found

    def _check_alone(self, worker: Worker, claims: Claiming) -> None:
        worker.sweep()
        if claims.take_claim(["remove"]) is None or next(iter(claims.others()), None):
            raise StoreError(
                "another process fills the store, or removes from it",
                where=str(self.path),
                remedy="wait until it has ended, or stop it, then run the same command again; if it died on another"
                f" machine, delete {self.path / CLAIMS} first",
            )


@contextlib.contextmanager
def _rewriting(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the metadata of a group or array, and write it in one step with the changes made to it."""
    metadata = json.loads(path.read_bytes())
    yield metadata
    write_durably(path, json.dumps(metadata, indent=2).encode())


def _set_layers(metadata: dict[str, Any], array: ArraySpec) -> None:
    if array.layers is not None:
        metadata["attributes"]["layers"] = list(array.layers)
        metadata["attributes"].pop("virtual", None)
        metadata["attributes"] |= {"virtual": list(array.virtual)} if array.virtual else {}
