"""Where bytes come from: local files, fsspec URLs read by ranges, and repositories of a hub.

A *file* is a local ``Path`` or a ``RemoteFile``; both pickle and hold no handle. A *folder* finds
files by name: ``LocalFolder``, ``UrlFolder`` or ``HubFolder`` (which downloads what is found into
the cache of huggingface_hub). fsspec, aiohttp and huggingface_hub are imported when they are used.
"""

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from rlsparse.errors import CheckpointError

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
"""How long an http(s) server may take to answer, and between two packets of an answer."""

PICKLED_SUFFIXES = (".bin", ".pt", ".pth")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\S+))?")

_UNREACHABLE = (
    "; no folder {repo} is here, the hub cannot be reached, and not all of it is in the local "
    "cache: check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
)

_ROOTS = {
    "aiohttp": "ClientError",
    "botocore.exceptions": "BotoCoreError",
    "gcsfs.retry": "HttpError",
    "google.auth.exceptions": "GoogleAuthError",
    "httpx": "HTTPError",
    "httpx2": "HTTPError",
}
"""Root of what each library behind fsspec and the hub raises besides OSError and ValueError."""


@dataclass(frozen=True)
class RemoteFile:
    """A file behind an fsspec URL."""

    url: str
    size_bytes: int

    def __str__(self) -> str:
        """The URL without password and query."""
        return _without_secrets(self.url)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return _url_name(self.url)


File = Path | RemoteFile


class Folder(Protocol):
    """Finds files by name."""

    @property
    def note(self) -> str:
        """Why files may seem absent though they are not (no network): the end of a message."""

    @property
    def path(self) -> Path | str:
        """Where the files lie: a local folder, or a URL without secrets."""

    def find(self, name: str) -> File | None:
        """The file ``name``, or None if there is none.

        Raises:
            CheckpointError: that cannot be found out.
        """

    def names(self) -> list[str]:
        """Names of files and folders inside, sorted; nothing where they cannot be listed."""

    def inner(self, name: str) -> "Folder":
        """The folder ``name`` inside."""


@contextmanager
def opened(file: File) -> Iterator[io.FileIO]:
    """An unbuffered stream over a file; the block holds nothing but reading.

    Never a memory map: a file that shrinks meanwhile would end the process.

    Raises:
        CheckpointError: it cannot be opened or read, or a server does not answer in time.
    """
    try:
        with file.open("rb", buffering=0) if isinstance(file, Path) else _remote(file) as stream:
            yield stream
    except CheckpointError:
        raise
    except _failures() as error:
        raise CheckpointError(f"cannot read {file}: {_reason(error)}") from error


def fill(stream: io.FileIO, buffer: memoryview, file: File) -> None:
    """Read until ``buffer`` (bytes) is full; a CheckpointError if the file ends before."""
    while buffer:
        count = stream.readinto(buffer)
        if not count:
            raise CheckpointError(f"{file} was truncated while it was read: save it again")
        buffer = buffer[count:]


def read_bytes(file: File, limit: int) -> bytes:
    """All of a small file.

    Raises:
        CheckpointError: unreadable, or longer than ``limit`` bytes.
    """
    with opened(file) as stream:
        size = stream.seek(0, io.SEEK_END)
        if size > limit:
            raise CheckpointError(f"{file} is damaged: {size} bytes, at most {limit} expected")
        stream.seek(0)
        content = bytearray(size)
        fill(stream, memoryview(content), file)
    return bytes(content)


