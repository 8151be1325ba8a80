"""Files that are there whole or not at all, and in which no code can run.

A file is one line (name, version, checksum), then what ``torch.save`` makes of plain containers,
numbers, strings and tensors. It is read with ``weights_only=True``, after a look at its parts.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from .plain_data import check_plain

try:
    import fcntl
except ImportError:  # Windows refuses to rename what another process has open
    fcntl = None  # type: ignore[assignment]

__all__ = ["Format"]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    :ivar name: its files' first words.
    :ivar version: what is written; all versions up to this one are read.
    :ivar expected: what to use instead of a file that is of no such kind.
    """

    name: str
    version: int
    expected: str

    def write(self, path: str | os.PathLike, state: dict[str, Any]) -> None:
        """Write so that ``path`` is at every moment the old file or the new one, whole.

        Processes that write to one path at once do so one after the other. A link stays a link.

        :raises OSError: if it cannot be written; then the old file is left.
        """
        path = os.path.realpath(os.fsdecode(path))
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(f"{path} is not a file: expected the path of one to write")
        buffer = io.BytesIO()
        torch.save(state, buffer)
        payload = buffer.getvalue()
        # Always the same name: what a killed process left is overwritten, and does not pile up.
        aside = path + ".part"
        with _alone(aside):
            try:
                with open(aside, "wb") as file:
                    file.write(self._header(state["version"], payload))
                    file.write(payload)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(aside, path)
            except BaseException:
                with suppress(OSError):
                    os.remove(aside)
                raise
        if os.name == "posix":  # the new name has to reach the disk, too
            directory = os.open(os.path.dirname(path), os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def _header(self, version: int, payload: bytes) -> bytes:
        return f"{self.name} {version} sha256 {hashlib.sha256(payload).hexdigest()}\n".encode()

    def read(self, path: str | os.PathLike, map_location: Any = None) -> dict[str, Any]:
        """The state in a file.

        :param map_location: as for :func:`torch.load`.
        :raises ValueError: if it is not a whole file of this kind, or one of a newer version.
        """
        return self.parse(self.content(path), path, map_location)

    def content(self, path: str | os.PathLike) -> bytes:
        """The bytes of a file of this kind, for :meth:`parse`.

        :raises ValueError: if it is of another kind; then no more than its first bytes are read.
        """
        with open(path, "rb") as file:
            start = file.read(len(self.name))
            self._check_kind(start, path)
            return start + file.read()

    def _check_kind(self, start: bytes, path: str | os.PathLike) -> None:
        if start != self.name.encode():
            raise ValueError(f"{path} is not a {self.name}: expected {self.expected}")

    def parse(
        self, content: bytes, path: str | os.PathLike, map_location: Any = None
    ) -> dict[str, Any]:
        """The state in a file's content; ``path`` is for messages."""
        self._check_kind(content[: len(self.name)], path)
        file = io.BytesIO(content)
        header, payload = file.readline(256), file.read()
        words = header[len(self.name) :].decode(errors="replace").split()
        if not words:
            raise ValueError(f"{path} is not a {self.name}: expected {self.expected}")
        version = self.check_version(words[0], str(path))
        if header != self._header(version, payload):
            raise ValueError(
                f"{path} is not a complete {self.name} (checksum differs): use an older one"
            )
        try:
            size, memory = _check_archive(payload)
            state = torch.load(io.BytesIO(payload), map_location=map_location, weights_only=True)
            # In a pickle each item takes a byte or more, but for what is written once for several.
            check_plain(state, 8 * size, memory)
            if not isinstance(state, dict) or state.get("version") != version:
                raise ValueError("its state is not of the version that its first line tells")
        except pickle.UnpicklingError as error:  # torch's words are about its own settings
            raise ValueError(
                f"{path} cannot be read: it is damaged, or has more than numbers, strings and "
                "tensors"
            ) from error
        except Exception as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        return state

    def check_version(self, version: Any, source: str) -> int:
        """The version as a number.

        :raises ValueError: if it is none, or one that only a newer pyro_ssvi can read.
        """
        if not re.fullmatch("[1-9][0-9]{,8}", str(version)):
            raise ValueError(f"{source} is not a {self.name}: its version is {version!r}")
        if int(version) > self.version:
            kind = self.name.split()[-1]
            raise ValueError(
                f"{source} was saved by a newer pyro_ssvi ({kind} version {version}, this one "
                f"reads up to {self.version}): upgrade pyro_ssvi"
            )
        return int(version)


@contextmanager
def _alone(path: str) -> Iterator[None]:
    """Make a file that no other process or thread writes meanwhile.

    :raises OSError: if it never is the file that was made.
    """
    if fcntl is None:
        yield
        return
    for _ in range(100):  # each but the first, after another has written
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            with suppress(OSError):  # of a file system that knows no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            # The one that we waited for may have given the file its new name.
            try:
                same = os.path.samestat(os.fstat(file), os.stat(path))
            except FileNotFoundError:
                same = False
            if same:
                yield
                return
        finally:
            os.close(file)
    raise OSError(
        f"{path} is another file each time one looks, so it cannot be locked: save to another disk"
    )


def _check_archive(payload: bytes) -> tuple[int, int]:
    """Whether an archive has what ``torch.save`` writes, and no more.

    :return: the sizes of its pickle and of all numbers.
    :raises ValueError: for members that are compressed, which could be of any size once they are
        not; that are there twice; or that are of TorchScript, whose code older versions of torch
        run.
    """
    with zipfile.ZipFile(io.BytesIO(payload)) as archive:
        members = archive.infolist()
    if payload[:4] != b"PK\x03\x04" or payload[-22:-18] != b"PK\x05\x06":
        raise ValueError("there is more than an archive in it")
    names = [member.filename for member in members]
    found = [_MEMBER.fullmatch(name) for name in names]
    if not all(found) or len({match[1] for match in found if match}) > 1:
        raise ValueError(f"it is no archive of torch.save: its members are {names[:20]}")
    if len(set(names)) < len(names):
        raise ValueError("it has two members of one name")
    if any(member.compress_type for member in members):
        raise ValueError("its members are compressed")
    size = sum(member.file_size for member in members)
    if size > len(payload):
        raise ValueError("its members are larger than the file")
    pickled = sum(m.file_size for m in members if m.filename.endswith("/data.pkl"))
    return pickled, size - pickled


_MEMBER = re.compile(r"([^/]+)/(data\.pkl|data/\d+|version|byteorder|\.[^/]+(/[^/]+)?)")
