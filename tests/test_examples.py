"""Every example runs, from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
MODULES = {"comparison.py", "datasets.py", "metrics.py"}  # imported by examples
ELSEWHERE = {  # tested in files of their own
    "bnn_digits.py",
    "correlated_regression.py",
    "hierarchical.py",
    "horseshoe_bnn.py",
    "lightning_module.py",
    "many_processes.py",
    "logistic_regression.py",
    "resnet_cifar.py",
    "sparse_regression.py",
}
SMALL = {
    "billion_weights.py": "--weights 2e4 4e4 --active 6e3 --steps 8 --threads 1",
    "compare_with_autonormal.py": (
        "--hidden 16 --epochs 3 --density 0.5 0.2 --exchange-every 5 --json out/r.json --plot p.png"
    ),
}


def run(name: str, arguments: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error::UserWarning", EXAMPLES / name, *arguments.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )


def test_every_example_is_listed():
    assert {path.name for path in EXAMPLES.glob("*.py")} == MODULES | ELSEWHERE | set(SMALL)


def test_billion_weights(tmp_path):
    name = "billion_weights.py"
    result = run(name, SMALL[name], tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if "%" in line]
    assert [row[1] for row in rows] == ["6,000", "6,000"]
    assert [row[0] for row in rows] == ["19,947", "39,840"]


def test_compare_with_autonormal(tmp_path):
    name = "compare_with_autonormal.py"
    result = run(name, SMALL[name], tmp_path)
    assert result.returncode == 0, result.stderr
    names = ["deterministic", "AutoNormal", "AutoSparseNormal 50%", "AutoSparseNormal 20%"]
    for line in names:
        assert line in result.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")

    report = json.loads((tmp_path / "out/r.json").read_text())
    assert report["settings"]["sizes"] == [64, 16, 16, 10]
    rows = {row["name"]: row for row in report["results"]}
    assert list(rows) == names
    weights, biases = 64 * 16 + 16 * 16 + 16 * 10, 16 + 16 + 10
    dense = weights + biases
    assert rows["AutoNormal"]["active"] == rows["deterministic"]["active"] == dense
    assert rows["AutoSparseNormal 50%"]["active"] == weights // 2 + biases
    # loc and scale, each with two moments and, for each tensor, a step counter; int64 indices.
    assert rows["AutoNormal"]["bytes"] == 4 * (6 * dense + 12)
    expected = 4 * (6 * (weights // 2 + biases) + 2) + 8 * (weights // 2)
    assert rows["AutoSparseNormal 50%"]["bytes"] == expected
    for row in rows.values():
        assert 0.1 < row["accuracy"] <= 1
        assert row["loss"][-1] < row["loss"][0]
        assert row["ms_per_step"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--density 1.5", "expected a density in (0, 1], got 1.5"),
        ("--density 0.0001", "would get 0 active coordinates"),
        ("--dataset mnist", "--dataset mnist needs --data-dir"),
        ("--epochs 0", "--epochs must be at least 1"),
        ("--dataset svhn", "invalid choice: 'svhn'"),
    ],
)
def test_bad_arguments_cost_no_training(arguments, message, tmp_path):
    result = run("compare_with_autonormal.py", arguments, tmp_path)
    assert result.returncode != 0
    assert message in result.stderr
    assert "images" not in result.stdout