def locate(place: str | Path) -> File | Folder:
    """What a user means by a path, an fsspec URL, or a hub id ``org/name`` with ``@revision``.

    A hub id is one only where no local path has that name. A URL means a file if it ends like
    weights (.safetensors, .bin, .pt, .pth) or data (.jsonl, .csv, .parquet), else a folder.

    Raises:
        CheckpointError: nothing there, or it cannot be read.
    """
    text = os.fspath(place)
    if text.startswith("file://"):
        text = text.removeprefix("file://").removeprefix("localhost")
    elif _URL.match(text):
        name = _url_name(text)
        is_file = name.endswith((".safetensors", *PICKLED_SUFFIXES, ".jsonl", ".csv", ".parquet"))
        return _remote_file(text) if is_file else UrlFolder(text)
    path = Path(text)
    try:
        if path.is_dir():
            return LocalFolder(path)
        if path.is_file():
            return path
        if path.exists():
            raise CheckpointError(f"{path} is neither a file nor a folder")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {_reason(error)}") from error
    if isinstance(place, str) and (hub_id := _HUB_ID.fullmatch(text)):
        return _hub_folder(hub_id["repo"], hub_id["revision"])
    raise CheckpointError(
        f"no checkpoint at {path}: no such file or folder; give a path, a hub id org/name or "
        "org/name@revision, or a URL such as s3://bucket/folder"
    )


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine."""

    path: Path
    note: str = ""

    def find(self, name: str) -> Path | None:
        """See ``Folder.find``."""
        file = self.path / name
        try:
            return file if file.is_file() else None
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {_reason(error)}") from error

    def names(self) -> list[str]:
        """See ``Folder.names``."""
        try:
            return sorted(os.listdir(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {_reason(error)}") from error

    def inner(self, name: str) -> "LocalFolder":
        """See ``Folder.inner``."""
        return LocalFolder(self.path / name)


@dataclass(frozen=True)
class UrlFolder:
    """A folder behind an fsspec URL; files are read by byte ranges, nothing is written to disk."""

    url: str
    note: str = ""

    @property
    def path(self) -> str:
        """See ``Folder.path``."""
        return _without_secrets(self.url)

    def find(self, name: str) -> RemoteFile | None:
        """See ``Folder.find``."""
        try:
            return _remote_file(self.inner(name).url)
        except CheckpointError as error:
            if isinstance(error.__cause__, FileNotFoundError) and _is_absence(error.__cause__):
                return None
            raise

    def names(self) -> list[str]:
        """See ``Folder.names``. Web servers list nothing: their pages are made for people."""
        if _is_http(self.url):
            return []
        try:
            system, path = _file_system(self.url)
            listed = system.ls(path, detail=False)
        except FileNotFoundError:
            return []
        except _failures() as error:
            raise CheckpointError(f"cannot list {self.path}: {_reason(error)}") from error
        return sorted(PurePosixPath(entry).name for entry in listed)

    def inner(self, name: str) -> "UrlFolder":
        """See ``Folder.inner``."""
        base, mark, query = self.url.partition("?") if _is_http(self.url) else (self.url, "", "")
        step = quote(name) if _is_http(self.url) else name
        return UrlFolder(f"{base.rstrip('/')}/{step}{mark}{query}")


@dataclass
class HubFolder:
    """A model repository of the hub, or a folder in it. What is found is downloaded and cached.

    All files are of one commit. HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE mean what they
    mean to huggingface_hub.

    Attributes:
        repo: ``org/name``.
        revision: branch, tag or commit; None is the default branch.
        listed: all files of the repository; None: the hub is out of reach, the cache is read.
        prefix: path of the folder, ending with a slash, or nothing.
    """

    repo: str
    revision: str | None
    listed: tuple[str, ...] | None
    prefix: str = ""
    _root: Path | None = None

    @property
    def note(self) -> str:
        """See ``Folder.note``."""
        return _UNREACHABLE.format(repo=self.repo) if self.listed is None else ""

    @property
    def path(self) -> Path | str:
        """The folder in the local cache once a file was found, before that the hub id."""
        return self._root / self.prefix if self._root else self.repo

    def find(self, name: str) -> Path | None:
        """See ``Folder.find``; downloads the file, or finds it in the cache."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        inside = self.prefix + name
        offline = self.listed is None
        if not offline and inside not in (self.listed or ()):
            return None
        try:
            found = hf_hub_download(
                self.repo, inside, revision=self.revision, local_files_only=offline
            )
        except LocalEntryNotFoundError as error:
            if offline:
                return None
            raise CheckpointError(f"the hub broke off at {self.repo}: {_reason(error)}") from error
        except _failures() as error:
            raise CheckpointError(_explain_hub(self.repo, self.revision, error)) from error
        root = Path(found).parents[inside.count("/")]
        if root != (self._root or root):
            raise CheckpointError(f"{self.repo} was changed while it was downloaded: try again")
        self._root = root
        return Path(found)

    def names(self) -> list[str]:
        """See ``Folder.names``."""
        inside = (file for file in self.listed or () if file.startswith(self.prefix))
        return sorted({file.removeprefix(self.prefix).split("/")[0] for file in inside})

    def inner(self, name: str) -> "HubFolder":
        """See ``Folder.inner``."""
        return replace(self, prefix=f"{self.prefix}{name}/")


