"""Sparse subspace variational inference."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

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
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from . import checkpoint, posterior
from .active_set import ActiveSet
from .addition import Addition, Evidence, addition_criterion, choose_from
from .allocation import Proposals, Room, Rounds, check_allocation, depart, fill
from .criteria import removal_criterion
from .distributions import SparseNormal, SubspaceMessenger, elementwise_base, taken
from .errors import NonFiniteWarning, warn_caller
from .evidence import removal_loss
from .exchange import Move, room, swap, weakest
from .fused_elbo import FusedELBO, NotFusedError
from .gradient_record import GradientRecord
from .guides import AutoSparseDelta, AutoSparseGuide
from .interrupts import uninterrupted
from .model_messages import EvidenceMessenger
from .optimizer_state import carry_state
from .random_state import leaving_no_trace
from .schedules import InverseSqrtSchedule, Schedule

__all__ = ["SSVI", "SubspaceModel"]

_JIT = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)


class Choice(NamedTuple):
    """What an exchange does to one site.

    :param removed: places among its active units, int64.
    :param added: flat indices of inactive units, int64.
    """

    removed: Tensor
    added: Tensor


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
        some. Another one is trained as SVI does, with a warning at the first step.
    :param optim: a Pyro optimizer. Its state follows its coordinate.
    :param loss: an ELBO, or any ``callable(model, guide, *args, **kwargs)`` that gives a loss;
        those that compile with torch.jit would keep the first active set.
    :param removal: name of a criterion in :mod:`pyro_ssvi.criteria`, or a ``callable(loc, scale)``
        that gives scores; the smallest are removed. Or ``"evidence"``: those without which the
        log evidence would grow most, or shrink least.
    :param addition: ``"mixed_gradient"``: a quarter where the gradient is largest, the rest drawn
        in proportion to it; ``"gradient"``, as in the paper: all where it is largest;
        ``"sampled_gradient"``: all drawn; ``"evidence"``; ``"random"``; an instance of a class in
        :mod:`pyro_ssvi.addition`, or a ``callable(gradient)`` that gives scores, the largest of
        which are added.
    :param allocation: ``"per_site"``: each site keeps its number of active coordinates, as in the
        paper; ``"global"``: those of a guide's sparse sites compete, and their number is constant
        for all of them together, see :mod:`pyro_ssvi.allocation`.
    :param schedule: when to exchange which share, see :mod:`pyro_ssvi.schedules`. The default,
        :class:`~pyro_ssvi.InverseSqrtSchedule`, asks for no number of steps, and never ends. If
        you know your number, the paper's comes to rest, which is better in short trainings: a
        :class:`~pyro_ssvi.CosineSchedule` that stops at three quarters of it.
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
        addition: str | Addition | Callable[[Tensor], Tensor] = "mixed_gradient",
        allocation: str = "per_site",
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
        self.allocation = check_allocation(allocation)
        self.schedule = InverseSqrtSchedule() if schedule is None else schedule
        if self.addition.batches > self.schedule.every:
            raise ValueError(
                f"addition averages over {self.addition.batches} batches, but the schedule "
                f"exchanges every {self.schedule.every} steps"
            )
        points = any(isinstance(part, AutoSparseDelta) for part in self.guides)
        if self.removal is removal_loss and points:
            raise ValueError("removal='evidence' needs a posterior, and AutoSparseDelta has none")
        if isinstance(self.addition, Evidence) and getattr(loss, "num_particles", 1) > 1:
            raise ValueError("addition='evidence' needs a loss with one particle")
        structured = any(part.structure for part in self.guides)  # not {}, that of a loaded one
        if structured and (allocation == "global" or isinstance(self.addition, Evidence)):
            raise ValueError(
                "allocation='global' and addition='evidence' exchange single coordinates: leave "
                "out structure="
            )
        if self.addition.at == "mean" and getattr(loss, "vectorize_particles", False):
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
        if self.addition.batches:
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
        loss, used = self._gradients(args, kwargs)
        if now == 1 and not self.guides:  # not before: its first run may make parts of a guide
            warn_caller(
                f"{type(self.guide).__name__} has no sparse part, so nothing will be exchanged: "
                "use AutoSparseNormal, or pyro.infer.SVI if the guide is to be dense"
            )
        params = set(used.values())
        unknown = isinstance(self._elbo, TraceTailAdaptive_ELBO)  # it reports inf at all times
        finite = (unknown or _is_finite(loss)) and _have_finite_gradients(params)
        if finite:
            self.optim(params)
        else:
            warn_caller(f"step {now} skipped: its loss or gradient is not finite", NonFiniteWarning)
            self._record = GradientRecord()
        zero_grads(params)
        self.steps = now
        if finite and self.schedule.due(now):
            self._exchange(self.schedule.share(now))
        if isinstance(loss, tuple):  # as that of ReweightedWakeSleep
            return type(loss)(map(torch_item, loss))
        return torch_item(loss)

    def _gradients(self, args: tuple, kwargs: dict) -> tuple[Any, dict[str, Tensor]]:
        """The loss of a step, and the parameters it uses, by name, with their gradients."""
        now = self.steps + 1
        feeds_exchange = any(self.schedule.due(now + i) for i in range(self.addition.batches))
        capture, before = poutine.trace(param_only=True), self._record.copy()
        try:
            with ExitStack() as stack:
                if self._needs_priors and (feeds_exchange or self.schedule.due(now)):
                    stack.enter_context(EvidenceMessenger(self._record))
                if feeds_exchange:
                    self._collect(stack, args, kwargs)
                with capture:
                    loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
        except BaseException:
            # The next step is not to add to what this one left.
            zero_grads(set(_used(capture).values()))
            self._record = before
            raise
        return loss, _used(capture)

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
        try:
            self._look(args, kwargs)
        except BaseException:
            self._record = GradientRecord()  # what there is so far is no part of another exchange
            raise
        return self._exchange(share, optim)

    def _look(self, args: tuple, kwargs: dict) -> None:
        """Record what an exchange without a step is decided by."""
        self._record = GradientRecord()
        with EvidenceMessenger(self._record) if self._needs_priors else nullcontext():
            if self.addition.batches or self._needs_priors:
                self._backward(args, kwargs, times=self.addition.samples)

    @property
    def _needs_priors(self) -> bool:
        return self.removal is removal_loss or isinstance(self.addition, Evidence)

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
        if self.addition.at == "sample":
            self._backward(args, kwargs, times=self.addition.samples - 1)
            stack.enter_context(self._record)
        else:
            self._backward(args, kwargs)

    def _backward(
        self, args: tuple, kwargs: dict, times: int = 1, record: GradientRecord | None = None
    ) -> None:
        """Record gradients of one batch, and leave none with the parameters."""
        record = self._record if record is None else record
        guide = _AtMean()(self.guide) if self.addition.at == "mean" else self.guide
        capture = poutine.trace(param_only=True)
        try:
            with capture, record:
                for _ in range(times):
                    self.loss_and_grads(self.model, guide, *args, **kwargs)
        finally:
            zero_grads(set(_used(capture).values()))

    def _exchange(self, share: float, optim: torch.optim.Optimizer | None = None) -> dict[str, int]:
        record, self._record = self._record, GradientRecord()
        try:
            # All sites are decided before any is changed.
            plans = [(guide, self._plan(guide, share, record)) for guide in self.guides]
        except FloatingPointError as error:
            warn_caller(f"exchange after step {self.steps} skipped: {error}", NonFiniteWarning)
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
    def _plan(
        self, guide: AutoSparseGuide, share: float, record: GradientRecord
    ) -> dict[str, Move]:
        choices = self._choices(guide, share, record)
        moves: dict[str, Move] = {}
        for name, choice in choices.items():
            if len(choice.removed) or len(choice.added):
                with _naming(f"site {name!r}"):
                    moves[name] = self._move(guide.active_sets[name], choice, record)
        return moves

    def _choices(
        self, guide: AutoSparseGuide, share: float, record: GradientRecord
    ) -> dict[str, Choice]:
        """Which units of which sites are to go, and which to come."""
        scores: dict[str, Tensor] = {}
        parts = guide.split(*guide.for_removal())
        for site, (loc, scale) in zip(guide.sites, parts, strict=True):
            active = guide.active_sets[site.name]
            if self.addition.batches and active not in record:
                continue  # the loss does not depend on this site: no coordinate promises anything
            if site.is_sparse:
                loc, scale = loc.to(site.dtype), scale.to(site.dtype)
                scores[site.name] = self._removal_scores(site.name, active, loc, scale, record)
        removed = self._departures(guide, scores, share)
        propose = partial(self.addition.propose, record=record)
        added = self._arrivals(guide, removed, propose)
        return {name: Choice(removed[name], added[name]) for name in added}

    def _removal_scores(
        self, name: str, active: ActiveSet, loc: Tensor, scale: Tensor, record: GradientRecord
    ) -> Tensor:
        if self.removal is removal_loss:
            prior = record.priors[active]
            scores = removal_loss(loc, scale, taken(prior.scale, active.shape, active.indices))
        else:
            scores = self.removal(loc, scale)
        if scores.shape != loc.shape:
            raise ValueError(
                f"the removal criterion gave scores {tuple(scores.shape)} for site {name!r}, "
                f"expected ({len(loc)},)"
            )
        if not scores.isfinite().all():
            raise FloatingPointError(f"the removal scores of site {name!r} are not finite")
        return scores

    def _departures(
        self, guide: AutoSparseGuide, scores: dict[str, Tensor], share: float
    ) -> dict[str, Tensor]:
        """The places of those that go, in each site's units; sites where none do are left out."""
        if self.allocation == "global":
            gone = depart(_rooms(guide, scores), list(scores.values()), share)
            return dict(zip(scores, gone, strict=False))  # there may be none
        removed = {}
        for name, each in scores.items():
            active = guide.active_sets[name]
            units = active.units
            n = min(math.floor(share * len(units) + 0.5), units.numel() - len(units))
            if n:
                removed[name] = weakest(active, each, n)
        return removed

    def _arrivals(
        self, guide: AutoSparseGuide, removed: Mapping[str, Tensor], propose: Callable
    ) -> dict[str, Tensor]:
        """The flat indices of those that come, among each site's units.

        :param removed: what :meth:`_departures` gave.
        :param propose: ``propose(active, rounds, room=)`` gives the best of a site.
        """
        names, active_sets = list(removed), guide.active_sets
        if self.allocation == "global":

            def of_site(i: int, rounds: Rounds) -> Proposals:
                with _naming(f"site {names[i]!r}"):
                    return propose(active_sets[names[i]], rounds, room=None)

            gone = [len(each) for each in removed.values()]
            bounds = [r.addable(n) for r, n in zip(_rooms(guide, removed), gone, strict=True)]
            rounds = self.addition.rounds(sum(gone))
            with _naming(f"one of the sites {names}", FloatingPointError):
                added = fill(rounds, of_site, *zip(*bounds, strict=True)) if names else []
            return dict(zip(names, added, strict=True))
        result = {}
        for name, each in removed.items():
            active = active_sets[name]
            places = room(active, each)
            of_one = partial(propose, active, room=places)
            with _naming(f"site {name!r}"):
                result[name] = choose_from(self.addition, len(each), of_one, places)
        return result

    def _move(self, active: ActiveSet, choice: Choice, record: GradientRecord) -> Move:
        added = choice.added.sort().values
        move = swap(active, choice.removed, added)
        if isinstance(self.addition, Evidence) and move.size:
            return move._replace(first=self._first_values(active, added, record))
        return move

    def _first_values(
        self, active: ActiveSet, added: Tensor, record: GradientRecord
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(self.addition, Evidence)
        return self.addition.first_values(
            active, added, self.addition.read(active, added, record), record
        )


@contextmanager
def _naming(what: str, kinds: Any = (FloatingPointError, ValueError)) -> Iterator[None]:
    """Have an error of these kinds, by default of those that criteria raise, say where it was."""
    try:
        yield
    except kinds as error:
        kind = FloatingPointError if isinstance(error, FloatingPointError) else ValueError
        raise kind(f"{what}: {error}") from error


def _rooms(guide: AutoSparseGuide, names: Iterable[str]) -> list[Room]:
    sites = {site.name: site for site in guide.sites}
    return [Room(sites[name].shape.numel(), sites[name].k, sites[name].initial_k) for name in names]


def _used(capture: TraceMessenger) -> dict[str, Tensor]:
    """The parameters that a run has used, by name, as what an optimizer steps."""
    return {name: node["value"].unconstrained() for name, node in capture.trace.nodes.items()}


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
