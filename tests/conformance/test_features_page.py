"""docs/features.md names a test for each of its rows."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEST = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def test_every_row_names_tests_that_are_there():
    lines = (ROOT / "docs" / "features.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| Feature")]
    assert len(rows) > 50
    for row in rows:
        named = TEST.findall(row)
        assert named, row
        for file, name in named:
            folders = (ROOT / "tests", ROOT / "tests" / "conformance")
            texts = [(f / file).read_text() for f in folders if (f / file).exists()]
            assert any(f"def {name}(" in text for text in texts), (file, name)