def _hub_folder(repo: str, revision: str | None) -> HubFolder:
    from huggingface_hub import errors, model_info

    try:
        info = model_info(repo, revision=revision, timeout=CONNECT_TIMEOUT_S)
    except _failures() as error:
        status = getattr(getattr(error, "response", None), "status_code", 500)
        if status < 500 or isinstance(error, errors.HFValidationError):
            raise CheckpointError(_explain_hub(repo, revision, error)) from error
        return HubFolder(repo, revision, None)
    return HubFolder(repo, revision, tuple(file.rfilename for file in info.siblings or ()))


def _explain_hub(repo: str, revision: str | None, error: BaseException) -> str:
    from huggingface_hub import errors

    what = f"cannot read {repo} from the hub"
    login = "log in with `hf auth login` or set HF_TOKEN"
    match error:
        case errors.GatedRepoError():
            return f"{what}: gated; ask for access at https://huggingface.co/{repo}, then {login}"
        case errors.RepositoryNotFoundError():
            return f"{what}: no such model there, and no such folder here; or, private: {login}"
        case errors.RevisionNotFoundError():
            return f"{what}: it has no branch, tag or commit {revision}"
    return f"{what}: {_reason(error)}"


@contextmanager
def _remote(file: RemoteFile) -> Iterator[Any]:
    system, path = _file_system(file.url)
    known = {"size": file.size_bytes} if _is_http(file.url) else {}  # saves a request
    with system.open(path, "rb", cache_type="none", **known) as stream:
        # memory:// hands out one object to all, and two threads would share its position.
        yield io.BytesIO(stream.getvalue()) if isinstance(stream, io.BytesIO) else stream


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    options: dict[str, Any] = {}
    if _is_http(url):
        import aiohttp

        limits = {"sock_connect": CONNECT_TIMEOUT_S, "sock_read": READ_TIMEOUT_S}
        options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, **limits)}}
    system, path = fsspec.core.url_to_fs(url, **options)
    return system, path


def _remote_file(url: str) -> RemoteFile:
    shown = _without_secrets(url)
    try:
        system, path = _file_system(url)
        info = system.info(path)
        if info["type"] != "file":
            raise FileNotFoundError(url)
    except _failures() as error:
        raise CheckpointError(f"cannot read {shown}: {_reason(error)}") from error
    if info["size"] is None:
        raise CheckpointError(f"cannot read {shown}: the server does not say how long it is")
    return RemoteFile(url, info["size"])


def _is_absence(error: FileNotFoundError) -> bool:
    """Whether the file is not there, as fsspec says so of every http failure."""
    cause = error.__cause__
    return cause is None or getattr(cause, "status", None) in (404, 410)


def _failures() -> tuple[type[BaseException], ...]:
    """What reading may raise; a library that is not loaded raises nothing."""
    loaded = [(sys.modules[name], root) for name, root in _ROOTS.items() if name in sys.modules]
    return (OSError, ValueError, ImportError, *(getattr(*pair) for pair in loaded))


def _reason(error: BaseException) -> str:
    """One line, without query strings."""
    while isinstance(error, FileNotFoundError) and error.__cause__:
        error = error.__cause__
    if isinstance(error, TimeoutError):
        return "the server did not answer in time; check the address and try again"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if "support range requests" in text:
        return "the server sends no parts of files; download it and give the folder"
    return re.sub(r"\?\S*", "", " ".join(text.split())) or type(error).__name__


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _url_name(url: str) -> str:
    return PurePosixPath(urlsplit(url).netloc + urlsplit(url).path).name


def _without_secrets(url: str) -> str:
    return re.sub(r"^(?!hf:)([^/]*//)[^/]*@", r"\1", url).partition("?")[0]
