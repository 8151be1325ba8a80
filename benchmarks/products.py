"""What sparse products cost on CPU: whole tiles against single coordinates, and dense ones.

They take turns, round by round; a ratio is the median of those of the rounds::

    python benchmarks/products.py
    python benchmarks/products.py --size 4000 --density 0.05 --tiles 4x4 16x1 --threads 1 --cpu-time
    python benchmarks/products.py --tiles rows columns
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from pyro_ssvi import ActiveSet, kernels
from pyro_ssvi.structures import Columns, Rows, Tiles

ENOUGH = 0.02  # seconds of one operation in one round


def tiles_named(name: str) -> Tiles:
    """What ``"rows"``, ``"columns"``, or a size such as ``"4x1"`` stands for."""
    lines = {"rows": Rows(), "columns": Columns()}
    return lines.get(name) or Tiles(*map(int, name.split("x")))


def operations(active: ActiveSet | None, size: int, batch_size: int) -> dict[str, Callable]:
    """The three products of a training step.

    :param active: of a matrix ``[size, size]``; ``None`` for a dense one.
    """
    x, g = torch.randn(size, batch_size), torch.randn(size, batch_size)
    if active is None:
        w = torch.randn(size, size)
        return {
            "W x": lambda: w @ x,
            "W' g": lambda: w.t() @ g,
            "gradient": lambda: g @ x.t(),
        }
    values = torch.randn(len(active))
    return {
        "W x": partial(kernels.matmul, active, values, x),
        "W' g": partial(kernels.matmul, active, values, g, transposed=True),
        "gradient": partial(kernels.sampled, active, g, x),
    }


def compare(size: int, density: float, args: argparse.Namespace) -> list[list[str]]:
    """A row for each shape of tiles; the first is single coordinates, the last dense."""
    contenders: dict[str, dict[str, Callable]] = {}
    for name in ("1x1", *args.tiles):
        structure = tiles_named(name)
        active = structure.random((size, size), structure.count((size, size), density))
        contenders[name] = operations(active, size, args.batch_size)
    contenders["dense"] = operations(None, size, args.batch_size)
    clock = time.process_time if args.cpu_time else time.perf_counter

    def seconds(function: Callable, times: int) -> float:
        start = clock()
        for _ in range(times):
            function()
        return (clock() - start) / times

    times: dict[tuple[str, str], list[float]] = {}
    repeats = {}
    for i in range(args.rounds + 1):
        for name, each in contenders.items():
            for kind, function in each.items():
                if i == 0:  # which compiles, too
                    function()
                    repeats[name, kind] = max(1, round(ENOUGH / seconds(function, 1)))
                else:
                    took = seconds(function, repeats[name, kind])
                    times.setdefault((name, kind), []).append(took)
    table = []
    for name in contenders:
        row = [name]
        share = 1.0 if name == "dense" else density
        for kind in contenders[name]:
            own, single = times[name, kind], times["1x1", kind]
            rate = 2 * share * size**2 * args.batch_size / statistics.median(own) / 1e9
            ratios = [a / b for a, b in zip(single, own, strict=True)]
            spread = f"{min(ratios):.1f} .. {max(ratios):.1f}"
            row += [f"{1000 * statistics.median(own):.2f}", f"{rate:.0f}"]
            row += [f"{statistics.median(ratios):.2f}x ({spread})"]
        table.append(row)
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=[1200, 4000])
    parser.add_argument("--density", type=float, nargs="+", default=[0.05, 0.01])
    parser.add_argument("--tiles", nargs="+", default=["4x4", "8x8", "4x1", "1x4", "16x1"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="of all threads, rather than the clock's: with --threads 1, on a machine in use",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    heading = ["", *3 * ["ms", "GFLOP/s", "than 1x1"]]
    for size in args.size:
        for density in args.density:
            lines = [heading, *compare(size, density, args)]
            print(
                f"\n{size} x {size}, density {density:g}, batch {args.batch_size}, "
                f"{torch.get_num_threads()} threads; W x, W' g, and the values' gradient\n"
            )
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            for line in lines:
                cells = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
                print("  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
