"""Trainings in two and three processes on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer.util import zero_grads
from training_on_ranks import SETTINGS, batch_of, structured
from training_to_resume import X, Y, make

from pyro_ssvi import ActiveSet, ConstantSchedule, load_posterior
from pyro_ssvi.addition import Gradient
from pyro_ssvi.distributed import DistributedSSVI
from pyro_ssvi.exchange import read_at, swap
from pyro_ssvi.gradient_record import GradientRecord
from pyro_ssvi.optimizer_state import carry_state
from pyro_ssvi.random_state import random_state, set_random_state
from pyro_ssvi.structures import Tiles

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="needs torch.distributed"
)

EXAMPLE = Path(__file__).parent.parent / "examples" / "many_processes.py"
SCRIPT = Path(__file__).with_name("training_on_ranks.py")


@pytest.fixture(scope="module")
def processes():
    """``processes(case, world_size, folder)`` runs a case; what each rank gave, or None."""
    with subprocess.Popen(
        [sys.executable, SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as server:

        def run(case, world_size, folder):
            folder.mkdir(exist_ok=True)
            server.stdin.write(f"{case}|{world_size}|{folder}\n")
            assert server.stdout.readline(), "the server has died"
            files = [folder / f"{rank}.pt" for rank in range(world_size)]
            return [torch.load(f, weights_only=False) if f.exists() else None for f in files]

        yield run
        server.stdin.close()


def results(outcomes):
    for outcome in outcomes:
        assert "error" not in outcome, outcome["trace"]
    return [outcome["result"] for outcome in outcomes]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", SETTINGS)
def test_all_hold_the_same_after_every_step(processes, tmp_path, case, world_size):
    ends = results(processes(case, world_size, tmp_path))
    assert len({tuple(end["seen"]) for end in ends}) == 1
    assert len(set(ends[0]["seen"])) == len(ends[0]["seen"])  # each step changed something
    assert len({end["random"] for end in ends}) == world_size  # and each has its own draws


def test_one_process_is_ssvi(processes, tmp_path):
    (ends,) = results(processes("one process", 1, tmp_path))
    assert ends[0] == ends[1]


def test_some_of_the_processes(processes, tmp_path):
    others, first, second = results(processes("some of them", 3, tmp_path))
    assert others is None
    assert [first["seen"], second["seen"]] == [[0, 2], [1, 2]]
    assert len({*first["ends"], *second["ends"]}) == 1


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("case", "guide"),
    [("gradients", lambda: None), ("gradients of tiles", lambda: structured(Tiles(2, 3)))],
)
def test_steps_and_exchanges_are_those_of_the_mean_gradient(processes, tmp_path, case, guide):
    world_size = 3
    ends = results(processes(case, world_size, tmp_path))
    pyro.clear_param_store()
    svi = make(guide=guide())
    svi.addition, svi.schedule = Gradient(), ConstantSchedule(every=2)
    svi.load_state_dict(ends[0]["start"])
    random = [own["random"] for own in ends[0]["start"]["ranks"]]
    losses = []
    exchanged = 0
    while svi.steps < 5:
        svi.steps += 1
        records, total = [], 0.0
        for rank in range(world_size):
            set_random_state(random[rank])
            with GradientRecord() as record:
                x, y = (part.double() for part in batch_of(rank))
                total += svi.loss_and_grads(svi.model, svi.guide, x, y)
            records.append(record)
            random[rank] = random_state()
        losses.append(total / world_size)
        params = set(pyro.get_param_store()._params.values())
        for param in params:
            param.grad /= world_size
        svi.optim(params)
        if svi.steps % 2 == 0:
            exchanged += exchange_by_hand(svi, records)
        zero_grads(params)
    assert exchanged > 20
    for end in ends:
        assert end["losses"] == pytest.approx(losses, rel=1e-9)
        for key, value in svi.guide.state_dict().items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(end["end"]["guide"][key], value, rtol=1e-9, atol=1e-12)


def by_tile(active, matrix):
    (rows, cols), (n, m) = active.tile, active.matrix_shape
    return matrix.reshape(n // rows, rows, m // cols, cols).sum((1, 3)).flatten()


def exchange_by_hand(svi, records):
    """Each record's best inactive coordinates are candidates, the best of the mean are added."""
    moves = {}
    posterior = svi.guide.posterior()
    for name, active in svi.guide.active_sets.items():
        units = active.units
        n = min(int(0.3 * len(units) + 0.5), units.numel() - len(units))
        if n == 0:
            continue
        each = [record.block(active, 0, active.matrix_shape[0]) for record in records]
        best = set()
        for gradient in each:
            inactive = by_tile(active, gradient.abs()).index_fill(0, units.indices, -1.0)
            best |= set(inactive.topk(n).indices.tolist())
        mean = by_tile(active, torch.stack(each).mean(0).abs())
        added = torch.tensor(sorted(best, key=lambda i: -mean[i])[:n])
        scores = active.unit_sums(svi.removal(posterior[name].loc, posterior[name].scale))
        moves[name] = swap(active, scores.topk(n, largest=False).indices, added)
    source = svi.guide.exchange(moves)
    for param in svi.guide.parameters_in_place():
        carry_state(svi.optim, param, source)
    return sum(move.size for move in moves.values())


