"""Networks written in plain torch as Pyro models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro.params import param_with_module_name
from torch import Tensor, nn
from torch.func import functional_call

from .active_set import ActiveSet
from .sparse_tensor import SparseTensor
from .structures import read_structure, structure_state

if TYPE_CHECKING:
    from .guides import AutoSparseGuide

__all__ = ["Bayesianized", "SparseNetwork", "bayesianize", "shrink"]

#: ``prior(name, shape)`` gives the prior of a parameter.
Prior = Callable[[str, torch.Size], dist.TorchDistribution]

_NORMALISATION = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),  # torch 2.4
)

# The same function of every unit, with no parameters; Dropout is none in predictions.
_ELEMENTWISE = {
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh),
    *(nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid),
    *(nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold),
    *(nn.Dropout, nn.Identity),
}


def bayesianize(
    module: nn.Module,
    prior: float | Prior = 1.0,
    *,
    trained: Collection[str] = (),
    name: str = "net",
) -> Bayesianized:
    """Turn a network into a part of a Pyro model: its weights and biases become sample sites.

    The parameters of normalisation layers stay parameters, trained by the same optimizer, unless
    they are frozen (``requires_grad=False``). A weight that two layers share is one site. Call the
    result as you would the network, and give its output a likelihood::

        net = bayesianize(torchvision.models.resnet18(num_classes=10), prior=0.1)

        def model(x, y=None):
            logits = net(x)
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    To save a network with normalisation layers, make the model a module that has it as a part:
    of one that a function only calls, their running statistics are out of sight.

    The numbers that the weights had are given up: nothing of their size is kept.

    :param module: the network. It is taken over, not copied.
    :param prior: standard deviation of independent normals around 0, or a
        ``callable(name, shape)`` that gives each parameter's distribution. It is called in every
        run of the model, so it may have sample statements of its own.
    :param trained: names of more parameters that stay parameters.
    :param name: prefix of the names of sites and parameters, ``"net.conv1.weight"``.
    :raises ValueError: if ``trained`` names a parameter that is not there, or names them all, or if
        a parameter has no elements.
    """
    return Bayesianized(module, prior, trained, name)


class Bayesianized(nn.Module):
    """What :func:`bayesianize` returns.

    :ivar module: the network; its weights are empty.
    :ivar shapes: shape of each parameter that is a sample site, by its name in the network.
    """

    def __init__(
        self, module: nn.Module, prior: float | Prior, trained: Collection[str], name: str
    ) -> None:
        super().__init__()
        self.module, self.prior, self.name = module, prior, name
        parameters = dict(module.named_parameters())
        unknown = sorted(set(trained) - set(parameters))
        if unknown:
            raise ValueError(f"trained names {unknown}, but the parameters are {list(parameters)}")
        kept = {parameters[key] for key in trained}
        for part in module.modules():
            if isinstance(part, _NORMALISATION):
                kept.update(part.parameters(recurse=False))
        empty = [key for key, parameter in parameters.items() if 0 in parameter.shape]
        if empty:
            raise ValueError(
                f"parameters {empty} have no elements: was the module made Bayesian before?"
            )
        self.trained = [key for key, parameter in parameters.items() if parameter in kept]
        self.shapes = {k: p.shape for k, p in parameters.items() if p not in kept}
        if not self.shapes:
            raise ValueError("no parameter of the module is left to be a sample site")
        for key in self.shapes:
            parameters[key].data = parameters[key].new_empty(0)
        for key in self.trained:  # as the parameter store would have them
            parameters[key].data = parameters[key].data.contiguous()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Draw the weights and run the network."""
        parameters = dict(self.module.named_parameters())
        values: dict[str, Tensor] = {}
        for key in self.trained:
            own = parameters[key]
            if not own.requires_grad:  # frozen: pyro.param would train it
                values[key] = own
                continue
            full_name = param_with_module_name(self.name, key)
            values[key] = pyro.param(full_name, own)
            if values[key] is not own:
                raise ValueError(
                    f"the parameter store holds another {full_name!r}: give each network a name= "
                    "of its own, or call pyro.clear_param_store() before you make a new one"
                )
        prior = self.prior
        if not callable(prior):
            zero = parameters[next(iter(self.shapes))].new_zeros(())  # in the network's place
            prior = _independent(dist.Normal(zero, prior))
        for key, shape in self.shapes.items():
            values[key] = pyro.sample(f"{self.name}.{key}", prior(key, shape))
            if values[key].shape[-len(shape) :] != shape:
                raise ValueError(
                    f"the prior of {key!r} gives values of shape {tuple(values[key].shape)}, "
                    f"expected {tuple(shape)}"
                )
        return functional_call(self.module, values, args, kwargs)

    def with_weights(self, values: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the network with these weights, such as ``guide.median()``: torch's own.

        :param values: a tensor for each sample site, by its name, as those of
            ``guide.median()``. Others are not looked at.
        :raises ValueError: if some are not there, or have other shapes.
        """
        self._refuse_lacking(values)
        return self._filled({key: values[f"{self.name}.{key}"] for key in self.shapes})

    def with_sparse_weights(self, guide: AutoSparseGuide) -> SparseNetwork:
        """A copy of the network with a posterior's mean weights (of a constrained one, the
        median), which stay sparse.

        :param guide: of a model with this network.
        :raises ValueError: if it lacks some of the network's weights, or has other shapes.
        """
        self._refuse_lacking(guide.active_sets)
        with torch.no_grad():
            loc, _ = guide.marginals(*guide.flat_parameters())
        parts = {
            site.name: value if site.transform is None else site.transform(value.view(site.shape))
            for site, (value,) in zip(guide.sites, guide.split(loc), strict=True)
        }
        dense, sparse = {}, {}
        for key, shape in self.shapes.items():
            active = guide.active_sets[f"{self.name}.{key}"]
            values = parts[f"{self.name}.{key}"]
            if active.is_full:
                dense[key] = values.reshape(shape)
            else:
                sparse[key] = SparseTensor(values, active)
        return SparseNetwork(self._filled(dense), sparse)

    def _refuse_lacking(self, values: Mapping[str, Any]) -> None:
        lacking = [
            f"{self.name}.{key}"
            for key, shape in self.shapes.items()
            if getattr(values.get(f"{self.name}.{key}"), "shape", None) != shape
        ]
        if lacking:
            raise ValueError(f"expected tensors of the parameters' shapes for {lacking}")

    def _filled(self, values: Mapping[str, Tensor]) -> nn.Module:
        module = copy.deepcopy(self.module)
        parameters = dict(module.named_parameters())
        for key, value in values.items():
            parameters[key].data = value.detach().clone()
        return module


class SparseNetwork(nn.Module):
    """A network for predictions with sparse weights: in memory, in products and in files.

    :meth:`Bayesianized.with_sparse_weights` makes one. Its ``state_dict()`` has plain tensors, and
    another program needs the network's class, and no Pyro model, to take it::

        fresh = SparseNetwork(torch.nn.Linear(784, 10))
        fresh.load_state_dict(torch.load("sparse.pt", weights_only=True))

    :param module: the network. It is taken over, not copied; its parameters that are sparse
        become empty.
    :param weights: sparse values of parameters, by their names.
    """

    values: Tensor  # of all sparse weights, one after the other
    indices: Tensor

    def __init__(
        self, module: nn.Module, weights: Mapping[str, SparseTensor] | None = None
    ) -> None:
        super().__init__()
        self.module = module
        weights = weights or {}
        values = [weight.values.detach() for weight in weights.values()]
        indices = [weight.active.indices for weight in weights.values()]
        narrow = all(weight.shape.numel() < 2**31 for weight in weights.values())
        self.register_buffer("values", torch.cat(values or [torch.empty(0)]))
        flat = torch.cat(indices or [torch.empty(0, dtype=torch.int64)])
        self.register_buffer("indices", flat.int() if narrow else flat)
        self._set_up({key: _entry(weight.active) for key, weight in weights.items()})

    def _set_up(self, table: Mapping[str, Any]) -> None:
        self.table = dict(table)  # what each sparse weight's indices mean
        self._active: dict[str, ActiveSet] = {}
        parameters = dict(self.module.named_parameters())
        for key in self.table:
            parameters[key].requires_grad_(False).data = parameters[key].new_empty(0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network; its sparse weights have no gradients."""
        if not self._active or next(iter(self._active.values())).device != self.indices.device:
            self._active = dict(self._active_sets())
        parts = self.values.split([k for _, k, _ in self.table.values()])
        weights: dict[str, Tensor] = {
            key: SparseTensor(part, self._active[key])
            for key, part in zip(self.table, parts, strict=True)
        }
        return functional_call(self.module, weights, args, kwargs)

    def _active_sets(self) -> Iterator[tuple[str, ActiveSet]]:
        parts = self.indices.long().split([k for _, k, _ in self.table.values()])
        for (key, (shape, _, structure)), part in zip(self.table.items(), parts, strict=True):
            yield key, ActiveSet(part, shape, read_structure(structure))

    def get_extra_state(self) -> dict[str, Any]:
        """Which weights are sparse."""
        return self.table

    def set_extra_state(self, state: Any) -> None:
        """Nothing is left to do: the tensors were made for it."""

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        table = state_dict.get(f"{prefix}_extra_state", self.table)
        self._set_up(table)
        for name in ("values", "indices"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                own = getattr(self, name)
                setattr(self, name, own.new_empty(saved.shape, dtype=saved.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@torch.no_grad()
def shrink(network: nn.Sequential) -> nn.Sequential:
    """A copy of a perceptron without the hidden units that make no difference: smaller, and torch's
    own.

    A unit goes if the next layer does not read it, where its column is 0, or if it reads nothing,
    where its row is 0: such a unit is constant, and what it adds goes to the next layer's bias.
    Of a posterior with whole rows or columns, many are such, see :meth:`Bayesianized.with_weights`.

    :param network: :class:`torch.nn.Linear` layers, with elementwise activations between them.
        Whatever comes before the first or after the last stays as it is.
    :return: the network for predictions, in ``eval`` mode. It takes the same inputs and gives the
        same outputs, but for rounding. At least one unit of each layer stays.
    :raises ValueError: if it is not such a network.
    """
    if type(network).forward is not nn.Sequential.forward:
        raise ValueError(
            f"shrink expects an nn.Sequential, got {type(network).__name__}: shrink the parts of "
            "a network that are one"
        )
    network = copy.deepcopy(network).eval()
    layers = {i: layer for i, layer in enumerate(network) if type(layer) is nn.Linear}
    between = [nn.Sequential(*list(network)[i + 1 : j]) for i, j in pairwise(layers)]
    for part in chain.from_iterable(between):
        if type(part) not in _ELEMENTWISE:
            raise ValueError(
                f"shrink expects nothing but torch's elementwise activations between nn.Linear "
                f"layers, got {part}"
            )
    weights: list[Tensor] = [layer.weight for layer in layers.values()]
    biases: list[Tensor] = [
        layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
        for layer in layers.values()
    ]

    def keep(i: int, units: Tensor) -> None:
        weights[i], biases[i] = weights[i][units], biases[i][units]
        weights[i + 1] = weights[i + 1][:, units]

    for i, activation in enumerate(between):  # an earlier layer may leave a later one constants
        reads = _at_least_one((weights[i] != 0).any(1))
        biases[i + 1] = biases[i + 1] + weights[i + 1][:, ~reads] @ activation(biases[i][~reads])
        keep(i, reads)
    for i in reversed(range(len(between))):  # a later one may leave an earlier one unread units
        keep(i, _at_least_one((weights[i + 1] != 0).any(0)))
    for i, weight, bias in zip(layers, weights, biases, strict=True):
        network[i] = layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return network.eval()


def _at_least_one(chosen: Tensor) -> Tensor:
    """Layers without units are more than some compilers and exporters take."""
    return chosen if chosen.any() else torch.arange(len(chosen), device=chosen.device) == 0


def _entry(active: ActiveSet) -> tuple[list[int], int, dict[str, Any] | None]:
    """What a file says of a sparse weight: shape, number of active coordinates, structure."""
    return list(active.shape), len(active), structure_state(active.structure)


def _independent(base: dist.TorchDistribution) -> Prior:
    return lambda key, shape: base.expand(shape).to_event(len(shape))
