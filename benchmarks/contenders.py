"""Ways to train one multi-layer perceptron: each is built once, then steps on command.

All get the same batch again and again. The Pyro contenders get one and the same model: the weights
``[out, in]`` and the biases are sites with the prior Normal(0, 0.1), and the likelihood of a
minibatch stands for :data:`NUM_DATA` images. They start at a draw of the prior: by default
AutoNormal would draw 15, and that, not training, would be its peak of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_sample
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pyro_ssvi import SSVI, AutoSparseNormal, CosineSchedule, kernels

NUM_DATA = 60_000
PRIOR_SCALE = 0.1
INIT_SCALE = 0.01
LEARNING_RATE = 1e-3
EXCHANGE_EVERY = 100


class Batch:
    """Random images and labels. Their index is made once: Pyro would draw 60,000 each step."""

    def __init__(self, size: int, features: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(size, features, generator=generator)
        self.y = torch.randint(classes, (size,), generator=generator)
        self.index = torch.arange(size)


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

    def __init__(self, sizes: list[int], batch: Batch) -> None:
        self.batch = batch
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
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

    def __init__(self, sizes: list[int], batch: Batch, density: float) -> None:
        self.batch = batch
        shapes = [shape for i, o in pairwise(sizes) for shape in ((o, i), (o,))]
        raw_scale = torch.tensor(INIT_SCALE).expm1().log().item()  # softplus makes it INIT_SCALE
        self.locs = [nn.Parameter(torch.randn(s) * PRIOR_SCALE) for s in shapes]
        self.raws = [nn.Parameter(torch.full(s, raw_scale)) for s in shapes]
        self.masks = [(torch.rand(s) < density).float() if len(s) == 2 else None for s in shapes]
        self.optim = torch.optim.Adam([*self.locs, *self.raws], lr=LEARNING_RATE)

    def step(self) -> float:
        self.optim.zero_grad()
        kl = torch.zeros(())
        values = []
        for loc, raw, mask in zip(self.locs, self.raws, self.masks, strict=True):
            scale = F.softplus(raw)
            value = torch.addcmul(loc, scale, torch.randn_like(loc))
            square = (loc.square() + scale.square()) / (2 * PRIOR_SCALE**2)
            kl_each = square - scale.log()  # up to a constant
            if mask is not None:
                value, kl_each = value * mask, kl_each * mask
            values.append(value)
            kl = kl + kl_each.sum()
        x = self.batch.x
        for i, (weight, bias) in enumerate(zip(values[::2], values[1::2], strict=True)):
            x = F.linear(x if i == 0 else F.relu(x), weight, bias)
        loss = NUM_DATA * F.cross_entropy(x, self.batch.y) + kl
        loss.backward()
        self.optim.step()
        return loss.item()

    def state(self) -> Any:
        return [self.locs, self.raws, self.masks, dict(self.optim.state)]


class Bayesian(Contender):
    """The Pyro model with AutoNormal."""

    def __init__(self, sizes: list[int], batch: Batch, elbo: Any) -> None:
        self.sizes, self.batch = sizes, batch
        self.elbo = elbo
        self.guide = self.make_guide(init_loc_fn=init_to_sample, init_scale=INIT_SCALE)
        self.svi = self.make_svi(pyro.optim.Adam({"lr": LEARNING_RATE}))

    def make_guide(self, **options: Any) -> Any:
        return AutoNormal(self.model, create_plates=self.plate, **options)

    def make_svi(self, optim: Any) -> SVI:
        return SVI(self.model, self.guide, optim, self.elbo)

    def plate(self, x: Tensor, y: Tensor) -> pyro.plate:
        return pyro.plate("data", NUM_DATA, subsample=self.batch.index, dim=-1)

    def model(self, x: Tensor, y: Tensor) -> None:
        prior = dist.Normal(0.0, PRIOR_SCALE)
        for i, (fan_in, fan_out) in enumerate(pairwise(self.sizes)):
            w = pyro.sample(f"w{i}", prior.expand([fan_out, fan_in]).to_event(2))
            b = pyro.sample(f"b{i}", prior.expand([fan_out]).to_event(1))
            x = F.linear(x if i == 0 else F.relu(x), w, b)
        with self.plate(x, y):
            pyro.sample("obs", dist.Categorical(logits=x), obs=y)

    def step(self) -> float:
        return self.svi.step(self.batch.x, self.batch.y)

    def state(self) -> Any:
        optims = [dict(optim.state) for optim in self.svi.optim.optim_objs.values()]
        return [*self.guide.parameters(), *self.guide.buffers(), optims]


class Sparse(Bayesian):
    """The Pyro model with AutoSparseNormal and SSVI.

    At its first exchanges the schedule moves 30 % of the coordinates: no later one costs more.
    """

    def __init__(
        self, sizes: list[int], batch: Batch, density: float, elbo: Any, backend: str = "auto"
    ) -> None:
        self.density = density
        super().__init__(sizes, batch, elbo)
        kernels.use(backend)

    def make_guide(self, **options: Any) -> Any:
        return AutoSparseNormal(
            self.model, density=self.density, create_plates=self.plate, **options
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
        weights = [active for active in self.guide.active_sets.values() if len(active.shape) == 2]
        # Forward, the weights' gradient and the input's; the first layer's input needs none.
        products = [2 if i == 0 else 3 for i in range(len(weights))]
        each = [2 * len(active) * len(self.batch.x) for active in weights]
        return sum(n * flops for n, flops in zip(products, each, strict=True))

    def state(self) -> Any:
        return [super().state(), [vars(active) for active in self.guide.active_sets.values()]]


CONTENDERS: dict[str, Callable[[list[int], Batch, float], Contender]] = {
    "autonormal": lambda sizes, batch, _: Bayesian(sizes, batch, Trace_ELBO()),
    "autonormal-meanfield": lambda sizes, batch, _: Bayesian(sizes, batch, TraceMeanField_ELBO()),
    "deterministic": lambda sizes, batch, _: Deterministic(sizes, batch),
    "ivon": lambda sizes, batch, _: Ivon(sizes, batch),
    "masked": Masked,
    "ssvi": lambda sizes, batch, density: Sparse(sizes, batch, density, Trace_ELBO()),
    "ssvi-meanfield": lambda *args: Sparse(*args, TraceMeanField_ELBO()),
    "ssvi-torch": lambda *args: Sparse(*args, Trace_ELBO(), backend="torch"),
}
