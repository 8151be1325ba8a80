"""The code of the tutorials runs, in fewer steps; `make docs` runs them as they are."""

import re
from pathlib import Path

import matplotlib
import pytest

TUTORIALS = sorted((Path(__file__).parent.parent / "docs" / "tutorials").glob("*.md"))
CELL = re.compile(r"^```\{code-cell\} python\n(.*?)^```", re.DOTALL | re.MULTILINE)
STEPS = re.compile(r"^steps = [\d_]+$", re.MULTILINE)
SMALLER = {"weights=100_000_000, active=500_000": "weights=40_000, active=6_000"}


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in TUTORIALS])
def test_cells_run(page, monkeypatch):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.chdir(page.parent)
    monkeypatch.syspath_prepend("../../examples")  # and taken away again
    monkeypatch.delenv("DATA_DIR", raising=False)
    text = page.read_text()
    assert STEPS.search(text)
    namespace = {}
    for match in CELL.finditer(text):
        code = STEPS.sub("steps = 80", match[1])
        for large, small in SMALLER.items():
            code = code.replace(large, small)
        line = text[: match.start()].count("\n") + 1
        exec(compile("\n" * line + code, page, "exec"), namespace)
    plt.close("all")
