"""Files that are there whole or not at all, and in which no code can run.

A file is one line (name, version, checksum), then what ``torch.save`` makes of plain containers,
numbers, strings and tensors. It is read with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from typing import Any

import torch

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
        """Write so that ``path`` is at every moment the old file or the new one, whole."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        payload = buffer.getvalue()
        header = f"{self.name} {state['version']} sha256 {hashlib.sha256(payload).hexdigest()}\n"
        path = os.fspath(path)
        # Always the same name: what a killed process left is overwritten, and does not pile up.
        aside = path + ".part"
        with open(aside, "wb") as file:
            file.write(header.encode())
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        if os.name == "posix":  # the new name has to reach the disk, too
            directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def read(self, path: str | os.PathLike, map_location: Any = None) -> dict[str, Any]:
        """The state in a file.

        :param map_location: as for :func:`torch.load`.
        :raises ValueError: if it is not a whole file of this kind, or one of a newer version.
        """
        with open(path, "rb") as file:
            return self.parse(file.read(), path, map_location)

    def parse(
        self, content: bytes, path: str | os.PathLike, map_location: Any = None
    ) -> dict[str, Any]:
        """The state in a file's content; ``path`` is for messages."""
        file = io.BytesIO(content)
        header, payload = file.readline(256), file.read()
        words = header.decode(errors="replace").removeprefix(self.name).split()
        if not header.startswith(self.name.encode()) or not words:
            raise ValueError(f"{path} is not a {self.name}: expected {self.expected}")
        self.check_version(words[0], str(path))
        if words[1:] != ["sha256", hashlib.sha256(payload).hexdigest()]:
            raise ValueError(
                f"{path} is not a complete {self.name} (checksum differs): use an older one"
            )
        try:
            return torch.load(io.BytesIO(payload), map_location=map_location, weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} cannot be read: {error}") from error

    def check_version(self, version: Any, source: str) -> None:
        """Raise ValueError for what only a newer pyro_ssvi can read."""
        if not str(version).isdecimal():
            raise ValueError(f"{source} is not a {self.name}: its version is {version!r}")
        if int(version) > self.version:
            kind = self.name.split()[-1]
            raise ValueError(
                f"{source} was saved by a newer pyro_ssvi ({kind} version {version}, this one "
                f"reads up to {self.version}): upgrade pyro_ssvi"
            )
