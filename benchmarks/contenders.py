"""Ways to train a network: each is built once, then steps on command.

All get the same batch again and again. The Pyro contenders get one and the same model: the weights
and biases of layers are sites with the prior Normal(0, 0.1), and the likelihood of a
minibatch stands for :data:`NUM_DATA` images. They start at a draw of the prior: by default
AutoNormal would draw 15, and that, not training, would be its peak of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_sample
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from pyro_ssvi import (
    SSVI,
    AutoSparseDelta,
    AutoSparseGuide,
    AutoSparseLowRankMultivariateNormal,
    AutoSparseNormal,
    CosineSchedule,
    kernels,
)
from pyro_ssvi.nn import bayesianize
from pyro_ssvi.structures import Columns, Rows, Tiles

NUM_DATA = 60_000
PRIOR_SCALE = 0.1
INIT_SCALE = 0.01
LEARNING_RATE = 1e-3
EXCHANGE_EVERY = 100
RANK = 10


class Batch:
    """Random images and labels. Their index is made once: Pyro would draw 60,000 each step."""

    def __init__(self, size: int, shape: Sequence[int], classes: int) -> None:
        generator = torch.Generator(torch.get_default_device()).manual_seed(0)
        self.x = torch.rand(size, *shape, generator=generator)
        self.y = torch.randint(classes, (size,), generator=generator)
        self.index = torch.arange(size)


def perceptron(sizes: Sequence[int], device: str | None = None) -> nn.Module:
    """:param device: "meta" for a net without numbers, whose weights others draw."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out, device=device), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def resnet18(classes: int) -> nn.Module:
    """torchvision's ResNet-18, with the usual stem for images of 32x32 pixels."""
    from torchvision.models import resnet18  # loaded for this net only

    net = resnet18(num_classes=classes)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


