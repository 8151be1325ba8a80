"""Small tables, for terminals and notebooks."""

from __future__ import annotations

from html import escape
from typing import ClassVar

__all__ = ["Table"]


class Table:
    """What prints as a table: subclasses give its lines.

    :cvar left: number of first columns that are aligned to the left.
    :cvar has_total: whether the last line stands below a rule.
    """

    left: ClassVar[int] = 1
    has_total: ClassVar[bool] = False

    def _lines(self) -> list[tuple[str, ...]]:
        """The heading, and the cells of each line."""
        raise NotImplementedError

    def __str__(self) -> str:
        lines = self._lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.ljust(width) if i < self.left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        rule = "-" * max(map(len, text))
        if self.has_total:
            text.insert(-1, rule)
        return "\n".join([text[0], rule, *text[1:]])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """For notebooks."""

        def row(tag: str, line: tuple[str, ...]) -> str:
            numbers = ' style="text-align: right; padding-left: 1em"'
            cells = enumerate(map(escape, line))
            return "".join(
                f"<{tag}{numbers * (i >= self.left)}>{cell}</{tag}>" for i, cell in cells
            )

        head, *body = self._lines()
        lines = "".join(f"<tr>{row('td', line)}</tr>" for line in body)
        return f"<table><thead><tr>{row('th', head)}</tr></thead><tbody>{lines}</tbody></table>"
