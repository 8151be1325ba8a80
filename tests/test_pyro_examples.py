"""The examples that are ordinary Pyro programs run, and show what they are there to show."""

import runpy
from pathlib import Path

import pytest

from pyro_ssvi import dense_fallbacks

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where plots are written
    monkeypatch.syspath_prepend(EXAMPLES)  # for what they share

    def main(name, arguments):
        rows = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](arguments.split())
        assert not dense_fallbacks  # sparse values are computed sparsely
        return rows

    return main


def by_active(rows):
    """The rows by their number of active coordinates; the first is AutoNormal's."""
    assert rows[0]["name"] == "AutoNormal"
    assert all(row["name"].startswith("AutoSparseNormal ") for row in rows[1:])
    return {row["active"]: row for row in rows}


def assert_is_png(path):
    assert Path(path).read_bytes().startswith(b"\x89PNG")


def test_sparse_regression(run, capsys):
    results = run("sparse_regression", "--steps 400 --features 1000")
    simulation = by_active(results["simulation"])
    assert list(simulation) == [1000, 250, 50, 20]
    assert simulation[50]["recall"] > 0.8
    assert simulation[20]["precision"] > 0.8
    assert simulation[20]["top recall"] > 0.8
    assert simulation[20]["rmse"] < simulation[1000]["rmse"]
    diabetes = by_active(results["diabetes"])
    assert list(diabetes) == [65, 32, 13, 6]
    assert all(row["rmse"] < 0.85 for row in diabetes.values())
    assert "AutoSparseNormal 2.0%" in capsys.readouterr().out


def test_correlated_regression(run, capsys):
    arguments = "--data 80 --features 60 --active 20 --rank 4 --steps 100 --lr 0.1 --runs 2"
    independent, correlated = run("correlated_regression", arguments).values()
    for scores in (independent, correlated):
        assert scores.shape == (2, 3)
        assert scores.isfinite().all()
        assert (scores[:, 1] < 3).all()  # RMSE
        assert (scores[:, 2] > 0.4).all()  # in 90 % intervals
    assert not independent.equal(correlated)
    assert "NLL less by correlations" in capsys.readouterr().out


def test_logistic_regression(run, capsys):
    rows = by_active(run("logistic_regression", "--steps 150"))
    assert list(rows) == [495, 99, 25, 10]
    assert all(row["accuracy"] > 0.9 for row in rows.values())
    assert all(row["nll"] < 0.3 for row in rows.values())
    assert "worst" in capsys.readouterr().out  # names of features


def test_horseshoe_bnn(run):
    dense, sparse = run("horseshoe_bnn", "--steps 120 --plot plots/bands.png")
    assert (dense["weights"], sparse["weights"]) == (100, 20)
    assert sparse["rmse"] < 0.8  # 1 without HDL
    assert 0.8 < sparse["inside"] <= 1
    assert_is_png("plots/bands.png")


def test_hierarchical(run):
    rows = by_active(run("hierarchical", "--steps 80"))
    assert list(rows) == [80, 40, 20, 8]
    assert all(row["rmse"] < 0.85 for row in rows.values())
    assert_is_png("results/hierarchical.png")


def test_bnn_digits(run, capsys):
    rows = by_active(run("bnn_digits", "--steps 300 --checkpoint a.ckpt --plot b.png"))
    weights = 64 * 200 + 200 * 10
    assert list(rows) == [weights + 210, weights // 10 + 210, weights // 20 + 210]
    for row in rows.values():
        assert row["accuracy"] > 0.7
        assert row["surest"] > row["accuracy"]
        assert row["strange doubt"] > row["doubt"]
    assert "loaded: the same predictions" in capsys.readouterr().out
    assert Path("a.ckpt").stat().st_size < 100_000
    assert_is_png("b.png")
