import subprocess
import sys
from pathlib import Path

import pytest
from training_to_resume import CASES, STEPS, fingerprint, fresh, train


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Every case's end without a stop, and its ends after a stop at each step."""
    folder = tmp_path_factory.mktemp("checkpoints")
    expected = {}
    for case, make in CASES.items():
        (folder / case).mkdir()
        with fresh(case, seed=1):
            svi = make()

            def save(svi=svi, case=case):
                svi.save(folder / case / f"{svi.steps}.ckpt")

            save()
            train(svi, after=save)
            expected[case] = fingerprint(svi.state_dict())
    script = Path(__file__).with_name("training_to_resume.py")
    done = subprocess.run(
        [sys.executable, script, folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    resumed = {case: {} for case in CASES}
    for line in done.stdout.splitlines():
        case, step, end = line.split("|")
        resumed[case][int(step)] = end
    return expected, resumed


@pytest.mark.parametrize("case", CASES)
def test_resumed_bit_for_bit(ends, case):
    expected, resumed = ends
    assert resumed[case] == dict.fromkeys(range(STEPS + 1), expected[case])
