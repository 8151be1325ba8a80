"""The pictures of the docs can be drawn, and show what their page says."""

import importlib.util
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_draws_what_the_page_shows(figures, tmp_path):
    figures.main(["--steps", "120", "--folder", str(tmp_path)])
    page = (DOCS / "how_it_works.md").read_text()
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"(figures/{path.name})" in page
    assert len(list(tmp_path.iterdir())) == page.count("(figures/")


def test_an_exchange_takes_the_least_and_adds_the_most(figures):
    exchange = figures.train(120).exchange
    removed, kept = exchange.snr[exchange.removed], exchange.snr[~exchange.removed]
    added, left_out = exchange.gradient[exchange.added], exchange.gradient[~exchange.added]
    assert len(removed) == len(added) > 0
    assert removed.max() <= kept.min()
    assert added.min() >= left_out.max()
    assert len(removed) + len(kept) == 640
    assert torch.isfinite(exchange.gradient).all()
