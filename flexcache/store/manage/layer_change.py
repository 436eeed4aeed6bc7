"""Change which layers a store has and where, in steps that each leave a store that reads correctly."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flexcache.array_spec import ArraySpec, keep_of
from flexcache.errors import DamagedError, StoreError
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.store.format.ledger import read_plan_record, reading, write_plan_record
from flexcache.store.format.schema import ATTRIBUTE, read_attributes, schema_of
from flexcache.store.format.shard import shard_folder
from flexcache.store.manage.dataset_card import card, plan_facts
from flexcache.store.manage.derive import add_history, changed_spec, narrow_spec
from flexcache.store.manage.extension_transaction import check_not_extending
from flexcache.store.read.selection import ArrayKey, by_array, captured_keys
from flexcache.store.read.store import Store
from flexcache.store.storage.atomic_files import fsync_folder, write_durably, write_json
from flexcache.store.storage.disk_errors import clear_errors
from flexcache.store.write.claims import CLAIMS, Claiming
from flexcache.store.write.create import total_bytes
from flexcache.store.write.election import elect, working
from flexcache.store.write.worker import Worker

NOTE = "removing.json"
"""File that says what is being changed; it exists from before the first change until after the last."""
Kind = Literal["remove", "thin", "fill"]
PAST: dict[Kind, str] = {"remove": "removed", "thin": "thinned", "fill": "filled"}
"""Word for each kind of change in the history of a store."""


@dataclass(frozen=True)
class LayerChange:
    """Layers that are removed, that become virtual (thin), or that are now on disk (fill).

    The change first writes a note, then changes the metadata, then the ledger records, then deletes the files, and last
    the note. The records of layers that become virtual have their digests, and those of layers that are filled their
    files, before the change begins. If it is interrupted, each step can be repeated.

    Attributes
    ----------
    keep
        For thin, `CaptureSpec.keep` in the form in which it was asked for.
    """

    path: Path
    kind: Kind
    keys: tuple[ArrayKey, ...]
    keep: Mapping[str, Any] | None = None

    @classmethod
    def read_note(cls, path: Path) -> LayerChange | None:
        """Return the change that was interrupted; None if there is none, DamagedError if its note cannot be read."""
        if not (path / NOTE).exists():
            return None
        with reading("the note of an earlier change", path / NOTE, "delete the note, and give the command again"):
            content = json.loads((path / NOTE).read_bytes())
            [kind] = [kind for kind in PAST if kind in content]
            keys = tuple((str(name), None if layer is None else int(layer)) for name, layer in content[kind])
            if any(Path(name).name != name or name in ("", "..") for name, _ in keys):
                raise ValueError("a site is outside the store")
            return cls(path, kind, keys, content.get("keep"))

    def left(self, store: Store) -> list[ArraySpec]:
        """Return the arrays of the store after the change; a change that is repeated changes nothing."""
        return [array for array in map(self._changed, store.arrays.values()) if array is not None]

    def bytes(self) -> int:
        """Return the bytes of the files to delete."""
        return sum(file.stat().st_size for folder in self._folders() for file in folder.rglob("*") if file.is_file())

    def run(self, progress: ProgressCallback = ignore_progress, *, shared: bool = False) -> int:
        """Apply the change, and return the bytes freed; where it is *shared*, one of several processes applies it.

        Raises
        ------
        StoreError
            Another process fills or changes the store, or an extension is unfinished.
        CaptureError
            The disk refuses.
        """
        check_not_extending(self.path, staged=True)
        applied = False
        with (
            clear_errors(self.path),
            working(self.path, lambda: applied and Store(self.path).complete) as (worker, claims),
        ):
            if shared and not elect(worker, claims, "change", self._is_applied):
                return 0
            check_alone(self.path, worker, claims, held=shared)
            freed = self._apply(progress)
            applied = True
            return freed

    # Steps, each of which can be repeated

    def _apply(self, progress: ProgressCallback) -> int:
        if not (self.path / NOTE).exists():
            asked = {} if self.keep is None else {"keep": dict(self.keep)}
            write_json(self.path / NOTE, {"schema": 1, self.kind: [list(key) for key in self.keys], **asked})
        self._change_metadata()
        self._change_records()
        freed = self._delete_files(progress)
        (self.path / NOTE).unlink()
        fsync_folder(self.path)
        return freed

    def _change_metadata(self) -> None:
        """Change the metadata, the dataset card and the plan record."""
        store = Store(self.path)
        left = {array.name: array for array in self.left(store)}
        if left != store.arrays:
            with _rewriting(self.path / "zarr.json") as metadata:
                metadata["attributes"][ATTRIBUTE] = self._content(store, left)
                members = metadata.get("consolidated_metadata", {}).get("metadata", {})
                for name in [name for name in members if name in store.arrays]:
                    if name in left:
                        _set_layers(members[name], left[name])
                    else:
                        del members[name]
        for name in {name for name, _ in self.keys} & set(left):
            with _rewriting(self.path / name / "zarr.json") as metadata:
                _set_layers(metadata, left[name])
        content = read_attributes(self.path)
        text = card(self.path.resolve().name, list(left.values()), plan_facts(content["plan"]), content)
        write_durably(self.path / "README.md", text.encode())
        whole = {f"{name}/zarr.json" for name, _ in self.keys if name not in left}
        write_plan_record(self.path, [name for name in read_plan_record(self.path) if name not in whole])

    def _content(self, store: Store, left: Mapping[str, ArraySpec]) -> dict[str, Any]:
        given, arrays = read_attributes(self.path), list(left.values())
        content = add_history(given, {PAST[self.kind]: by_array(self.keys)})
        spec = narrow_spec(store, arrays)
        if self.keep is not None:
            spec = spec.model_copy(update={"keep": keep_of(arrays, self.keep, spec.keep_dtype)})
        plan = dict(content["plan"])
        if "files" in plan:
            plan["files"] = store.n_units * sum(len(array.slices) for array in arrays)
        if "bytes" in plan:
            plan["bytes"] = total_bytes(arrays, store.n_rows, store.shard_rows)
        changed = {
            "schema": schema_of(arrays),
            "spec": changed_spec(given["spec"], spec),
            "arrays": {name: array.to_json() for name, array in left.items()},
            "plan": plan,
        }
        return {**content, **changed}

    def _change_records(self) -> None:
        """Remove from the ledger records what the store does not have any more."""
        folders = tuple(shard_folder(*key) for key in self.keys)
        for record in Store(self.path).ledger:
            files, virtual = record.files, record.virtual
            if self.kind != "fill":
                files = {name: file for name, file in files.items() if not name.startswith(folders)}
            if self.kind != "thin":
                virtual = {name: held for name, held in virtual.items() if not name.startswith(folders)}
            if (len(files), len(virtual)) != (len(record.files), len(record.virtual)):
                Store(self.path).ledger.commit(replace(record, files=files, virtual=virtual))

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

    def _is_applied(self) -> bool:
        arrays = Store(self.path).arrays
        return not (self.path / NOTE).exists() and [*arrays.values()] == self.left(Store(self.path))

    def _changed(self, array: ArraySpec) -> ArraySpec | None:
        """Return an array after the change; None if nothing of it is left."""
        changed = {layer for name, layer in self.keys if name == array.name}
        if array.layers is None:
            return None if None in changed else array
        numbers = {layer for layer in changed if layer is not None}
        layers, virtual = set(array.layers), set(array.virtual)
        moved = numbers & {*layers, *virtual}
        layers, virtual = layers - numbers, virtual - numbers
        if self.kind == "thin":
            virtual |= moved
        elif self.kind == "fill":
            layers |= moved
        if not layers and not virtual:
            return None
        return replace(array, layers=tuple(sorted(layers)), virtual=tuple(sorted(virtual)))

    def _folders(self) -> list[Path]:
        """Return the folders to delete: those of layers, and of arrays without layers left."""
        if self.kind == "fill":
            return []
        whole: set[str] = set()
        if self.kind == "remove":
            known = set(captured_keys(Store(self.path).arrays.values()))
            whole = {name for name, _ in self.keys if not any(n == name for n, _ in known - set(self.keys))}
        layers = [self.path / name / "c" / str(layer) for name, layer in self.keys if name not in whole]
        return [folder for folder in [*(self.path / name for name in sorted(whole)), *layers] if folder.exists()]


def check_alone(path: Path, worker: Worker, claims: Claiming, held: bool = False) -> None:
    """Claim the change of a store, unless it is *held*; raise StoreError if another process fills or changes it."""
    worker.sweep()
    if not (held or claims.take_claim(["change"])) or next(iter(claims.others()), None):
        raise StoreError(
            "another process fills the store, or changes it",
            where=str(path),
            remedy="wait until it has ended, or stop it, then run the same command again; if it died on another"
            f" machine, delete {path / CLAIMS} first",
        )


def unfinished_error(change: LayerChange) -> StoreError:
    """Return the error for a change that was interrupted, where another one was asked for."""
    command = "flexcache rm" if change.kind == "remove" else f"flexcache {change.kind}"
    return StoreError(
        "an earlier change of the store was interrupted",
        where=str(change.path / NOTE),
        found=f"layers to {change.kind}: {_text(change.keys)}",
        remedy=f"run {command} to finish it, then give this command again",
    )


def describe_note(store: Store) -> str:
    """Return what is unfinished in a store that has the note of a change, and the command that finishes it."""
    try:
        change = LayerChange.read_note(Path(str(store.path)))
    except DamagedError as error:
        return f"cannot be read: {error.found or error.message}"
    command = "rm" if change is None or change.kind == "remove" else change.kind
    return f"a change of the layers is unfinished: run flexcache {command} to finish it"


def _text(keys: Collection[ArrayKey]) -> str:
    return "; ".join(f"{name} {', '.join(map(str, layers or []))}".strip() for name, layers in by_array(keys).items())


@contextmanager
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
