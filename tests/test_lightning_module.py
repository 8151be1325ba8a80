"""The example for Lightning, as its user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "lightning_module.py"


def run(arguments, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLE, *arguments.split()]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    return re.search(r"test accuracy after (\d+) steps: ([\d.]+)%", result.stdout).groups()


def test_it_trains_and_goes_on_from_lightning_s_checkpoint(tmp_path):
    steps, accuracy = run("--epochs 2", tmp_path)
    assert steps == str(2 * 23)
    steps, later = run("--epochs 6 --ckpt-path last.ckpt", tmp_path)
    assert steps == str(6 * 23)
    assert float(later) > float(accuracy)
    assert float(later) > 80
