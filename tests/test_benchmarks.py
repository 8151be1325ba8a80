"""The benchmarks run from the command line. Nothing is asserted about how long things take."""

import dataclasses
import gzip
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_ssvi import SSVI, AutoSparseNormal

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


def run(name: str, arguments: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, BENCHMARKS / name, *arguments.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )


def test_training_step(tmp_path):
    names = ["autonormal", "deterministic", "masked", "ssvi", "ssvi-tiles", "ssvi-columns"]
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
        assert (row["exchange_ms"] is None) == (not row["name"].startswith("ssvi"))
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
    for name in ("ssvi-tiles", "ssvi-columns"):
        assert rows[name]["state_bytes"] < 1.2 * rows["ssvi"]["state_bytes"]
    # Two products of the first layer, three of the others; a multiplication and an addition each.
    products = [2 * 2 * 8, 3 * 2 * 8, 3 * 2 * 8]
    for name, counts in [("autonormal", weights), ("masked", weights), ("ssvi", active)]:
        flops = sum(n * k for n, k in zip(products, counts, strict=True))
        assert rows[name]["flops"] == flops


def test_products(tmp_path):
    arguments = "--size 16 --density 0.2 --tiles 4x4 rows columns --batch-size 8 --rounds 1"
    result = run("products.py", arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[4:]] == ["1x1", "4x4", "rows", "columns", "dense"]


def test_lines_of_an_older_study_count(quality, tmp_path):
    """Fields that Setting has got since have their default there."""
    setting = dataclasses.asdict(quality.Setting(net="8-8", epochs=1, batch_size=300))
    del setting["structure"]
    path = tmp_path / "old.jsonl"
    path.write_text(json.dumps({"setting": setting}) + "\n")
    quality.train([quality.Setting(**setting)], path, str(tmp_path), 1)
    assert len(quality.read(path)) == 1


