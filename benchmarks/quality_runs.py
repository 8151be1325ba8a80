"""One run of the quality study: a setting, its training, and what is measured afterwards."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_feasible
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn

from pyro_ssvi import (
    SSVI,
    AutoSparseLowRankMultivariateNormal,
    AutoSparseNormal,
    ConstantSchedule,
    CosineSchedule,
    InverseSqrtSchedule,
)
from pyro_ssvi.addition import ADDITION
from pyro_ssvi.criteria import REMOVAL
from pyro_ssvi.densities import ErdosRenyiKernel, Policy, Uniform
from pyro_ssvi.diagnostics import elbo_parts, overlap, uncertainty
from pyro_ssvi.nn import bayesianize
from pyro_ssvi.schedules import Schedule
from pyro_ssvi.structures import NM, Structure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))  # for what they share

import datasets
from metrics import measures
from products import tiles_named

__all__ = ["Data", "Setting", "load", "run", "step_function"]

NUM_SAMPLES = 16  # posterior samples of a prediction
CALIBRATION = 5000  # training images that a temperature is fitted on
RANK = 10
N_OF_M = {"net.1.weight": NM(2, 49), "net.3.weight": NM(1, 20)}
TINY = 1e-8  # the standard deviation of a net that is deterministic but for its training code


@dataclass(frozen=True)
class Setting:
    """Everything that a run depends on.

    :ivar method: "autonormal": Pyro's own; "ssvi"; "low-rank": ssvi with correlations, of rank 10;
        "deterministic": a dense net; "rigl": a sparse net without a posterior, which is ssvi at a
        standard deviation of 1e-8 that is not trained.
    :ivar local: local reparameterisation.
    :ivar init_loc: "fan-in": random, by the inputs that a unit really has; "feasible": 0, as the
        guides have it by default.
    :ivar share: of the coordinates exchanged at first; 0 for a fixed random active set.
    :ivar structure: what is active as one: "single" coordinates, tiles such as "4x1", whole "rows"
        or "columns", or "n:m": in 784-400-400-10, 2 of 49 columns of the first layer and 1 of 20
        of the second.
    :ivar tempered: fit a temperature on the last training images, and train on the others.
    :ivar agreement: note after each epoch how alike the criteria's choices are.
    :ivar held_out: test on the last 10 000 training images, train on the others: for choosing
        settings.
    :ivar allocation: "per_site", or "global": sites compete for active coordinates.
    :ivar schedule: "cosine", to three quarters of the steps, or "inverse-sqrt".
    :ivar decay: whether the learning rate falls to 0 as a cosine.
    """

    method: str = "ssvi"
    net: str = "400-400"
    density: float = 0.05
    policy: str = "erk"
    local: bool = False
    epochs: int = 10
    batch_size: int = 128
    lr: float = 5e-3
    kl_weight: float = 0.1
    prior_scale: float = 0.1
    init_loc: str = "fan-in"
    init_scale: float = 0.01
    removal: str = "snr_abs"
    addition: str = "sampled_gradient"
    batches: int = 1
    every: int = 100
    share: float = 0.3
    tempered: bool = False
    agreement: bool = False
    held_out: bool = False
    structure: str = "single"
    seed: int = 0
    allocation: str = "per_site"
    schedule: str = "cosine"
    decay: bool = True


class Data(NamedTuple):
    """Images ``[n, 1, 28, 28]`` with mean 0 and variance 1, and labels."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    digits: Tensor  # scikit-learn's, on the same scale


def load(data_dir: str) -> Data:
    """Fashion-MNIST, and digits as data from elsewhere."""
    data = datasets.load("fashion-mnist", data_dir)
    images = torch.as_tensor(load_digits().images, dtype=torch.float32)[:, None]
    images = F.interpolate(images / 16, size=(28, 28), mode="bilinear")
    low, high = data.train_x.min(), data.train_x.max()  # black and white
    return Data(
        data.train_x.reshape(-1, 1, 28, 28),
        data.train_y,
        data.test_x.reshape(-1, 1, 28, 28),
        data.test_y,
        low + (high - low) * images,
    )


def make_net(name: str) -> nn.Module:
    """``"lenet"``, or a perceptron whose hidden layers are named, such as ``"400-400"``."""
    if name == "lenet":
        return nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, 10),
        )
    layers: list[nn.Module] = [nn.Flatten()]
    width = 784
    for size in map(int, name.split("-")):
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, 10))


