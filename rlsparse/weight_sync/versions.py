"""The folder between a trainer and its receivers: names of files, and what they say of themselves.

``anchor-000010/`` is version 10, whole; ``version-000011.patch.safetensors`` leads to version 11
from the one before. Where each of n workers holds a part of the weights it writes it on its own,
``anchor-000010/part-1-of-4.safetensors`` and ``version-000011.part-1-of-4.patch.safetensors``, and
a version is there once the parts of all are. A file appears whole or not at all.
"""

import re
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from rlsparse.errors import CheckpointError, PatchError
from rlsparse.tensor_file import SINGLE_FILE

_PATCH = re.compile(r"version-(\d{6,})(?:\.part-(\d+)-of-(\d+))?\.patch\.safetensors")
_ANCHOR = re.compile(r"anchor-(\d{6,})")
_ANCHOR_PART = re.compile(r"part-(\d+)-of-(\d+)\.safetensors")

Part = tuple[int, int]
"""Number of a worker, from 1, and how many there are; (1, 1) is all."""


@dataclass(frozen=True)
class Notes:
    """What a file of the folder says of itself, in its metadata.

    Attributes:
        version: that it leads to, or is.
        base_version: that a patch starts from; of an anchor its own.
        stream: random id of the run that wrote it; versions of two runs do not mix.
        part: of which worker it is.
    """

    version: int
    base_version: int
    stream: str
    part: Part

    def metadata(self) -> dict[str, str]:
        """As it is stored."""
        number, count = self.part
        return {
            "version": str(self.version),
            "base_version": str(self.base_version),
            "stream": self.stream,
            "part": f"{number}-of-{count}",
        }

    @classmethod
    def of(cls, path: Path, metadata: dict[str, str]) -> "Notes":
        """The way back.

        Raises:
            PatchError: ``path`` says nothing of the kind.
        """
        try:
            number, count = map(int, metadata["part"].split("-of-"))
            versions = int(metadata["version"]), int(metadata["base_version"])
            return cls(*versions, metadata["stream"], (number, count))
        except (KeyError, ValueError) as error:
            raise PatchError(
                f"{path} does not say which version it is of ({error!r}): give a file that a "
                "PatchWriter wrote"
            ) from error


@dataclass(frozen=True)
class VersionFolder:
    """What lies in the folder, looked up anew at each call; files of other names are left alone."""

    path: Path

    def patch_file(self, version: int, part: Part = (1, 1)) -> Path:
        """Where a worker writes the patch to a version."""
        return self.path / f"version-{version:06d}{_suffix('.', part)}.patch.safetensors"

    def anchor(self, version: int) -> Path:
        """Folder of an anchor."""
        return self.path / f"anchor-{version:06d}"

    def anchor_file(self, version: int, part: Part = (1, 1)) -> Path:
        """Where a worker writes an anchor."""
        name = SINGLE_FILE if part[1] == 1 else f"{_suffix('', part)}.safetensors"
        return self.anchor(version) / name

    def patches(self) -> dict[int, list[Path]]:
        """Version -> the files that lead to it, in order of parts; only those that are all there.

        Raises:
            CheckpointError: there is no such folder.
        """
        found: dict[int, dict[Part, Path]] = defaultdict(dict)
        for file in self._files():
            if match := _PATCH.fullmatch(file.name):
                found[int(match[1])][int(match[2] or 1), int(match[3] or 1)] = file
        return _complete(found)

    def anchors(self) -> dict[int, list[Path]]:
        """Version -> the files with its weights, likewise.

        Raises:
            CheckpointError: as ``patches``.
        """
        found: dict[int, dict[Part, Path]] = {}
        for version, folder in self._anchor_folders().items():
            whole = folder / SINGLE_FILE
            parts: dict[Part, Path] = {(1, 1): whole} if whole.is_file() else {}
            for file in folder.iterdir():
                if match := _ANCHOR_PART.fullmatch(file.name):
                    parts[int(match[1]), int(match[2])] = file
            found[version] = parts
        return _complete(found)

    def _anchor_folders(self) -> dict[int, Path]:
        matches = ((_ANCHOR.fullmatch(file.name), file) for file in self._files())
        return {int(match[1]): file for match, file in matches if match and file.is_dir()}

    def last(self) -> int:
        """The highest version of which there is any file, whole or not; -1 without one."""
        matches = (_PATCH.fullmatch(file.name) for file in self._files())
        return max([-1, *self._anchor_folders(), *(int(match[1]) for match in matches if match)])

    def clean(self, num_anchors: int) -> None:
        """Delete all that is older than the last ``num_anchors`` anchors and what follows them."""
        first = min([*self.anchors()][-num_anchors:], default=0)
        for file in self._files():
            match = _PATCH.fullmatch(file.name)
            if match and int(match[1]) <= first:
                file.unlink(missing_ok=True)
        for version, folder in self._anchor_folders().items():
            if version < first:
                for file in folder.iterdir():
                    file.unlink(missing_ok=True)
                folder.rmdir()

    def drop(self, version: int, part: Part) -> None:
        """Delete what a worker wrote of a version that failed."""
        self.patch_file(version, part).unlink(missing_ok=True)
        self.drop_anchor(version)

    def drop_anchor(self, version: int) -> None:
        """Delete an anchor, or what there is of it."""
        shutil.rmtree(self.anchor(version), ignore_errors=True)

    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            raise CheckpointError(
                f"there is no folder {self.path}; give the one that a PatchWriter writes"
            )
        return [*self.path.iterdir()]


def _suffix(dot: str, part: Part) -> str:
    number, count = part
    return "" if count == 1 else f"{dot}part-{number}-of-{count}"


def _complete(found: dict[int, dict[Part, Path]]) -> dict[int, list[Path]]:
    """Of each version the files of one split into parts that are all there, oldest first."""
    whole: dict[int, list[Path]] = {}
    for version, files in sorted(found.items()):
        for count in sorted({count for _, count in files}):
            parts = [files.get((number, count)) for number in range(1, count + 1)]
            if None not in parts:
                whole[version] = [file for file in parts if file]
    return whole