@pytest.mark.parametrize("block_bytes", [4, 100, 10**6])
def test_entries_read_by_blocks(monkeypatch, block_bytes):
    monkeypatch.setattr("pyro_ssvi.exchange.BLOCK_BYTES", block_bytes)
    matrix = torch.randn(7, 5)
    active = ActiveSet.full((7, 5), torch.device("cpu"))
    for indices in ([0], [34], [4, 5, 6, 20, 33], list(range(35))):
        indices = torch.tensor(indices, dtype=torch.int64)
        read = read_at(active, indices, lambda a, b: matrix[a:b])
        assert torch.equal(read, matrix.flatten()[indices])


# Checkpoints


def test_resumed_bit_for_bit_by_as_many_processes(processes, tmp_path):
    saved = results(processes("save", 3, tmp_path))
    resumed = results(processes("load", 3, tmp_path / "again"))
    for before, after in zip(saved, resumed, strict=True):
        assert before["seen"] == after["seen"]
        assert before["random"] == after["random"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_by_another_number_of_processes(processes, tmp_path, world_size):
    saved = results(processes("save", 3, tmp_path))
    resumed = results(processes("load", world_size, tmp_path / "again"))
    assert len({tuple(end["seen"]) for end in resumed}) == 1
    assert len(resumed[0]["seen"]) == 4
    assert len({end["random"] for end in resumed}) == world_size
    assert saved[1]["random"] not in [end["random"] for end in resumed]


def test_exported_by_rank_0(processes, tmp_path):
    results(processes("save", 2, tmp_path))
    svi = make()
    svi.load(tmp_path / "a.ckpt")
    loc = svi.guide.loc
    pyro.clear_param_store()
    guide = load_posterior(tmp_path / "a.posterior", svi.model.model)
    assert torch.equal(guide.loc, loc)


def test_plain_ssvi_goes_on(processes, tmp_path):
    results(processes("save", 2, tmp_path))
    pyro.clear_param_store()
    svi = make()
    svi.load(tmp_path / "a.ckpt")
    assert svi.steps == 6
    svi.step(X, Y)


def test_file_of_plain_ssvi(processes, tmp_path):
    pyro.clear_param_store()
    svi = make()
    for _ in range(6):
        svi.step(X, Y)
    svi.save(tmp_path / "a.ckpt")
    resumed = results(processes("load", 2, tmp_path / "again"))
    assert len({tuple(end["seen"]) for end in resumed}) == 1
    assert len({end["random"] for end in resumed}) == 2


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("cannot save", "FileNotFoundError"),
        ("cannot write", "RuntimeError: write failed"),
        ("cannot load", "FileNotFoundError"),
    ],
)
def test_a_file_that_rank_0_cannot_use(processes, tmp_path, case, error):
    for outcome in processes(case, 2, tmp_path):
        assert outcome["error"].startswith(error)


def test_example_resumes_with_fewer_processes(tmp_path):
    epochs = []
    for processes, argument in ((2, "--epochs 2"), (1, "--epochs 4")):
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), EXAMPLE, "--checkpoint", tmp_path / "a.ckpt"),
            *("--density", "0.2", "--hidden", "32", *argument.split()),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        epochs.append([int(line.split()[1]) for line in done.stdout.splitlines()])
    assert epochs == [[1, 2], [3, 4]]


# What goes wrong


def test_a_bad_batch_of_one_process_is_skipped_by_all(processes, tmp_path):
    ends = results(processes("nan in one", 2, tmp_path))
    assert len({tuple(end["seen"]) for end in ends}) == 1
    for end in ends:
        assert all(end["same"])
        assert [text.split(":")[0] for text in end["caught"]] == [
            "step 3 skipped",
            "step 4 skipped",
        ]