class Contender:
    """A net in training.

    :ivar step: takes a training step.
    :ivar logits: ``logits(x)`` of a draw of the posterior.
    :ivar logits_at_mean: of the posterior's means.
    """

    step: Callable[[Tensor, Tensor], float]
    logits: Callable[[Tensor], Tensor]
    logits_at_mean: Callable[[Tensor], Tensor]
    guide: Any = None
    model: Any = None


class Deterministic(Contender):
    def __init__(self, setting: Setting, num_data: int, num_steps: int) -> None:
        self.net = make_net(setting.net)
        self.logits = self.logits_at_mean = self.net
        self.optim = torch.optim.Adam(self.net.parameters(), lr=setting.lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optim, num_steps)
        self.active = sum(parameter.numel() for parameter in self.net.parameters())

    def step(self, x: Tensor, y: Tensor) -> float:
        loss = F.cross_entropy(self.net(x), y)
        self.optim.zero_grad()
        loss.backward()
        self.optim.step()
        self.schedule.step()
        return loss.item()


class Bayesian(Contender):
    def __init__(self, setting: Setting, num_data: int, num_steps: int) -> None:
        # The KL divergence counts kl_weight times when the data count 1 / kl_weight times.
        num_data /= setting.kl_weight
        net = bayesianize(make_net(setting.net), setting.prior_scale)

        def model(x: Tensor, y: Tensor | None = None) -> Tensor:
            logits = net(x)
            with pyro.plate("data", len(x)), poutine.scale(scale=num_data / len(x)):
                pyro.sample("obs", dist.Categorical(logits=logits), obs=y)
            return logits

        self.model = model
        policy = density_policy(setting)
        weights = {key: shape for key, shape in net.shapes.items() if len(shape) > 1}
        densities = {f"net.{key}": value for key, value in policy.allocate(weights).items()}
        density: Any = policy
        if setting.structure == "n:m":
            density = densities = densities | {name: nm.n / nm.m for name, nm in N_OF_M.items()}
        # A row that is active as a whole reads all inputs.
        inputs = dict.fromkeys(densities, 1.0) if setting.structure == "rows" else densities
        plain = setting.method == "rigl"
        options: dict[str, Any] = {
            "init_loc_fn": init_to_fan_in(inputs)
            if setting.init_loc == "fan-in"
            else init_to_feasible,
            "init_scale": TINY if plain else setting.init_scale,
        }
        optim = adam(setting, num_steps, scales=not plain)
        elbo = TraceMeanField_ELBO() if setting.local else Trace_ELBO()
        if setting.method == "autonormal":
            self.guide = AutoNormal(model, **options)
            self.svi = SVI(model, self.guide, optim, elbo)
        else:
            if setting.method == "low-rank":
                options["rank"] = RANK
            family = AutoSparseLowRankMultivariateNormal if "rank" in options else AutoSparseNormal
            structure = structure_of(setting)
            self.guide = family(model, density=density, structure=structure, **options)
            self.svi = SSVI(
                model,
                self.guide,
                optim,
                elbo,
                removal=setting.removal,
                addition=replace(ADDITION[setting.addition], batches=setting.batches)
                if setting.batches > 1
                else setting.addition,
                allocation=setting.allocation,
                schedule=schedule_of(setting, num_steps),
                new_scale=TINY if plain else "mean",
                local_reparam=setting.local,
            )

    @property
    def active(self) -> int:
        locs = [p for name, p in self.guide.named_parameters() if "loc" in name]
        return sum(parameter.numel() for parameter in locs)

    def step(self, x: Tensor, y: Tensor) -> float:
        loss = self.svi.step(x, y)
        self.svi.optim.step()
        return loss

    def logits(self, x: Tensor) -> Tensor:
        trace = poutine.trace(self.guide).get_trace(x)
        return poutine.replay(self.model, trace)(x)

    def logits_at_mean(self, x: Tensor) -> Tensor:
        return poutine.condition(self.model, self.guide.median())(x)


def schedule_of(setting: Setting, num_steps: int) -> Schedule:
    if setting.share == 0:
        return ConstantSchedule(every=num_steps + 1)
    stop = max(1, int(0.75 * num_steps))
    every = min(setting.every, stop)
    if setting.schedule == "inverse-sqrt":
        return InverseSqrtSchedule(every, setting.share)
    return CosineSchedule(every, setting.share, stop)


