"""Several sparse posteriors, predicted as a mixture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn

from .plain_data import check_form, plain
from .posterior import (
    FORM,
    guide_of,
    guide_state,
    module_state,
    own_state,
    put_own,
    refuse_another,
)
from .safe_file import Format

if TYPE_CHECKING:
    from .svi import SSVI

__all__ = ["FILES", "Ensemble", "load_ensemble"]

_NUMBERS = count()  # of members

FILES = Format("pyro_ssvi ensemble", 1, "a file written by ensemble.save()")


class Ensemble(nn.Module):
    """Several sparse posteriors of one model, predicted as a mixture in equal parts.

    Its members are the ends of the cycles of one training, or those of several trainings::

        schedule = CyclicSchedule(explore=2_000, cycle=1_000)
        svi = SSVI(model, guide, optim, Trace_ELBO(), schedule=schedule)
        ensemble = Ensemble(model)
        for x, y in batches:
            svi.step(x, y)
            if schedule.ends_cycle(svi.steps):
                ensemble.add(svi)
        if len(ensemble):
            SparsePredictive(model, ensemble, num_samples=15)(x)

    A member is a copy of the K indices, locations and scales, and of the model's own parameters and
    buffers. :class:`~pyro_ssvi.SparsePredictive` draws from all members equally often. Called as
    a guide, an ensemble draws from one of them at random.

    :param model: the model that the posteriors are of.
    :ivar members: a sparse guide each.
    """

    def __init__(self, model: Callable) -> None:
        super().__init__()
        self._model = (model,)  # not registered as a submodule
        self.members = nn.ModuleList()
        self._own: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.members)

    def add(self, svi: SSVI) -> None:
        """Take the posterior of a training as it stands.

        :raises ValueError: if its guide is another one than one sparse guide of this package.
        """
        self._take({**guide_state(svi.guide), **own_state(svi)}, "the posterior")

    def _take(self, state: Mapping[str, Any], source: str) -> None:
        # The parameter store may hold the trained guide's, and those of other ensembles.
        name = f"Ensemble.{next(_NUMBERS)}"
        self.members.append(guide_of(state, self._model[0], source, name))
        self._own.append({"model": state["model"], "store": state["store"]})

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample all latent sites from one member, chosen at random.

        :raises ValueError: if the model has parameters or buffers of its own: a guide cannot
            give it the member's.
        """
        self._require_members()
        if any(own["store"] or _has_elements(own["model"]) for own in self._own):
            raise ValueError(
                "the members have parameters or buffers of the model with them: use "
                "SparsePredictive(model, ensemble, num_samples), which puts them in place"
            )
        member: Any = self.members[int(torch.randint(len(self), ()))]
        # Not a call, which would put its parameters into the parameter store.
        return member.forward(*args, **kwargs)

    def in_turns(self, num_draws: int) -> Iterator[Callable]:
        """A guide for each of so many draws: all members equally often, the rest at random.

        While a member is drawn from, the model has the parameters and buffers that belong to it.
        """
        self._require_members()
        each, rest = divmod(num_draws, len(self))
        once_more = torch.randperm(len(self))[:rest].tolist()
        for i, (member, own) in enumerate(zip(self.members, self._own, strict=True)):
            draws = each + (i in once_more)
            if draws:
                with _in_place(own, self._model[0]):
                    for _ in range(draws):
                        yield member.forward

    def _require_members(self) -> None:
        if not len(self):
            raise ValueError("the ensemble has no members yet: call ensemble.add(svi)")

    def save(self, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write the file that :func:`load_ensemble` reads.

        :param dtype: as for :meth:`pyro_ssvi.SSVI.export`.
        """
        members = [
            {**guide_state(member, dtype), **plain(own, "the model's state")}
            for member, own in zip(self.members, self._own, strict=True)
        ]
        FILES.write(path, {"version": FILES.version, "members": members})


def load_ensemble(path: str | os.PathLike, model: Callable, map_location: Any = None) -> Ensemble:
    """The ensemble in a file that :meth:`Ensemble.save` wrote. No code in it can run::

        ensemble = load_ensemble("net.ensemble", model)
        SparsePredictive(model, ensemble, num_samples=15)(x)

    :param model: the model that the posteriors are of.
    :param map_location: as for :func:`torch.load`.
    :raises ValueError: for a file that is damaged or of another kind, or if the model has other
        parameters or buffers; at a member's first draw, for one of another model.
    """
    ensemble = Ensemble(model)
    state = FILES.read(path, map_location)
    try:
        check_form(state, {"members": [FORM]})
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from None
    for i, member in enumerate(state["members"]):
        ensemble._take(member, f"member {i} of {path}")
        refuse_another(member, model, path)
    return ensemble


def _has_elements(state: Mapping[str, Any]) -> bool:
    """Whether a module's state has any: that of a bayesianized network has emptied weights."""
    return any(not isinstance(value, Tensor) or value.numel() > 0 for value in state.values())


@contextmanager
def _in_place(own: Mapping[str, Any], model: Callable) -> Iterator[None]:
    """Lend the model parameters and buffers; training goes on with those that it had."""
    held = dict(pyro.get_param_store().named_parameters())
    store = {
        name: {**entry, "value": held[name]} for name, entry in own["store"].items() if name in held
    }
    before = plain({"model": module_state(model), "store": store}, "the model's state")
    try:
        put_own(own, model)
        yield
    finally:
        put_own(before, model)
        for name in own["store"]:
            if name not in held and name in pyro.get_param_store():
                del pyro.get_param_store()[name]
