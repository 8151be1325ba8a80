"""Networks written in plain torch as Pyro models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.params import param_with_module_name
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Bayesianized", "bayesianize"]

#: ``prior(name, shape)`` gives the prior of a parameter.
Prior = Callable[[str, torch.Size], dist.TorchDistribution]

_NORMALISATION = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),  # torch 2.4
)


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
        lacking = [
            f"{self.name}.{key}"
            for key, shape in self.shapes.items()
            if getattr(values.get(f"{self.name}.{key}"), "shape", None) != shape
        ]
        if lacking:
            raise ValueError(f"expected tensors of the parameters' shapes for {lacking}")
        module = copy.deepcopy(self.module)
        parameters = dict(module.named_parameters())
        for key in self.shapes:
            parameters[key].data = values[f"{self.name}.{key}"].detach().clone()
        return module


def _independent(base: dist.TorchDistribution) -> Prior:
    return lambda key, shape: base.expand(shape).to_event(len(shape))