def structure_of(setting: Setting) -> Structure | dict[str, NM] | None:
    if setting.structure == "single":
        return None
    if setting.structure == "n:m":
        return N_OF_M
    return tiles_named(setting.structure)


def density_policy(setting: Setting) -> Policy:
    density = 1.0 if setting.method == "autonormal" else setting.density
    policies = {
        "uniform": Uniform(density),
        "first-dense": Uniform(density, first_dense=True),
        "erk": ErdosRenyiKernel(density),
    }
    return policies[setting.policy]


def init_to_fan_in(densities: dict[str, float]) -> Callable:
    """First locations of a weight: as usual for relu, by the inputs that a unit really has.

    :param densities: the share of its inputs that a unit reads, by site.
    """

    def init(site: dict) -> Tensor:
        shape = site["fn"].shape()
        if len(shape) < 2:
            return torch.zeros(shape)
        fan_in = densities[site["name"]] * shape[1:].numel()
        return torch.randn(shape) * (2 / fan_in) ** 0.5

    return init


def adam(setting: Setting, num_steps: int, scales: bool) -> Any:
    """Adam with a learning rate that falls to 0 as a cosine, or stays what it is.

    :param scales: whether standard deviations are trained.
    """

    def options(name: str) -> dict[str, float]:
        return {"lr": setting.lr if scales or not name.endswith("scale") else 0.0}

    last = 0.0 if setting.decay else setting.lr
    args = {"optimizer": torch.optim.Adam, "optim_args": options}
    return pyro.optim.CosineAnnealingLR({**args, "T_max": num_steps, "eta_min": last})


def make(setting: Setting, num_data: int, num_steps: int) -> Any:
    kind = Deterministic if setting.method == "deterministic" else Bayesian
    return kind(setting, num_data, num_steps)


def step_function(setting: Setting, data: Data) -> Callable[[], float]:
    """For timing: takes one step after another, always on the same batch."""
    contender = make(setting, len(data.train_x), 10**6)
    x, y = data.train_x[: setting.batch_size], data.train_y[: setting.batch_size]
    store = None  # each guide has a parameter store of its own

    def step() -> float:
        nonlocal store
        with pyro.get_param_store().scope(store) as store:
            return contender.step(x, y)

    return step


