"""A guide at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..active_set import ActiveSet

__all__ = ["Summary"]


class Row(NamedTuple):
    site: str
    shape: tuple[int, ...]
    active: int
    density: float
    bytes: int
    autonormal_bytes: int


@dataclass(frozen=True)
class Summary:
    """A table of a guide's sites; print it.

    Bytes are those of loc, scale and, for a sparse site, its indices; an optimizer adds its own.
    """

    rows: tuple[Row, ...]

    @classmethod
    def of(cls, active_sets: Mapping[str, ActiveSet], element_size: int) -> Summary:
        return cls(
            tuple(
                Row(
                    name,
                    tuple(active.shape),
                    len(active),
                    active.density,
                    len(active) * (2 * element_size + (0 if active.is_full else 8)),
                    active.numel() * 2 * element_size,
                )
                for name, active in active_sets.items()
            )
        )

    @property
    def total(self) -> Row:
        active = sum(row.active for row in self.rows)
        return Row(
            "total",
            (),
            active,
            active / max(sum(row.active / row.density for row in self.rows), 1),
            sum(row.bytes for row in self.rows),
            sum(row.autonormal_bytes for row in self.rows),
        )

    def __str__(self) -> str:
        header = ("site", "shape", "active", "density", "bytes", "AutoNormal")
        lines = [header]
        for row in (*self.rows, self.total):
            shape = " x ".join(map(str, row.shape))
            lines.append(
                (
                    row.site,
                    shape,
                    f"{row.active:,}",
                    f"{row.density:.2%}",
                    f"{row.bytes:,}",
                    f"{row.autonormal_bytes:,}",
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        rule = "-" * max(map(len, text))
        return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])

    __repr__ = __str__