@pytest.mark.parametrize("case", ["bad score in one", "bad scores in all", "bad removal in one"])
def test_a_bad_score_skips_the_exchange_of_all(processes, tmp_path, case):
    ends = results(processes(case, 3, tmp_path))
    assert len({tuple(end["seen"]) for end in ends}) == 1
    for end in ends:
        assert end["unchanged"]
        assert "not finite" in end["caught"][-1]


@pytest.mark.parametrize("when", ["a step", "the first step"])
def test_an_error_in_one_process_is_one_in_all(processes, tmp_path, when):
    ends = results(processes(f"raising in {when}", 3, tmp_path))
    told = ["rank 1 has failed: OSError: cannot read", "OSError: cannot read"]
    for rank, end in enumerate(ends):
        assert end["told"].endswith(told[rank == 1])
        assert end["kept"]
        assert end["cleared"]
    assert len({tuple(end["seen"]) for end in ends}) == 1  # and they may go on


def test_an_error_in_an_exchange_without_a_step(processes, tmp_path):
    for outcome in processes("raising in exchange", 2, tmp_path):
        assert outcome["error"].endswith("OSError: cannot read")
        assert outcome["seconds"] < 15


def test_a_file_that_does_not_fit_in_one_process_is_loaded_by_none(processes, tmp_path):
    for end in results(processes("loaded in one only", 2, tmp_path)):
        assert "site 'w0': saved with 36 active of (10, 12), this guide has 48" in end["told"]
        assert end["steps"] == 0


def test_a_process_outside_of_the_group(processes, tmp_path):
    first, outside = processes("outside", 2, tmp_path)
    assert "error" not in first
    assert outside["error"].startswith("ValueError: this process is not in process_group")


def test_warnings_point_at_the_caller(processes, tmp_path):
    for warned in results(processes("where warned", 2, tmp_path)):
        texts = [text for _, text in warned]
        for part, times in (
            ("the same random numbers", 1),
            ("step 3 skipped", 1),
            ("exchange after step 4 skipped", 2),
            ("saved with the schedule", 2),
        ):
            assert sum(part in text for text in texts) == times
        assert {name for name, _ in warned} == {SCRIPT.name}


def test_a_site_that_one_process_does_not_use_is_left_alone(processes, tmp_path):
    ends = results(processes("site unused in one", 2, tmp_path))
    assert len({tuple(end["seen"]) for end in ends}) == 1
    for end in ends:
        assert set(end["exchanged"]) == {"w1"}


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("other density", r"differ in parameter 'AutoSparseNormal.loc': rank 0 has \(\d+,\)"),
        ("other shares of sites", r"differ in site 'w0': rank 0 has number 0, 36 active of \(10,"),
        ("other schedule", "differ in schedule: rank 0 has .*'every': 4.* rank 1 has .*'every': 5"),
        (
            "other steps to exchange",
            "rank 0 is to take step 3 with an exchange, but rank 1 to take",
        ),
        ("other buffer", r"differ in buffer 'model.model.sized': rank 0 has \(3,\)"),
        ("other learning rate", r"differ in option 'lr' of the optimizer: rank 0 has 0\.01, "),
        ("other kl weight", r"differ in kl_weight: rank 0 has 1\.0, rank 1 has 0\.9"),
        ("other share", r"differ in share to exchange: rank 0 has 0\.2, rank 1 has 0\.3"),
        ("other numbers of steps", r"rank 0 is to gather the state, but rank 1 to take step 6"),
        ("other parameters", r"after step 4 rank 1 has other values than rank 0 of \['Auto"),
        ("saved with other parameters", r"after step 2 rank 1 has other values than rank 0 of"),
        ("not all use", r"step 3 uses parameters \['late'\] that the first step did not use"),
    ],
)
def test_processes_that_differ(processes, tmp_path, case, match):
    for outcome in processes(case, 3, tmp_path):
        with pytest.raises(RuntimeError, match=match):
            raise RuntimeError(outcome["error"])
        assert outcome["seconds"] < 15  # of a timeout of 30


def test_a_dead_process_ends_the_others(processes, tmp_path):
    first, dead, last = processes("die", 3, tmp_path)
    assert dead is None
    for outcome in (first, last):
        assert outcome["error"]
        assert outcome["seconds"] < 60  # of a timeout of 30


def test_equal_random_numbers_are_reported(processes, tmp_path):
    for caught in results(processes("same seed", 2, tmp_path)):
        assert any("draw the same random numbers" in text for text in caught)


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        DistributedSSVI(make, make, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
