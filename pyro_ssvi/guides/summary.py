"""A guide at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from math import prod
from typing import NamedTuple

from ..active_set import ActiveSet
from ..structures import Structure
from ..tables import Table

__all__ = ["Summary"]


class Row(NamedTuple):
    site: str
    shape: tuple[int, ...]
    active: int
    density: float
    bytes: int
    autonormal_bytes: int
    structure: Structure | None = None


@dataclass(frozen=True, repr=False)
class Summary(Table):
    """A table of a guide's sites; print it.

    Bytes are those of the guide's parameters and, for a sparse site, its indices; an optimizer
    adds its own. Where a site has a structure, there is a column of them.
    """

    rows: tuple[Row, ...]

    left = 2
    has_total = True

    @classmethod
    def of(cls, active_sets: Mapping[str, ActiveSet], row: int, element_size: int) -> Summary:
        """Summarise.

        :param row: bytes of the parameters of one active coordinate.
        :param element_size: bytes of a number.
        """
        return cls(
            tuple(
                Row(
                    name,
                    tuple(active.shape),
                    len(active),
                    active.density,
                    len(active) * (row + (0 if active.is_full else 8)),
                    active.numel() * 2 * element_size,
                    active.structure,
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
            active / max(sum(prod(row.shape) for row in self.rows), 1),
            sum(row.bytes for row in self.rows),
            sum(row.autonormal_bytes for row in self.rows),
        )

    def _lines(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = [
            ("site", "shape", "active", "density", "bytes", "AutoNormal", "structure")
        ]
        for row in (*self.rows, self.total):
            lines.append(
                (
                    row.site,
                    " x ".join(map(str, row.shape)),
                    f"{row.active:,}",
                    f"{row.density:.2%}",
                    f"{row.bytes:,}",
                    f"{row.autonormal_bytes:,}",
                    _as_typed(row.structure),
                )
            )
        if all(row.structure is None for row in self.rows):
            lines = [line[:-1] for line in lines]
        return lines


def _as_typed(structure: Structure | None) -> str:
    """As one writes it: ``Tiles(4, 4)``."""
    if structure is None:
        return ""
    return f"{type(structure).__name__}({', '.join(map(str, astuple(structure)))})"
