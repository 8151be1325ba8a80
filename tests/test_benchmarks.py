"""The benchmarks run; what they measure is not asserted."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_training_step(tmp_path):
    names = ["autonormal", "deterministic", "masked", "ssvi"]
    command = [sys.executable, BENCHMARKS / "training_step.py", "--hidden", "16", "--rounds", "2"]
    command += ["--seconds", "0.01", "--density", "0.1", "--batch-size", "8", "--threads", "1"]
    command += ["--contenders", *names, "--json", tmp_path / "r.json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert "784-16-16-10" in result.stdout
    assert "AutoSparseNormal 10%" in result.stdout
    rows = json.loads((tmp_path / "r.json").read_text())["results"]["16"]
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert len(row["seconds_per_step"]) == 2
        assert min(row["seconds_per_step"]) > 0
        assert row["peak_bytes"] > 0
    state = {row["name"]: row["state_bytes"] for row in rows}
    weights, biases = 784 * 16 + 16 * 16 + 16 * 10, 16 + 16 + 10
    assert state["deterministic"] == 4 * (3 * (weights + biases) + 6)
    assert state["autonormal"] == 4 * (6 * (weights + biases) + 12)
    k = sum(int(0.1 * n + 0.5) for n in (784 * 16, 16 * 16, 16 * 10))
    assert state["ssvi"] == 4 * (6 * (k + biases) + 2) + 8 * k
