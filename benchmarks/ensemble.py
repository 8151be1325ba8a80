"""Three sparse posteriors of one training, predicted as a mixture, beside one dense posterior.

The settings are those of the quality study's longer runs, and so are the measures. A member is the
end of a cycle of :class:`pyro_ssvi.CyclicSchedule`, and the learning rate falls to 0 in each::

    python benchmarks/ensemble.py --data-dir DIR
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from quality_parts import LONGER
from quality_runs import NUM_SAMPLES, Bayesian, Data, Setting, load, scores
from torch import Tensor

from pyro_ssvi import CyclicSchedule, Ensemble

STRUCTURE = "1x4"
SAMPLES = 15  # of a mixture; as many as NUM_SAMPLES, but for the division by three


def run(setting: Setting, data: Data, explore: int, restart: float, members: int) -> dict[str, Any]:
    """Train, and measure each member and the mixture.

    :param explore: epochs before the first cycle; the others are the members' in equal parts.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(setting.seed)
    if setting.held_out:
        x, y = data.train_x, data.train_y
        data = Data(x[:50_000], y[:50_000], x[50_000:], y[50_000:], data.digits)
    x, y = data.train_x, data.train_y
    epoch = math.ceil(len(x) / setting.batch_size)
    cycle = (setting.epochs - explore) // members * epoch
    contender = Bayesian(setting, len(x), setting.epochs * epoch)
    schedule = CyclicSchedule(explore * epoch, cycle, setting.every, setting.share, restart)
    optim = {"optimizer": torch.optim.Adam, "optim_args": {"lr": setting.lr}}
    svi = contender.svi
    svi.schedule = schedule
    svi.optim = pyro.optim.LambdaLR({**optim, "lr_lambda": schedule.rate})
    ensemble = Ensemble(contender.model)
    start = time.perf_counter()
    while len(ensemble) < members:
        for index in torch.randperm(len(x)).split(setting.batch_size):
            contender.step(x[index], y[index])
            if schedule.ends_cycle(svi.steps):
                ensemble.add(svi)
    result: dict[str, Any] = {"seconds": time.perf_counter() - start, "active": contender.active}
    with torch.no_grad():
        singles = [
            [predict(contender.model, guide.forward, data.test_x) for _ in range(NUM_SAMPLES)]
            for guide in ensemble.members
        ]
        parts = [
            predict(contender.model, guide, data.test_x) for guide in ensemble.in_turns(SAMPLES)
        ]
    sets = [member.active_sets for member in ensemble.members]
    sparse = [name for name, active in sets[0].items() if not active.is_full]
    result["shared"] = statistics.fmean(
        float(torch.isin(after[name].indices, before[name].indices).float().mean())
        for before, after in pairwise(sets)
        for name in sparse
    )
    result["members"] = [scores(torch.stack(draws).mean(0), data.test_y) for draws in singles]
    result["mixture"] = scores(torch.stack(parts).mean(0), data.test_y)
    return result


def predict(model: Any, guide: Any, x: Tensor) -> Tensor:
    """Class probabilities of one draw, ``[N, 10]``."""
    trace = poutine.trace(guide).get_trace(x)
    parts = [poutine.replay(model, trace)(part).softmax(-1) for part in x.split(2000)]
    return torch.cat(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True, help="the folder with Fashion-MNIST")
    parser.add_argument("--density", type=float, default=LONGER.density)
    parser.add_argument("--structure", default=STRUCTURE, help='such as "1x4", or "single"')
    parser.add_argument("--epochs", type=int, default=120, help="of the whole training")
    parser.add_argument("--explore", type=int, default=45, help="epochs before the first cycle")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--restart", type=float, default=0.5)
    parser.add_argument("--every", type=int, default=LONGER.every)
    parser.add_argument("--kl-weight", type=float, default=LONGER.kl_weight)
    parser.add_argument("--lr", type=float, default=LONGER.lr)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--net", default=LONGER.net, help="widths of the hidden layers")
    parser.add_argument("--held-out", action="store_true", help="test on training images")
    parser.add_argument("--json", type=Path, help="file that gets a line for each run")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = load(args.data_dir)
    setting = replace(
        LONGER,
        net=args.net,
        density=args.density,
        structure=args.structure,
        epochs=args.epochs,
        every=args.every,
        kl_weight=args.kl_weight,
        lr=args.lr,
        held_out=args.held_out,
    )
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        result = run(replace(setting, seed=seed), data, args.explore, args.restart, args.members)
        if args.json is not None:
            with args.json.open("a") as file:
                line = {"arguments": vars(args) | {"json": None}, "seed": seed, **result}
                file.write(json.dumps(line) + "\n")
        for i, each in enumerate(result["members"]):
            rows.setdefault(f"member {i + 1}", []).append(each)
        rows.setdefault(f"mixture of {args.members}", []).append(result["mixture"])
    print(
        f"784-{args.net}-10, {args.density:.0%} active ({args.structure}), {args.explore} epochs, "
        f"then {args.members} cycles to epoch {args.epochs}; {len(args.seeds)} seeds; "
        f"members share {result['shared']:.0%} of their active coordinates\n"
    )
    print(f"{'':16}{'accuracy, %':>16}{'NLL':>18}{'ECE':>20}")
    for name, each in rows.items():
        cells = [
            spread([row[key] for row in each], factor, digits)
            for key, factor, digits in (("accuracy", 100, 2), ("nll", 1, 3), ("ece", 1, 4))
        ]
        print(f"{name:16}{cells[0]:>16}{cells[1]:>18}{cells[2]:>20}")


def spread(values: list[float], factor: float, digits: int) -> str:
    """Mean and standard deviation over seeds."""
    values = [factor * value for value in values]
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


if __name__ == "__main__":
    main()
