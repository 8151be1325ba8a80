"""The benchmarks run from the command line. Nothing is asserted about how long things take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(name: str, arguments: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, BENCHMARKS / name, *arguments.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )


def test_training_step(tmp_path):
    names = ["autonormal", "deterministic", "masked", "ssvi"]
    arguments = f"--quick --hidden 16 --density 0.1 --rounds 2 --seconds 0.01 --json out/r.json \
        --batch-size 8 --contenders {' '.join(names)}"
    result = run("training_step.py", arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "784-16-16-10" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 110

    report = json.loads((tmp_path / "out/r.json").read_text())
    assert report["settings"]["threads"] == 1
    assert report["settings"]["versions"]["torch"]
    (net,) = report["nets"]
    assert (net["net"], net["batch_size"]) == ("784-16-16-10", 8)
    rows = {row["name"]: row for row in net["results"]}
    assert list(rows) == names
    for row in rows.values():
        assert len(row["rounds"]) == 2
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert set(row["times_faster_than"]) == {"autonormal", "deterministic"}
        assert (row["exchange_ms"] is None) == (row["name"] != "ssvi")
    assert rows["autonormal"]["times_faster_than"]["autonormal"] == 1

    weights = [784 * 16, 16 * 16, 16 * 10]
    dense, biases = sum(weights), 16 + 16 + 10
    # Each parameter has two moments and a counter of steps; AutoNormal has 6 sites' loc and scale.
    assert rows["deterministic"]["state_bytes"] == 4 * (3 * (dense + biases) + 6)
    assert rows["autonormal"]["state_bytes"] == 4 * (6 * (dense + biases) + 12)
    assert rows["masked"]["state_bytes"] == 4 * (6 * (dense + biases) + 12 + dense)
    active = [int(0.1 * n + 0.5) for n in weights]
    assert rows["ssvi"]["state_bytes"] >= 4 * (6 * (sum(active) + biases) + 2) + 8 * sum(active)
    assert rows["ssvi"]["state_bytes"] < rows["autonormal"]["state_bytes"] / 3
    # Two products of the first layer, three of the others; a multiplication and an addition each.
    products = [2 * 2 * 8, 3 * 2 * 8, 3 * 2 * 8]
    for name, counts in [("autonormal", weights), ("masked", weights), ("ssvi", active)]:
        flops = sum(n * k for n, k in zip(products, counts, strict=True))
        assert rows[name]["flops"] == flops


def test_all_contenders_exist():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import contenders
        import training_step
    finally:
        sys.path.remove(str(BENCHMARKS))
    names = {*training_step.DENSE, *training_step.SPARSE}
    assert set(contenders.CONTENDERS) == names
    assert training_step.EXCHANGE_EVERY == contenders.EXCHANGE_EVERY


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--density 1.5", "expected a density in (0, 1], got 1.5"),
        ("--rounds 0", "--rounds must be above 0, got 0"),
        ("--hidden 0", "--hidden must be at least 1, got 0"),
        ("--contenders adam", "invalid choice: 'adam'"),
    ],
)
def test_bad_arguments_start_no_worker(arguments, message, tmp_path):
    result = run("training_step.py", arguments, tmp_path)
    assert result.returncode != 0
    assert message in result.stderr
