"""Where the files of a study lie: a local folder or any URL that pyarrow knows.

Every file is written all or nothing: under a temporary name and renamed on a local disk, as one
object on an object store. A folder of files is done when its marker ``_SUCCESS`` is there; the
marker lists the files with sizes and hashes and is written last.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from pyarrow import fs

from rlsparse.errors import StorageError

MARKER = "_SUCCESS"
LOCK = "driver.lock"
_PIECE_BYTES = 2**24


class Storage:
    """Files below one URL or local folder; pickles as its URL.

    Args:
        url: a folder, or a URL such as ``s3://bucket/prefix``.
    """

    def __init__(self, url: str) -> None:
        self.url = url if "://" in url else str(Path(url).expanduser().resolve())

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        """Pickle as the URL."""
        return Storage, (self.url,)

    @cached_property
    def _root(self) -> tuple[fs.FileSystem, str]:
        if "://" not in self.url:
            return fs.LocalFileSystem(), self.url
        try:
            filesystem, root = fs.FileSystem.from_uri(self.url)
        except (OSError, ValueError) as error:
            raise StorageError(
                f"cannot use storage {self.url}: {error}; give a folder, or a URL that pyarrow "
                "knows, such as s3://bucket/prefix or file:///shared/folder"
            ) from error
        return filesystem, root

    @property
    def is_local(self) -> bool:
        """Whether the files lie on a disk of this machine (or one mounted here)."""
        return isinstance(self._root[0], fs.LocalFileSystem)

    def sub(self, name: str) -> "Storage":
        """The storage one folder down."""
        return Storage(f"{self.url.rstrip('/')}/{name}")

    def path(self, name: str) -> str:
        """Full path of a file, for the file system that holds it."""
        return f"{self._root[1]}/{name}"

    def exists(self, name: str) -> bool:
        """Whether a file or folder is there."""
        kind = self._root[0].get_file_info(self.path(name)).type
        return bool(kind != fs.FileType.NotFound)

    def list(self, name: str) -> list[str]:
        """Names of what lies directly in a folder, sorted; empty if there is no such folder.

        Raises:
            StorageError: it cannot be listed.
        """
        try:
            found = self._root[0].get_file_info(
                fs.FileSelector(self.path(name), allow_not_found=True, recursive=False)
            )
        except OSError as error:
            raise StorageError(f"cannot list {self.url}/{name}: {error}") from error
        return sorted(info.base_name for info in found if not info.base_name.startswith("."))

    def read_bytes(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            StorageError: it is not there or cannot be read.
        """
        try:
            with self._root[0].open_input_stream(self.path(name)) as stream:
                return bytes(stream.read())
        except OSError as error:
            raise StorageError(f"cannot read {self.url}/{name}: {error}") from error

    def read_json(self, name: str) -> Any:
        """Content of a JSON file.

        Raises:
            StorageError: it is not there, or no JSON.
        """
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise StorageError(
                f"{self.url}/{name} is damaged ({error}); delete it and run the study again"
            ) from error

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file, all or nothing, and the folders above it.

        Raises:
            StorageError: it cannot be written.
        """
        self._write(name, io.BytesIO(content))

    def put(self, file: Path, name: str) -> None:
        """Copy a local file here, of any size, all or nothing.

        Raises:
            StorageError: it cannot be written.
        """
        with file.open("rb") as source:
            self._write(name, source)

    def get(self, name: str, file: Path) -> None:
        """Copy a file of any size from here to a local one, and make the folders above that.

        Raises:
            StorageError: it is not there or cannot be read.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._root[0].open_input_stream(self.path(name)) as source, file.open("wb") as to:
                shutil.copyfileobj(source, to, _PIECE_BYTES)
        except OSError as error:
            raise StorageError(f"cannot read {self.url}/{name}: {error}") from error

    def _write(self, name: str, source: BinaryIO) -> None:
        target = self.path(name)
        filesystem = self._root[0]
        try:
            filesystem.create_dir(os.path.dirname(target), recursive=True)
            if not self.is_local:
                with filesystem.open_output_stream(target) as stream:
                    shutil.copyfileobj(source, stream, _PIECE_BYTES)
                return
            folder, base = os.path.split(target)
            temporary = f"{folder}/.{base}.{uuid.uuid4().hex}"
            try:
                with open(temporary, "wb") as file:
                    shutil.copyfileobj(source, file, _PIECE_BYTES)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
        except OSError as error:
            raise StorageError(
                f"cannot write {self.url}/{name}: {error.strerror or error}; free space, or choose "
                "another folder with --storage"
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, all or nothing."""
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
        self.write_bytes(name, text.encode())

    def delete(self, name: str) -> None:
        """Delete a file if it is there."""
        if self.exists(name):
            self._root[0].delete_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        """Delete a folder and all in it, if it is there."""
        if self.exists(name):
            self._root[0].delete_dir(self.path(name))

    # --- folders that are done when their marker is there ------------------------------------

    def publish(self, folder: Path, name: str) -> None:
        """Copy a local folder to ``name`` and mark it as done, the marker last."""
        files = {}
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            relative = file.relative_to(folder).as_posix()
            content = file.read_bytes()
            self.write_bytes(f"{name}/{relative}", content)
            files[relative] = {
                "size_bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        self.write_json(f"{name}/{MARKER}", {"files": files})

    def is_done(self, name: str) -> bool:
        """Whether a folder is complete: its marker is there and every file has its size."""
        if not self.exists(f"{name}/{MARKER}"):
            return False
        files = self.read_json(f"{name}/{MARKER}")["files"]
        found = self._root[0].get_file_info([self.path(f"{name}/{file}") for file in files])
        return all(
            info.type == fs.FileType.File and info.size == entry["size_bytes"]
            for info, entry in zip(found, files.values(), strict=True)
        )

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A local path of a file or folder: itself on a local disk, else a temporary copy."""
        if self.is_local:
            yield Path(self.path(name))
            return
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / Path(name).name
            filesystem = self._root[0]
            if filesystem.get_file_info(self.path(name)).type == fs.FileType.Directory:
                target.mkdir()
            fs.copy_files(
                self.path(name),
                str(target),
                source_filesystem=filesystem,
                destination_filesystem=fs.LocalFileSystem(),
            )
            yield target

    # --- one driver a study --------------------------------------------------------------------

    def check_writable(self) -> None:
        """Write, read back and delete a file.

        Raises:
            StorageError: one of the three fails.
        """
        name, content = f".probe-{uuid.uuid4().hex}", uuid.uuid4().bytes
        created = not self.exists("")
        try:
            self.write_bytes(name, content)
            if self.read_bytes(name) != content:
                raise StorageError(f"storage {self.url} does not give back what was written to it")
            self.delete(name)
        except StorageError:
            if created and self.is_local:
                shutil.rmtree(self._root[1], ignore_errors=True)
            raise

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other drivers off this study; the system frees the lock of a process that dies.

        Object stores have no locks in pyarrow, so there nothing is locked.

        Raises:
            StorageError: another driver is at work.
        """
        if not self.is_local:
            yield
            return
        path = Path(self.path(LOCK))
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path, self.url) as file:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty: the study has begun
                    path.parent.rmdir()

    def is_locked(self) -> bool:
        """Whether a driver is at work; always True where nothing can be locked."""
        if not self.is_local:
            return True
        path = Path(self.path(LOCK))
        if not path.exists():
            return False
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def _locked(path: Path, url: str) -> TextIO:
    """The lock file, open and locked."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder deletes the file at the end: lock the one that is there now.
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "just started"
            file.close()
            raise StorageError(
                f"another driver is at work on {url}: {holder}; wait for it, or stop it"
            ) from None
        file.close()