def test_what_the_study_calls_defaults_are_those_of_the_package(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import quality_parts
    import quality_runs

    setting = next(s for s in quality_parts.PARTS["defaults"] if s.schedule == "inverse-sqrt")
    svi = quality_runs.Bayesian(setting, 60_000, 4690).svi
    guide = AutoSparseNormal(svi.model.model, density=setting.density)
    alone = SSVI(svi.model.model, guide, pyro.optim.Adam({}), Trace_ELBO())
    for name in ("removal", "addition", "allocation", "schedule", "new_scale", "local_reparam"):
        assert getattr(svi, name) == getattr(alone, name)
    assert isinstance(svi._elbo, Trace_ELBO)
    for name in ("structure", "first_scale"):
        assert getattr(svi.guide, name) == getattr(guide, name)
    assert (setting.policy, setting.init_loc) == ("uniform", "feasible")


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


def images(folder: Path, seed: int, prefix: str, n: int) -> None:
    """A part of a data set in Fashion-MNIST's format: a bright bar, whose place is the label."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 10, n, dtype=np.uint8)
    pixels = generator.integers(0, 60, (n, 28, 28), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[:, 2 * label + 4] = 250
    for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(
            size.to_bytes(4, "big") for size in array.shape
        )
        with gzip.open(folder / f"{prefix}-{kind}-ubyte.gz", "wb") as file:
            file.write(header + array.tobytes())


#: How many settings of each part of the study are tried, where it is not two.
KEPT = {"densities": 10, "lenet": 0, "defaults": 1, "agreement": 1, "exchanges": 0, "chosen": 0}


@pytest.fixture
def quality(tmp_path, monkeypatch):
    """The module of the study, with few settings of each kind and few images."""
    images(tmp_path, 0, "train", 600)
    images(tmp_path, 1, "t10k", 100)
    monkeypatch.syspath_prepend(BENCHMARKS)
    import quality
    import quality_parts
    import quality_runs

    monkeypatch.setattr(quality_runs, "CALIBRATION", 100)
    monkeypatch.setattr(quality_runs, "NUM_SAMPLES", 2)
    small = {
        part: [
            dataclasses.replace(
                setting,
                net="8-8",
                epochs=3,
                batch_size=32,
                every=12 if setting.addition == "evidence" else 5,  # it averages over 10 steps
            )
            if part != "lenet"
            else dataclasses.replace(setting, epochs=1, batch_size=300)
            for setting in settings
            if setting.seed < 2
        ][:keep]
        for part, settings in quality_parts.PARTS.items()
        for keep in [KEPT.get(part, 2)]
    }
    for module in (quality, sys.modules["quality_page"]):
        monkeypatch.setattr(module, "PARTS", small)
    monkeypatch.setattr(quality, "ProcessPoolExecutor", InProcess)
    yield quality
    torch.set_num_threads(1)
    for module in ("quality", "quality_parts", "quality_runs", "quality_page"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize(
    ("page", "rows"),
    [
        ("docs/quality.md", 90),
        ("README.md", 11),
        ("docs/structured.md", 7),
        ("docs/ensembles.md", 1),
    ],
)
def test_pages_have_the_figures_of_the_lines(page, rows, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import quality
    import quality_page

    def cells(text):
        rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
        return [[cell for cell in row if "±" in cell] for row in rows]

    tables = quality_page.tables(quality.read(quality.RESULTS)).values()
    known = [row for table in tables for row in cells(table)]
    text = (ROOT / page).read_text()
    if page == "docs/ensembles.md":  # the others are its own benchmark's
        text = "\n".join(line for line in text.splitlines() if "AutoNormal, dense" in line)
    quoted = [row for row in cells(text) if len(row) > 2]
    assert len(quoted) >= rows
    for row in quoted:
        assert any(set(row) <= set(each) for each in known), row


def test_each_line_is_of_a_part_and_each_setting_has_a_line(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import quality
    import quality_parts

    asked = {
        setting
        for part, settings in quality_parts.PARTS.items()
        if part != "steps"
        for setting in settings
    }
    rows = [row for row in quality.read(quality.RESULTS) if "setting" in row]
    assert {quality.Setting(**row["setting"]) for row in rows} == asked
    assert len(rows) == len(asked)


class InProcess(ThreadPoolExecutor):
    """Runs one after another, in the order of their submission."""

    def __init__(self, jobs, initializer, initargs):
        super().__init__(1, initializer=initializer, initargs=initargs)


def test_quality_study_is_resumable_and_fills_its_page(quality, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    arguments = ["--data-dir", str(tmp_path), "--results", str(path)]
    page = tmp_path / "quality.md"
    names = ("densities", "longer", "steps", "wider", "lenet", "without_posterior", "criteria")
    names += ("exchanges", "agreement", "robustness", "elsewhere", "defaults", "structures")
    names += ("correlations", "allocation", "evidence", "chosen")
    marks = "".join(f"<!-- table: {name} -->\n<!-- end -->\n\n" for name in names)
    page.write_text(f"Before.\n\n{marks}After.\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality.quality_page, "PAGE", page)
        quality.main([*arguments, "--part", "densities", "agreement"])
        first = quality.read(path)
        with path.open("a") as file:
            file.write('{"setting": {"method"')  # as if it had been stopped while writing
        quality.main(arguments)
    rows = quality.read(path)
    assert rows[: len(first)] == first
    settings = [json.dumps(row["setting"]) for row in rows if "setting" in row]
    assert len(set(settings)) == len(settings)
    dense = [row for row in rows if row.get("setting", {}).get("method") == "autonormal"]
    sparse = [row for row in rows if row.get("setting", {}).get("density", 1) < 1]
    assert dense[0]["active"] == 784 * 8 + 8 + 8 * 8 + 8 + 8 * 10 + 10
    assert all(row["active"] < dense[0]["active"] for row in sparse if "net" in row["setting"])
    assert all(0 <= row["accuracy"] <= 1 and row["nll"] > 0 for row in dense + sparse)
    assert max(row["accuracy"] for row in rows if "accuracy" in row) > 0.5  # it learns
    text = page.read_text()
    assert text.startswith("Before.")
    assert text.endswith("After.\n")
    assert "| SSVI 5 % |" in text
    assert page.with_name("quality-densities.png").stat().st_size > 10_000
    assert page.with_name("quality-robustness.png").stat().st_size > 10_000
    assert "left out a line" in capsys.readouterr().err


def test_quality_study_asks_for_data(quality, capsys):
    with pytest.raises(SystemExit):
        quality.main([])
    assert "--data-dir is needed" in capsys.readouterr().err


def test_soak(tmp_path):
    result = run("soak.py", "--steps 200 --every 20", tmp_path)
    assert "200 steps, 10 exchanges" in result.stdout, result.stderr


def test_prediction(tmp_path):
    arguments = "--hidden 16 --density 0.1 --batch-size 8 --samples 2 --rounds 2 --columns"
    result = run("prediction.py", arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [line.split("  ")[0] for line in result.stdout.splitlines()[2:]]
    sparse = ["SparsePredictive 10%", "SparsePredictive 10%, columns"]
    networks = ["SparseNetwork 10%", "SparseNetwork 10%, columns", "shrunk 10%, columns"]
    assert rows == [
        *("2 samples", "Predictive, AutoNormal", *sparse, ""),
        *("mean weights", "torch's dense network", *networks),
    ]


def test_merged_candidates(tmp_path):
    arguments = "--hidden 16 --density 0.2 --steps 16 --every 4 --seeds 1 --shards 1 2"
    result = run("merged_candidates.py", arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    alone, two = (line.split() for line in result.stdout.splitlines()[-2:])
    assert alone[:3] == ["1", "100.0%", "100.0%"]
    assert 50 < float(two[1].rstrip("%")) <= float(two[2].rstrip("%")) <= 100


def test_ensemble(tmp_path):
    images(tmp_path, 0, "train", 600)
    images(tmp_path, 1, "t10k", 100)
    arguments = f"--data-dir {tmp_path} --net 8 --density 0.5 --epochs 4 --explore 1 --every 2 \
        --seeds 0 1 --json {tmp_path}/runs.jsonl"
    result = run("ensemble.py", arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [line[:16].strip() for line in result.stdout.splitlines()[-4:]]
    assert rows == ["member 1", "member 2", "member 3", "mixture of 3"]
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1]
    for line in lines:
        assert len({member["nll"] for member in line["members"]}) == 3
        # By convexity of -log, a mixture is no worse than its members, up to their draws.
        worst = max(member["nll"] for member in line["members"])
        assert line["mixture"]["nll"] < worst + 0.05


@pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="bytes are counted on Linux only")
def test_distributed_step(tmp_path):
    arguments = "--hidden 32 --density 0.05 --batch-size 8 --steps 2 --rounds 2"
    result = run("distributed_step.py", arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    rows = {line[:22].strip(): line[22:].split() for line in result.stdout.splitlines()}
    dense, sparse = (rows[name] for name in ("dense posterior", "AutoSparseNormal 5%"))
    dense_kb, sparse_kb = (float(row[0].replace(",", "")) for row in (dense, sparse))
    numbers = 2 * (784 * 32 + 32 * 32 + 32 * 10 + 74)  # loc and scale
    assert 2 * 4 * numbers < 1000 * dense_kb < 2.5 * 4 * numbers  # each sends them once
    assert dense_kb / sparse_kb > 10