def run(setting: Setting, data: Data) -> dict[str, Any]:
    """Train and measure.

    :return: plain data.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(setting.seed)
    if setting.held_out:
        x, y = data.train_x, data.train_y
        data = Data(x[:50_000], y[:50_000], x[50_000:], y[50_000:], data.digits)
    train_x, train_y = data.train_x, data.train_y
    if setting.tempered:
        train_x, train_y = train_x[:-CALIBRATION], train_y[:-CALIBRATION]
    num_steps = setting.epochs * math.ceil(len(train_x) / setting.batch_size)
    contender = make(setting, len(train_x), num_steps)
    notes: dict[str, Any] = {"loss": []}
    sets = []
    start = time.perf_counter()
    for _ in range(setting.epochs):
        losses = [
            contender.step(train_x[index], train_y[index])
            for index in torch.randperm(len(train_x)).split(setting.batch_size)
        ]
        notes["loss"].append(sum(losses) / len(losses))
        if not math.isfinite(notes["loss"][-1]):
            break
        if isinstance(contender.guide, AutoSparseNormal):
            sets.append(contender.guide.active_sets)
        if setting.agreement:
            notes.setdefault("agreement", []).append(agreement(contender.guide))
    seconds = time.perf_counter() - start
    if sets:
        notes["kept"] = [mean(overlap(a, sets[-1]), sets[-1]) for a in sets]
        notes["densities"] = {name: active.density for name, active in sets[-1].items()}
    result = {"active": contender.active, "seconds": seconds, **notes}
    with torch.no_grad():
        if contender.guide is not None:
            batch = train_x[:1000], train_y[:1000]
            parts = elbo_parts(contender.model, contender.guide, *batch)
            result["kl"] = sum(parts.kl.values())
        temperature = 1.0
        if setting.tempered:
            held_out = data.train_x[-CALIBRATION:], data.train_y[-CALIBRATION:]
            temperature = result["temperature"] = fit_temperature(contender, *held_out)
        result |= evaluate(contender, data, temperature)
    return result


def mean(values: dict[str, float], active_sets: dict[str, Any]) -> float:
    """Of the sites that are sparse."""
    sparse = [value for name, value in values.items() if active_sets[name].density < 1]
    return sum(sparse) / len(sparse) if sparse else 1.0


def fit_temperature(contender: Any, x: Tensor, y: Tensor) -> float:
    """The temperature with the best likelihood, of a grid."""
    logits = contender.logits_at_mean(x)
    grid = torch.logspace(-1, 1, 201).tolist()
    return min(grid, key=lambda temperature: F.cross_entropy(logits / temperature, y).item())


def predict(contender: Any, x: Tensor, temperature: float = 1.0) -> Tensor:
    """Class probabilities of posterior samples, ``[S, N, 10]``."""
    num_samples = 1 if contender.guide is None else NUM_SAMPLES
    return torch.stack(
        [
            torch.cat(
                [(contender.logits(part) / temperature).softmax(-1) for part in x.split(2000)]
            )
            for _ in range(num_samples)
        ]
    )


def evaluate(contender: Any, data: Data, temperature: float) -> dict[str, Any]:
    probs = predict(contender, data.test_x, temperature)
    result = scores(probs.mean(0), data.test_y)
    at_mean = (contender.logits_at_mean(data.test_x) / temperature).softmax(-1)
    result |= {f"{key}_at_mean": value for key, value in scores(at_mean, data.test_y).items()}
    result["reliability"] = reliability(probs.mean(0), data.test_y)
    few = data._replace(test_x=data.test_x[:4000])
    usual = uncertainty(probs[:, :4000])
    for name, x in elsewhere(few):
        strange = uncertainty(predict(contender, x, temperature))
        truth = torch.cat([torch.zeros(len(usual.total)), torch.ones(len(strange.total))])
        for kind in ("total", "epistemic"):
            score = torch.cat([getattr(usual, kind), getattr(strange, kind)]).nan_to_num()
            result[f"auroc_{kind}_{name}"] = float(roc_auc_score(truth, score))
            result[f"aupr_{kind}_{name}"] = float(average_precision_score(truth, score))
    return result


def elsewhere(data: Data) -> Iterator[tuple[str, Tensor]]:
    """Images that a net should be less sure of."""
    x = data.test_x
    generator = torch.Generator().manual_seed(0)
    yield "digits", data.digits
    yield "rotated", x.rot90(1, (-2, -1))
    yield "noisy", x + torch.randn(x.shape, generator=generator)
    yield "inverted", x.max() + x.min() - x


def scores(probs: Tensor, labels: Tensor) -> dict[str, float]:
    brier = (probs - F.one_hot(labels, probs.shape[-1])).square().sum(-1).mean()
    return {**measures(probs, labels), "brier": float(brier)}


def reliability(probs: Tensor, labels: Tensor, bins: int = 15) -> list[list[float]]:
    """Confidence, accuracy and share of the predictions in each bin that has some."""
    confidence, predicted = probs.max(-1)
    place = (confidence * bins).long().clamp(max=bins - 1)
    rows = []
    for i in range(bins):
        inside = place == i
        if inside.any():
            right = (predicted == labels)[inside].float()
            rows.append([float(t.mean()) for t in (confidence[inside], right, inside.float())])
    return rows


def agreement(guide: AutoSparseNormal) -> dict[str, list[float]]:
    """How alike two criteria are: of the 30 % that each would remove, intersection over union, and
    Spearman's rank correlation of their scores; over all sparse weights, site by site."""
    posterior = guide.posterior()
    result: dict[str, list[float]] = {}
    for a, b in combinations(REMOVAL, 2):
        ious, correlations = [], []
        for name, active in guide.active_sets.items():
            if active.density == 1:
                continue
            q = posterior[name]
            first, second = (REMOVAL[each](q.loc, q.scale) for each in (a, b))
            n = round(0.3 * len(active))
            worst = [scores.topk(n, largest=False).indices for scores in (first, second)]
            both = int(torch.isin(*worst).sum())
            ious.append(both / (2 * n - both))
            correlations.append(float(spearmanr(first, second).statistic))
        result[f"{a} {b}"] = [sum(each) / len(each) for each in (ious, correlations)]
    return result
