"""Sparse subspace variational inference."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import LowRankMultivariateNormal, Normal, TransformedDistribution
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceMeanField_ELBO,
    ReweightedWakeSleep,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.infer.tracegraph_elbo import JitTraceGraph_ELBO
from pyro.infer.util import torch_item, zero_grads
from pyro.optim import PyroOptim
from pyro.poutine import runtime
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from . import checkpoint, posterior
from .active_set import ActiveSet
from .addition import Addition, Gradient, addition_criterion
from .criteria import removal_criterion
from .distributions import SparseNormal, SubspaceMessenger, elementwise_base
from .errors import NonFiniteWarning
from .exchange import Move, smallest, swap
from .fused_elbo import FusedELBO, NotFusedError
from .gradient_record import GradientRecord
from .guides import AutoSparseGuide
from .interrupts import uninterrupted
from .optimizer_state import carry_state
from .random_state import leaving_no_trace
from .schedules import CosineSchedule, Schedule

__all__ = ["SSVI", "SubspaceModel"]

_JIT = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)


class SubspaceModel(torch.nn.Module):
    """A model whose priors cover only the active coordinates of a sparse guide's sites.

    :class:`SSVI` wraps its model in this. Use it yourself with :class:`pyro.infer.SVI`, or with
    an ELBO in a loop of your own::

        elbo = Trace_ELBO()(SubspaceModel(model), guide)

    :param model: a Pyro model; if it is a module, it is registered as one.
    """

    def __init__(self, model: Callable) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with SubspaceMessenger():
            return self.model(*args, **kwargs)


class SSVI(SVI):
    """Sparse subspace variational inference (Li, Miao, Qiu, Zhang, ICLR 2024).

    Takes the place of :class:`pyro.infer.SVI` for an :class:`AutoSparseNormal` or another sparse
    guide, or for a guide with such parts. Every step is a step of SVI, but one whose loss or
    gradient is not finite changes nothing and gives a
    :class:`~pyro_ssvi.errors.NonFiniteWarning`. After the steps that the schedule names, each
    sparse site exchanges coordinates: the active ones that matter least are removed and as many
    inactive ones that promise most are added, so their number never changes::

        svi = SSVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(),
                   schedule=CosineSchedule(stop=int(0.75 * num_steps)))
        loss = svi.step(x, y)

    :param model: a Pyro model. Its priors cover active coordinates only.
    :param guide: an :class:`AutoSparseNormal` or another sparse guide, or a module that contains
        some.
    :param optim: a Pyro optimizer. Its state follows its coordinate.
    :param loss: an ELBO, or any ``callable(model, guide, *args, **kwargs)`` that gives a loss;
        those that compile with torch.jit would keep the first active set.
    :param removal: name of a criterion in :mod:`pyro_ssvi.criteria`, or a ``callable(loc, scale)``
        that gives scores; the smallest are removed.
    :param addition: ``"gradient"``, ``"sampled_gradient"``, ``"random"``, an instance of a class in
        :mod:`pyro_ssvi.addition`, or a ``callable(gradient)`` that gives scores; the largest are
        added.
    :param schedule: when to exchange which share, see :mod:`pyro_ssvi.schedules`. Set ``stop``
        to about three quarters of your number of steps.
    :param new_scale: standard deviation of an added coordinate, or ``"mean"``: the mean of those
        of its site that stay.
    :param kl_weight: factor of the KL divergence from the prior (and not of the likelihood): a
        number, or a callable of the number of steps taken so far. Enumerated sites, which are
        summed out, count to the likelihood.
    :param local_reparam: draw the results of products with sparse sites instead of the sites
        themselves (Kingma, Salimans, Welling, 2015): gradients vary less, at the price of a
        second product. Each use of a value in the model is then a draw of its own. Needs a
        loss with closed-form KL: TraceMeanField_ELBO.
    :raises ValueError: for an unknown criterion or an unsuitable loss or schedule.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: PyroOptim,
        loss: Any,
        *,
        removal: str | Callable[[Tensor, Tensor], Tensor] = "snr_abs",
        addition: str | Addition | Callable[[Tensor], Tensor] = "gradient",
        schedule: Schedule | None = None,
        new_scale: float | str = "mean",
        kl_weight: float | Callable[[int], float] = 1.0,
        local_reparam: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(loss, _JIT):
            raise ValueError(
                f"{type(loss).__name__} would go on with the first active set: "
                f"use {type(loss).__name__.removeprefix('Jit')}"
            )
        if local_reparam and not isinstance(loss, TraceMeanField_ELBO):
            raise ValueError(
                "local_reparam=True needs a loss that does not evaluate densities at the drawn "
                f"weights: use TraceMeanField_ELBO, got {type(loss).__name__}"
            )
        if new_scale != "mean" and not (isinstance(new_scale, float) and 0 < new_scale < math.inf):
            raise ValueError(f"expected new_scale='mean' or a float > 0, got {new_scale!r}")
        if not (schedule is None or hasattr(schedule, "due")):
            raise ValueError(f"expected a schedule such as CosineSchedule(), got {schedule!r}")
        if not callable(kl_weight):
            _check_weight(kl_weight)
        super().__init__(SubspaceModel(model), guide, optim, loss, **kwargs)
        if not isinstance(guide, torch.nn.Module):
            raise ValueError(
                f"SSVI cannot find the sparse parts of {guide!r}, which is not a module: apply "
                "handlers in the forward() of a PyroModule that has the guide as an attribute"
            )
        if local_reparam and not all(part.mean_field for part in self.guides):
            kinds = [type(part).__name__ for part in self.guides if not part.mean_field]
            raise ValueError(
                f"local_reparam=True needs independent weights: use AutoSparseNormal, got {kinds}"
            )
        self.removal = removal_criterion(removal)
        self.addition = addition_criterion(addition)
        self.schedule = CosineSchedule() if schedule is None else schedule
        if self.addition.batches > self.schedule.every:
            raise ValueError(
                f"addition averages over {self.addition.batches} batches, but the schedule "
                f"exchanges every {self.schedule.every} steps"
            )
        at_mean = isinstance(self.addition, Gradient) and self.addition.at == "mean"
        if at_mean and getattr(loss, "vectorize_particles", False):
            raise ValueError(
                "Gradient(at='mean') has one value of the weights for all particles: use a loss "
                "without vectorize_particles"
            )
        if isinstance(loss, ReweightedWakeSleep):
            self._check_wake_sleep(loss)
        self.new_scale = new_scale
        self.kl_weight = kl_weight
        self.local_reparam = local_reparam
        #: Number of steps taken.
        self.steps = 0
        self._record = GradientRecord()
        self._elbo = loss
        self._elbo_loss_and_grads = self.loss_and_grads
        self.loss_and_grads: Callable = self._loss_and_grads
        self._fused: FusedELBO | None = None
        # Not before Pyro's own ELBO has looked at every site, in the first step.
        self._may_fuse: bool | None = None

    def _check_wake_sleep(self, loss: ReweightedWakeSleep) -> None:
        if all(guide.density == 1.0 for guide in self.guides):
            return
        if loss.insomnia < 1:
            raise ValueError(
                "the sleep phase of ReweightedWakeSleep draws from the prior, where a sparse "
                f"guide has density 0: use insomnia=1.0, got {loss.insomnia!r}"
            )
        if isinstance(self.addition, Gradient):
            raise ValueError(
                "ReweightedWakeSleep has no gradient in the weights, which it holds fixed: "
                "use addition='random'"
            )

    @property
    def guides(self) -> list[AutoSparseGuide]:
        """The sparse guides that take part in exchanges."""
        return [part for part in self.guide.modules() if isinstance(part, AutoSparseGuide)]

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a gradient step, then exchange coordinates if the schedule says so.

        :return: the estimate of the loss, as :meth:`pyro.infer.SVI.step`.
        """
        now = self.steps + 1
        feeds_exchange = any(self.schedule.due(now + i) for i in range(self.addition.batches))
        with ExitStack() as stack:
            if feeds_exchange:
                self._collect(stack, args, kwargs)
            with poutine.trace(param_only=True) as capture:
                loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
        nodes = capture.trace.nodes
        loss, params = self._agreed(
            loss, {name: nodes[name]["value"].unconstrained() for name in nodes}
        )
        unknown = isinstance(self._elbo, TraceTailAdaptive_ELBO)  # it reports inf at all times
        finite = (unknown or _is_finite(loss)) and _have_finite_gradients(params)
        if finite:
            self.optim(params)
        else:
            warnings.warn(
                f"step {now} skipped: its loss or gradient is not finite",
                NonFiniteWarning,
                stacklevel=2,
            )
            self._record = GradientRecord()
        zero_grads(params)
        self.steps = now
        if finite and self.schedule.due(now):
            self._exchange(self.schedule.share(now))
        if isinstance(loss, tuple):  # as that of ReweightedWakeSleep
            return type(loss)(map(torch_item, loss))
        return torch_item(loss)

    def _agreed(self, loss: Any, params: dict[str, Tensor]) -> tuple[Any, set[Tensor]]:
        """The loss, and the parameters to step, with their gradients.

        :param params: those that were used, by name.
        """
        return loss, set(params.values())

    def _loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Any:
        weight = self._kl_weight()
        # Handlers of others cannot be passed over: that on the stack is the step's own.
        alone = guide is self.guide and len(runtime._PYRO_STACK) == 1
        hooked = self.model._forward_hooks or self.model._forward_pre_hooks
        refused = False
        if self._may_fuse and alone and not hooked:
            settings = args, kwargs, weight, self.local_reparam
            try:
                if self._fused is None or self._fused.guide is not guide:
                    self._fused = FusedELBO(self._elbo, guide, *args, **kwargs)
                    with leaving_no_trace():  # if it cannot serve, nothing has happened
                        self._fused(self.model.model, *settings)
                loss = self._fused(self.model.model, *settings)
            except NotFusedError:
                refused = True
            else:
                if loss.requires_grad:  # not if all is frozen
                    loss.backward()
                return loss.item()
        with self._handlers(weight, self.local_reparam and guide is self.guide):
            result = self._elbo_loss_and_grads(model, guide, *args, **kwargs)
        if refused:  # and Pyro's ELBO did not raise: it is not a mistake of this step
            self._may_fuse, self._fused = False, None
        elif self._may_fuse is None and guide is self.guide:
            self._may_fuse = True
        return result

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The estimate of the loss, without a step."""
        with self._handlers(self._kl_weight(), self.local_reparam):
            return super().evaluate_loss(*args, **kwargs)

    def exchange(
        self,
        *args: Any,
        share: float | None = None,
        optim: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> dict[str, int]:
        """Exchange coordinates now, by the gradient of one batch, and take no step.

        :param share: of each site's active coordinates; by default what the schedule says at
            this step.
        :param optim: the torch optimizer of a loop of your own, whose state is to follow its
            coordinates, too.
        :return: how many coordinates of each site were exchanged.
        """
        if share is None:
            share = self.schedule.share(self.steps)
        elif not 0 <= share <= 1:
            raise ValueError(f"expected a share in [0, 1], got {share!r}")
        self._record = GradientRecord()
        if isinstance(self.addition, Gradient):
            self._backward(args, kwargs, times=self.addition.samples)
        return self._exchange(share, optim)

    def _kl_weight(self) -> float:
        if callable(self.kl_weight):
            return _check_weight(self.kl_weight(self.steps))
        return self.kl_weight

    def state_dict(self) -> dict[str, Any]:
        """All that training needs to go on as if it had never stopped, as plain data.

        Parameters and buffers of guide and model, what the parameter store holds, active sets,
        optimizers and their schedulers, the number of steps, the pending gradient statistics and
        the state of the random generators. Later steps do not change it.
        """
        return checkpoint.state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the guide need not have seen data.

        Settings of this SSVI stay in force. There is a warning if the schedule is another one.

        :raises ValueError: if the state does not fit; then nothing has changed.
        """
        checkpoint.restore(self, state)

    def save(self, path: str | os.PathLike) -> None:
        """Write :meth:`state_dict` to a file, which is at every moment the old or the new one."""
        checkpoint.FILES.write(path, self.state_dict())

    def load(self, path: str | os.PathLike, map_location: Any = None) -> None:
        """Go on from a file that :meth:`save` wrote. No code in it can run.

        :param map_location: as for :func:`torch.load`.
        :raises ValueError: as :meth:`load_state_dict`, and for a file that is damaged.
        """
        checkpoint.restore(self, checkpoint.FILES.read(path, map_location), source=str(path))

    def export(self, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write the posterior alone, for :func:`~pyro_ssvi.load_posterior`: for predictions.

        The file has indices, locations and scales, and the model's own parameters; nothing of
        the optimizer.

        :param dtype: of locations and scales in the file, such as ``torch.bfloat16``; by default
            their own.
        :raises ValueError: if there is another guide than one sparse guide of this package,
            ``dtype`` cannot hold the numbers of a site, or the model trains a module that is no
            part of it.
        """
        posterior.export(self, path, dtype)

    @contextmanager
    def _handlers(self, weight: float, local_reparam: bool) -> Iterator[None]:
        """What this class adds to Pyro's own ELBO."""
        with ExitStack() as stack:
            if weight != 1.0:
                stack.enter_context(_LatentScale(weight))
            if local_reparam:
                stack.enter_context(_LocalReparam())
            yield

    def _collect(self, stack: ExitStack, args: tuple, kwargs: dict) -> None:
        """Have the gradient of whole sites recorded, in the step itself where that will do."""
        assert isinstance(self.addition, Gradient)
        if self.addition.at == "sample":
            self._backward(args, kwargs, times=self.addition.samples - 1)
            stack.enter_context(self._record)
        else:
            self._backward(args, kwargs)

    def _backward(self, args: tuple, kwargs: dict, times: int = 1) -> None:
        """Record gradients of one batch, and leave none with the parameters."""
        at_mean = isinstance(self.addition, Gradient) and self.addition.at == "mean"
        guide = _AtMean()(self.guide) if at_mean else self.guide
        with poutine.trace(param_only=True) as capture, self._record:
            for _ in range(times):
                self.loss_and_grads(self.model, guide, *args, **kwargs)
        zero_grads({node["value"].unconstrained() for node in capture.trace.nodes.values()})

    def _exchange(self, share: float, optim: torch.optim.Optimizer | None = None) -> dict[str, int]:
        record, self._record = self._record, GradientRecord()
        try:
            # All sites are decided before any is changed.
            plans = [(guide, self._plan(guide, share, record)) for guide in self.guides]
        except FloatingPointError as error:
            warnings.warn(
                f"exchange after step {self.steps} skipped: {error}",
                NonFiniteWarning,
                stacklevel=3,
            )
            return {}
        with uninterrupted():
            for guide, moves in plans:
                if not moves:
                    continue
                source = guide.exchange(moves, self.new_scale)
                for param in guide.parameters_in_place():
                    carry_state(self.optim, param, source)
                    if optim is not None:
                        carry_state(optim, param, source)
        return {name: move.size for _, moves in plans for name, move in moves.items()}

    @torch.no_grad()
    def _plan(self, guide: AutoSparseGuide, share: float, record: GradientRecord) -> dict:
        moves: dict[str, Move] = {}
        active_sets = guide.active_sets
        parts = guide.split(*guide.for_removal())
        for site, (loc, scale) in zip(guide.sites, parts, strict=True):
            name, active = site.name, active_sets[site.name]
            n = min(math.floor(share * len(active) + 0.5), active.numel() - len(active))
            if n == 0:
                continue
            if isinstance(self.addition, Gradient) and active not in record:
                continue  # the loss does not depend on this site: no coordinate promises anything
            scores = self.removal(loc.to(site.dtype), scale.to(site.dtype))
            if scores.shape != (len(active),):
                raise ValueError(
                    f"the removal criterion gave scores {tuple(scores.shape)} for site {name!r}, "
                    f"expected ({len(active)},)"
                )
            if not scores.isfinite().all():
                raise FloatingPointError(f"the removal scores of site {name!r} are not finite")
            try:
                added = self._choose(active, n, record)
            except FloatingPointError as error:
                raise FloatingPointError(f"site {name!r}: {error}") from None
            moves[name] = swap(active, smallest(scores, n), added)
        return moves

    def _choose(self, active: ActiveSet, n: int, record: GradientRecord) -> Tensor:
        return self.addition.choose(active, n, record)


def _check_weight(weight: float) -> float:
    if not 0 <= weight < math.inf:
        raise ValueError(f"expected a kl_weight >= 0, got {weight!r}")
    return weight


def _is_finite(loss: Any) -> bool:
    parts = loss if isinstance(loss, tuple) else (loss,)
    return all(math.isfinite(torch_item(part)) for part in parts)


def _have_finite_gradients(params: set[Tensor]) -> bool:
    # A sum is finite only if its terms are; one wait for the device.
    sums = [param.grad.sum().double() for param in params if param.grad is not None]
    return not sums or math.isfinite(torch.stack(sums).sum().item())


class _LatentScale(Messenger):
    """Multiplies the log densities of latent sites, in model and guide alike."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def _pyro_sample(self, msg: Any) -> None:
        enumerated = msg["infer"].get("enumerate")
        if not (msg["is_observed"] or enumerated or site_is_subsample(msg)):
            msg["scale"] = msg["scale"] * self.factor


class _LocalReparam(Messenger):
    """Tells sparse values where they come from, so that products can draw their own result."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], SparseNormal):
            msg["value"].posterior = msg["fn"]


class _AtMean(Messenger):
    """Puts the normals of a guide at their mean (before the transform to a constrained site)."""

    def _pyro_sample(self, msg: Any) -> None:
        fn, transforms = msg["fn"], []
        if isinstance(fn, TransformedDistribution):
            fn, transforms = fn.base_dist, fn.transforms
        if isinstance(elementwise_base(fn)[0], SparseNormal | Normal | LowRankMultivariateNormal):
            value = fn.mean
            for transform in transforms:
                value = transform(value)
            msg["value"], msg["done"] = value, True