def weights_of(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that get a posterior: all but those of normalisation."""
    return {
        f"{layer}.{name}": parameter
        for layer, module in net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for name, parameter in module.named_parameters()
    }


class Contender:
    """What the benchmark asks of all contenders.

    :ivar exchange_step: a step with an exchange of coordinates, where there is such a thing.
    """

    exchange_step: Callable[[], float] | None = None

    def step(self) -> float:
        """Take a training step, without any exchange, and return the loss."""
        raise NotImplementedError

    def state(self) -> Any:
        """Everything that is kept from one step to the next, in nested containers."""
        raise NotImplementedError

    def flops(self) -> int:
        """Floating point operations of the products of one step."""
        with FlopCounterMode(display=False) as counter:
            self.step()
        return counter.get_total_flops()

    def state_bytes(self) -> int:
        """Bytes of parameters, optimizer state, buffers and active sets; views count once."""
        storages = {t.untyped_storage().data_ptr(): t for t in tensors_in(self.state())}
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


class Deterministic(Contender):
    """A plain network, trained by Adam."""

    def __init__(self, net: nn.Module, batch: Batch) -> None:
        self.net, self.batch = net, batch
        self.optim = self.make_optim()

    def make_optim(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.parameters(), lr=LEARNING_RATE)

    def step(self) -> float:
        loss = self.backward()
        self.optim.step()
        return loss.item()

    def backward(self) -> Tensor:
        self.optim.zero_grad()
        loss = F.cross_entropy(self.net(self.batch.x), self.batch.y)
        loss.backward()
        return loss

    def state(self) -> Any:
        return [*self.net.parameters(), dict(self.optim.state), self.optim.param_groups]


class Ivon(Deterministic):
    """A plain network, trained by IVON (Shen et al., ICML 2024) with one sample a step."""

    def make_optim(self) -> torch.optim.Optimizer:
        from ivon import IVON  # not everyone has it

        return IVON(self.net.parameters(), lr=0.1, ess=NUM_DATA)

    def step(self) -> float:
        with self.optim.sampled_params(train=True):
            loss = self.backward()
        self.optim.step()
        return loss.item()


class Masked(Contender):
    """The paper's way: dense locations and scales times 0/1 masks, in dense products.

    Written in plain torch with the KL divergence in closed form, and without exchanges: faster than
    it would be in Pyro.
    """

    def __init__(self, net: nn.Module, batch: Batch, density: float) -> None:
        self.net, self.batch = net, batch
        weights = weights_of(net)
        raw_scale = torch.tensor(INIT_SCALE).expm1().log().item()  # softplus makes it INIT_SCALE
        self.locs = {n: nn.Parameter(torch.randn_like(w) * PRIOR_SCALE) for n, w in weights.items()}
        self.raws = {n: nn.Parameter(torch.full_like(w, raw_scale)) for n, w in weights.items()}
        self.masks = {
            n: (torch.rand_like(w) < density).float() for n, w in weights.items() if w.dim() > 1
        }
        others = [p for n, p in net.named_parameters() if n not in weights]
        for weight in weights.values():
            weight.data = torch.empty(0)  # its place is taken
        parameters = [*self.locs.values(), *self.raws.values(), *others]
        self.optim = torch.optim.Adam(parameters, lr=LEARNING_RATE)

    def step(self) -> float:
        self.optim.zero_grad()
        kl = torch.zeros(())
        values = {}
        for name, loc in self.locs.items():
            scale = F.softplus(self.raws[name])
            value = torch.addcmul(loc, scale, torch.randn_like(loc))
            square = (loc.square() + scale.square()) / (2 * PRIOR_SCALE**2)
            kl_each = square - scale.log()  # up to a constant
            mask = self.masks.get(name)
            if mask is not None:
                value, kl_each = value * mask, kl_each * mask
            values[name] = value
            kl = kl + kl_each.sum()
        logits = functional_call(self.net, values, self.batch.x)
        loss = NUM_DATA * F.cross_entropy(logits, self.batch.y) + kl
        loss.backward()
        self.optim.step()
        return loss.item()

    def state(self) -> Any:
        parts = [self.locs, self.raws, self.masks, dict(self.optim.state)]
        return [*parts, *self.net.parameters(), *self.net.buffers()]


class Bayesian(Contender):
    """The Pyro model with AutoNormal."""

    def __init__(self, net: nn.Module, batch: Batch, elbo: Any) -> None:
        self.net, self.batch, self.elbo = bayesianize(net, PRIOR_SCALE), batch, elbo
        if all(parameter.is_meta for parameter in net.parameters()):
            net.to_empty(device=batch.x.device)
        self.guide = self.make_guide(init_loc_fn=init_to_sample, init_scale=INIT_SCALE)
        self.svi = self.make_svi(pyro.optim.Adam({"lr": LEARNING_RATE}))

    def make_guide(self, **options: Any) -> Any:
        return AutoNormal(self.model, create_plates=self.plate, **options)

    def make_svi(self, optim: Any) -> SVI:
        return SVI(self.model, self.guide, optim, self.elbo)

    def plate(self, x: Tensor, y: Tensor) -> pyro.plate:
        return pyro.plate("data", NUM_DATA, subsample=self.batch.index, dim=-1)

    def model(self, x: Tensor, y: Tensor) -> None:
        logits = self.net(x)
        with self.plate(x, y):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    def step(self) -> float:
        return self.svi.step(self.batch.x, self.batch.y)

    def state(self) -> Any:
        optims = [dict(optim.state) for optim in self.svi.optim.optim_objs.values()]
        parts = [*self.guide.parameters(), *self.guide.buffers(), optims]
        return [*parts, *self.net.parameters(), *self.net.buffers()]


def fits(tiles: Tiles, shape: torch.Size, density: float) -> bool:
    try:
        return tiles.count(shape, density) > 0
    except ValueError:
        return False


class Sparse(Bayesian):
    """The Pyro model with AutoSparseNormal and SSVI.

    With ``tiles``, weights that these divide are active by tiles; the others, such as those of ten
    outputs, by single coordinates. At its first exchanges the schedule moves 30 % of the
    coordinates: no later one costs more.
    """

    def __init__(
        self,
        net: nn.Module,
        batch: Batch,
        density: float,
        elbo: Any,
        backend: str = "auto",
        family: type[AutoSparseGuide] = AutoSparseNormal,
        tiles: Tiles | None = None,
    ) -> None:
        self.density, self.family = density, family
        self.structure = {
            f"net.{name}": tiles
            for name, weight in weights_of(net).items()
            if tiles is not None and weight.dim() > 1 and fits(tiles, weight.shape, density)
        }
        super().__init__(net, batch, elbo)
        kernels.use(backend)

    def make_guide(self, **options: Any) -> Any:
        if self.family is AutoSparseDelta:
            del options["init_scale"]
        if self.family is AutoSparseLowRankMultivariateNormal:
            options["rank"] = RANK
        return self.family(
            self.model,
            density=self.density,
            structure=self.structure,
            create_plates=self.plate,
            **options,
        )

    def make_svi(self, optim: Any) -> SVI:
        schedule = CosineSchedule(every=EXCHANGE_EVERY, fraction=0.3, stop=10**9)
        return SSVI(self.model, self.guide, optim, self.elbo, schedule=schedule)

    def step(self) -> float:
        if (self.svi.steps + 1) % EXCHANGE_EVERY == 0:
            self.svi.steps += 1  # skip the step that would be followed by an exchange
        return super().step()

    def exchange_step(self) -> float:
        self.svi.steps += EXCHANGE_EVERY - 1 - self.svi.steps % EXCHANGE_EVERY
        return super().step()

    def flops(self) -> int:
        places = {}  # of the results of each layer: each uses all its weights once

        def count(name: str, x: Tensor) -> None:
            places[name] = x.numel() // x.shape[1]

        hooks = [
            module.register_forward_hook(
                lambda _m, _x, out, name=name: count(f"net.{name}.weight", out)
            )
            for name, module in self.net.module.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        ]
        self.step()
        for hook in hooks:
            hook.remove()
        active = {name: len(each) for name, each in self.guide.active_sets.items()}
        # Forward, the weights' gradient and the input's; the first layer's input needs none.
        products = [2, *(3 for _ in places)]
        each = [2 * active[name] * n for name, n in places.items()]
        return sum(n * flops for n, flops in zip(products, each, strict=False))

    def state(self) -> Any:
        sets = self.guide.active_sets.values()
        tilings = [tiling for active in sets for tiling in active._tilings.values()]
        units = [tiling.units for tiling in tilings]
        return [super().state(), [vars(each) for each in (*sets, *tilings, *units)]]


class Exponential(AutoSparseNormal):
    """Standard deviations through exp instead of softplus."""

    scale_constraint = dist.constraints.positive


CONTENDERS: dict[str, Callable[[nn.Module, Batch, float], Contender]] = {
    "autonormal": lambda net, batch, _: Bayesian(net, batch, Trace_ELBO()),
    "autonormal-meanfield": lambda net, batch, _: Bayesian(net, batch, TraceMeanField_ELBO()),
    "deterministic": lambda net, batch, _: Deterministic(net, batch),
    "ivon": lambda net, batch, _: Ivon(net, batch),
    "masked": Masked,
    "ssvi": lambda *args: Sparse(*args, Trace_ELBO()),
    "ssvi-meanfield": lambda *args: Sparse(*args, TraceMeanField_ELBO()),
    "ssvi-exp": lambda *args: Sparse(*args, Trace_ELBO(), family=Exponential),
    "ssvi-delta": lambda *args: Sparse(*args, Trace_ELBO(), family=AutoSparseDelta),
    "ssvi-lowrank": lambda *args: Sparse(
        *args, Trace_ELBO(), family=AutoSparseLowRankMultivariateNormal
    ),
    "ssvi-tiles": lambda *args: Sparse(*args, Trace_ELBO(), tiles=Tiles(4, 4)),
    "ssvi-rows": lambda *args: Sparse(*args, Trace_ELBO(), tiles=Rows()),
    "ssvi-columns": lambda *args: Sparse(*args, Trace_ELBO(), tiles=Columns()),
    "ssvi-torch": lambda *args: Sparse(*args, Trace_ELBO(), backend="torch"),
}
