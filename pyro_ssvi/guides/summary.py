"""A guide at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from math import prod
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

    Bytes are those of the guide's parameters and, for a sparse site, its indices; an optimizer
    adds its own.
    """

    rows: tuple[Row, ...]

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
            ("site", "shape", "active", "density", "bytes", "AutoNormal")
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
                )
            )
        return lines

    def __str__(self) -> str:
        lines = self._lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
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

    def _repr_html_(self) -> str:
        """For notebooks."""

        def row(tag: str, line: tuple[str, ...]) -> str:
            numbers = ' style="text-align: right; padding-left: 1em"'  # the first two are words
            cells = enumerate(map(escape, line))
            return "".join(f"<{tag}{numbers * (i > 1)}>{cell}</{tag}>" for i, cell in cells)

        head, *body = self._lines()
        lines = "".join(f"<tr>{row('td', line)}</tr>" for line in body)
        return f"<table><thead><tr>{row('th', head)}</tr></thead><tbody>{lines}</tbody></table>"
