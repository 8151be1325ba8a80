"""The quality study: how good sparse posteriors are, on Fashion-MNIST, beside dense ones.

Every run is a line of JSON with its settings. Runs that the file already has are not repeated, so
a study that was stopped goes on where it was::

    python benchmarks/quality.py --data-dir DIR            # all parts: hours
    python benchmarks/quality.py --data-dir DIR --quick    # a small version, under ten minutes
    python benchmarks/quality.py --page                    # tables and figures of docs/quality.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import quality_page
import quality_runs
import torch
from quality_parts import PARTS, quick
from quality_runs import Setting
from tqdm import tqdm

RESULTS = Path(__file__).resolve().with_name("quality.jsonl")
_data: Any = None  # of this process


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results; one that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}: left out a line that was not finished", file=sys.stderr)
    return rows


def start_worker(data_dir: str) -> None:
    """A process trains on one thread: runs side by side cost less than threads in one."""
    global _data
    torch.set_num_threads(1)
    _data = quality_runs.load(data_dir)


def machine() -> dict[str, Any]:
    """What seconds depend on."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__}


def work(setting: Setting) -> dict[str, Any]:
    return {
        "setting": asdict(setting),
        "machine": machine(),
        **quality_runs.run(setting, _data),
    }


def train(settings: list[Setting], path: Path, data_dir: str, jobs: int) -> None:
    """Run what the file does not have yet, and add a line for each run as it ends."""
    # A line that was written before a setting had all its fields had their defaults.
    done = {Setting(**row["setting"]) for row in read(path) if "setting" in row}
    todo = [setting for setting in settings if setting not in done]
    todo.sort(key=lambda setting: setting.seed)  # a study that is stopped early has all parts
    print(f"{len(settings) - len(todo)} of {len(settings)} runs are in {path}")
    bar = tqdm(total=len(todo), desc="runs", disable=None)
    with ProcessPoolExecutor(jobs, initializer=start_worker, initargs=(data_dir,)) as pool:
        for future in as_completed([pool.submit(work, setting) for setting in todo]):
            with path.open("a") as file:
                file.write(json.dumps(future.result()) + "\n")
            bar.update()
    bar.close()


def measure_steps(settings: list[Setting], path: Path, data_dir: str, rounds: int = 7) -> None:
    """Time a step of each, in turns, on all threads, and add a line with the milliseconds."""
    start_worker(data_dir)
    torch.set_num_threads(torch.get_num_interop_threads())
    steps = [quality_runs.step_function(setting, _data) for setting in settings]
    times: list[list[float]] = [[] for _ in steps]
    for i in range(rounds + 1):
        for step, each in zip(steps, times, strict=True):
            start = time.perf_counter()
            for _ in range(20):
                step()
            if i:  # the first round compiles
                each.append((time.perf_counter() - start) / 20 * 1e3)
    rows = [
        {"setting": asdict(setting), "ms": statistics.median(each), "range": [min(each), max(each)]}
        for setting, each in zip(settings, times, strict=True)
    ]
    with path.open("a") as file:
        file.write(json.dumps({"steps": rows, "machine": machine()}) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="torchvision's folder, or one with the four gz files")
    parser.add_argument("--part", choices=[*PARTS, "steps"], nargs="+", help="default: all")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, fewer settings")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--results", type=Path, help="default: benchmarks/quality.jsonl")
    parser.add_argument("--page", action="store_true", help="write the page, and run nothing")
    args = parser.parse_args(argv)
    path = args.results or (RESULTS.with_name("quality-quick.jsonl") if args.quick else RESULTS)
    if not args.page:
        if args.data_dir is None:
            parser.error("--data-dir is needed: the folder with Fashion-MNIST")
        parts = args.part or [*PARTS, "steps"]
        settings = [setting for part in parts if part != "steps" for setting in PARTS[part]]
        settings = list(dict.fromkeys(settings))
        if args.quick:
            settings = quick(settings)
        train(settings, path, args.data_dir, args.jobs)
        if "steps" in parts:
            measure_steps(PARTS["steps"], path, args.data_dir)
    quality_page.write(read(path), None if args.quick else quality_page.PAGE)


if __name__ == "__main__":
    main()
