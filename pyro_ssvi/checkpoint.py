"""Checkpoints: all that training needs to go on, bit for bit, as if it had never stopped."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from functools import partial
from types import NoneType
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.optim.optim import _get_state_dict, _load_state_dict, is_scheduler
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from .constraint_state import check_constrained, constraint_difference, constraint_state
from .errors import warn_caller
from .gradient_record import GradientRecord, check_parts
from .guides import AutoSparseGuide
from .optimizer_trial import refusals
from .plain_data import Maybe, check_form, plain
from .random_state import check_random_state, leaving_no_trace, random_state, set_random_state
from .safe_file import Format

__all__ = ["FILES", "check", "restore", "schedule_state", "stage", "state_of"]

#: Their version is that of :meth:`pyro_ssvi.SSVI.state_dict`, too.
FILES = Format(
    "pyro_ssvi checkpoint",
    1,
    "a file written by svi.save(). What torch.save(guide.state_dict()) wrote is for "
    "guide.load_state_dict(torch.load(path))",
)
_RANDOM = {"torch": Tensor, "cuda": [Tensor], "numpy": (list, tuple), "python": (list, tuple)}
_RECORD = [{"guide": str, "site": str, "parts": [(list, tuple)]}]
_FORM = {
    "version": int,
    "guide": {str: object},
    "model": {str: object},
    "store": {
        str: {
            "module": (str, NoneType),
            "value": (Tensor, NoneType),
            "constraint": object,
            "ours": bool,
        }
    },
    "optim": {str: {"class": str, "state": dict, "grad": bool}},
    "steps": int,
    "schedule": {"class": str, "fields": {str: object}},
    "record": _RECORD,
    "scales": Maybe([(int, float)]),  # older files have none
    "elbo": {"max_plate_nesting": (int, float), "may_fuse": (bool, NoneType)},
    "random": _RANDOM,
    # Of several processes, each its own.
    "ranks": Maybe([{"record": _RECORD, "scales": [(int, float)], "random": _RANDOM}]),
}


# From memory to plain data


def state_of(svi: Any) -> dict[str, Any]:
    """All that ``svi`` needs to go on, as plain data that later training does not change.

    :raises ValueError: if a part of it is out of reach.
    :raises TypeError: if the state of a module or an optimizer holds more than plain data.
    """
    parameters = _parameters(svi)
    names = {parameter: key for key, parameter in parameters.items()}
    store = pyro.get_param_store()
    entries = {}
    for name, value in store.named_parameters():
        key = names.setdefault(value, f"store.{name}")
        stepped = value in svi.optim.optim_objs
        in_module = key in parameters
        if stepped and not in_module and "$$$" in name:
            raise ValueError(_hidden_module(name))
        entries[name] = {
            "module": key if in_module else None,
            "value": None if in_module else value,
            "constraint": constraint_state(store._constraints[name]),
            # Before the first step it cannot be told whose they are.
            "ours": stepped or not svi.steps,
        }
    state = {
        "version": FILES.version,
        "guide": svi.guide.state_dict(),
        "model": svi.model.state_dict(),
        "store": entries,
        "optim": {
            names[parameter]: {
                "class": _optimizer_class(optimizer),
                "state": _get_state_dict(optimizer),
                # After a step gradients are 0, but an optimizer skips those that are None.
                "grad": parameter.grad is not None,
            }
            for parameter, optimizer in svi.optim.optim_objs.items()
            if parameter in names
        },
        "steps": svi.steps,
        "schedule": schedule_state(svi.schedule),
        "record": [
            {"guide": path, "site": site, "parts": svi._record.parts(active)}
            for path, guide in _sparse_guides(svi)
            if guide.sites
            for site, active in guide.active_sets.items()
            if active in svi._record
        ],
        "scales": svi._record.scales,
        "elbo": {
            "max_plate_nesting": getattr(_elbo(svi), "max_plate_nesting", math.inf),
            "may_fuse": svi._may_fuse,
        },
        "random": random_state(),
    }
    return plain(state, "the state")


def _modules(svi: Any) -> dict[str, nn.Module]:
    return {"guide": svi.guide, "model": svi.model}


def _parameters(svi: Any) -> dict[str, nn.Parameter]:
    """Parameters by their place in the modules: that needs no parameter store."""
    return {
        f"{kind}.{name}": parameter
        for kind, module in _modules(svi).items()
        for name, parameter in module.named_parameters()
    }


def _sparse_guides(svi: Any) -> Iterator[tuple[str, Any]]:
    for name, part in svi.guide.named_modules():
        if isinstance(part, AutoSparseGuide):
            yield f"{name}." if name else "", part


def _elbo(svi: Any) -> Any:
    # It guesses its max_plate_nesting by one run of model and guide, which draws.
    return getattr(svi.loss, "__self__", None)


def _optimizer_class(optimizer: Any) -> str:
    if is_scheduler(optimizer):
        return f"{type(optimizer).__name__} of {type(optimizer.optimizer).__name__}"
    return type(optimizer).__name__


def schedule_state(schedule: Any) -> dict[str, Any]:
    """A schedule's class and numbers, to be compared."""
    fields = {
        key: value
        for key, value in getattr(schedule, "__dict__", {}).items()
        if value is None or type(value) in (bool, int, float, str)
    }
    return {"class": type(schedule).__name__, "fields": fields}


def _hidden_module(name: str) -> str:
    module = name.split("$$$")[0]
    return (
        f"parameter {name!r} is of a module that only pyro.module({module!r}, ...) inside the "
        "model knows, and whose buffers cannot be seen: make it known with "
        f"svi.model.add_module({module!r}, the_module) once SSVI is made"
    )


# And back: first everything is prepared and checked, then everything is changed


def restore(svi: Any, state: Mapping[str, Any], source: str = "the state") -> None:
    """Give ``svi`` a state.

    :param source: where the state is from, for messages.
    :raises ValueError: if it does not fit, with all the differences; then nothing has changed.
    """
    stage(svi, state, source).commit()


def stage(svi: Any, state: Mapping[str, Any], source: str) -> Staged:
    """A state that ``svi`` can take, as yet without a change; as :func:`restore`."""
    check(state, source)
    try:
        staged = Staged(svi, state)
    except Exception as error:
        raise ValueError(f"{source} is damaged: {error!r}") from error
    if staged.problems:
        raise ValueError(f"{source} does not fit this SSVI:\n  " + "\n  ".join(staged.problems))
    was, has = (_described(each) for each in (state["schedule"], schedule_state(svi.schedule)))
    if was != has:
        warn_caller(f"saved with the schedule {was}; training goes on with this SSVI's own, {has}")
    return staged


def check(state: Any, source: str) -> None:
    """Whether something is what :func:`state_of` gives, as far as its form goes.

    :raises ValueError: if it is not, or is of a newer version.
    """
    keys = [key for key, form in _FORM.items() if not isinstance(form, Maybe)]
    missing = [key for key in keys if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise ValueError(f"{source} is not what SSVI.state_dict() gives: it has no {missing}")
    FILES.check_version(state["version"], source)
    try:
        check_form(state, _FORM)
    except ValueError as error:
        raise ValueError(f"{source} is damaged: {error}") from None


class Staged:
    """A state that is ready to be taken, or the problems that forbid it."""

    def __init__(self, svi: Any, state: Mapping[str, Any]) -> None:
        self.svi = svi
        self.state = state
        self.problems: list[str] = []
        self.parameters: dict[str, Tensor] = dict(_parameters(svi))
        # What is new here: sites of guides, entries of the parameter store.
        self.sites: dict[str, list] = {}
        self.links: dict[str, tuple[Tensor, Any]] = {}
        self.copies: list[tuple[Tensor, Tensor]] = []
        # Optimizer, gradient clipping, and whether there is a gradient.
        self.optimizers: dict[Tensor, tuple[Any, Any, bool]] = {}
        self.record: list[tuple[str, str, list]] = []
        self._stage_guides()
        self._compare_modules()
        if not self.problems:  # what follows only adds to what is said above
            self._stage_store()
        if not self.problems:
            self._stage_optimizers()
            self._stage_record()
            self._check_rest()

    def _stage_guides(self) -> None:
        saved = self.state["guide"]
        for prefix, guide in _sparse_guides(self.svi):
            try:
                self.sites[prefix] = guide.saved_sites(saved, prefix)
            except ValueError as error:
                self.problems.append(f"guide: {error}")
                continue
            if self.sites[prefix] and not guide.sites:
                for name in guide.raw_names:
                    new = nn.Parameter(saved[prefix + name].clone())
                    self.parameters[f"guide.{prefix}{name}"] = new

    def _compare_modules(self) -> None:
        own = {  # they have been compared
            prefix + name
            for prefix, guide in _sparse_guides(self.svi)
            for name in (*guide.raw_names, "indices", "_extra_state")
        }
        for kind, module in _modules(self.svi).items():
            theirs, ours = self.state[kind], module.state_dict()
            for key in dict.fromkeys([*theirs, *ours]):
                if kind == "guide" and key in own:
                    continue
                if key not in theirs:
                    self.problems.append(f"{kind}: {key!r} is not in it")
                elif key not in ours:
                    self.problems.append(
                        f"{kind}: {key!r} is not here: make it before you load, by a first call "
                        f"of the guide or by svi.model.add_module(), as when it was saved"
                    )
                elif isinstance(ours[key], Tensor):
                    self._compare(f"{kind}: {key!r}", theirs[key], ours[key])

    def _compare(self, what: str, theirs: Any, ours: Tensor) -> None:
        was, has = map(_described_tensor, (theirs, ours))
        if was != has:
            self.problems.append(f"{what}: saved as {was}, here it is {has}")

    def _stage_store(self) -> None:
        store = pyro.get_param_store()
        held = dict(store.named_parameters())
        constraints = _own_constraints(self.svi)
        for name, entry in self.state["store"].items():
            ours, value = held.get(name), entry["value"]
            constraint = store._constraints.get(name, constraints.get(entry["module"]))
            if constraint is not None:
                difference = constraint_difference(entry["constraint"], constraint)
                if difference:
                    self.problems.append(f"the constraint of parameter {name!r}: {difference}")
            if entry["module"] is not None:
                parameter = self.parameters[entry["module"]]
                if ours is not None and ours is not parameter:
                    self.problems.append(
                        f"the parameter store holds another {name!r}: call "
                        "pyro.clear_param_store() before you make a new guide or model"
                    )
                if constraint is None:
                    own = {**entry, "value": parameter.detach()}
                    constraint = check_constrained(name, own)
            elif ours is None:
                if "$$$" in name:
                    self.problems.append(_hidden_module(name))
                constraint = check_constrained(name, entry)
                parameter = value.detach().clone().requires_grad_()
            elif entry["ours"] or ours in self.svi.optim.optim_objs:
                self._compare(f"parameter {name!r}", value, ours)
                parameter = ours
                self.copies.append((ours, value))
            else:
                continue  # of another model, which may have trained it on
            if constraint is None:
                self.problems.append(
                    f"parameter {name!r} has a constraint of your own: run the model once before "
                    "you load"
                )
            self.links[name] = parameter, constraint
            self.parameters.setdefault(f"store.{name}", parameter)

    def _stage_optimizers(self) -> None:
        optim, names = self.svi.optim, pyro.get_param_store()._param_to_name
        before = dict(names)
        # Arguments of an optimizer may be a function of the parameter's name.
        names.update({parameter: name for name, (parameter, _) in self.links.items()})
        try:
            for key, saved in self.state["optim"].items():
                parameter = self.parameters[key]
                optimizer = optim._get_optim(parameter)
                was, has = saved["class"], _optimizer_class(optimizer)
                if was != has:
                    self.problems.append(
                        f"optimizer of {key!r}: saved from {was}, here it is {has}"
                    )
                    continue
                copied = parameter.detach().clone().requires_grad_()
                names[copied] = names.get(parameter, key)
                made = optim._get_optim(copied)
                for why in refusals(made, copied, saved["state"], stepped=saved["grad"]):
                    self.problems.append(f"optimizer of {key!r}: {why}")
                _load_state_dict(optimizer, copy.deepcopy(saved["state"]))
                clip = optim._get_grad_clip(parameter)
                self.optimizers[parameter] = optimizer, clip, saved["grad"]
        except Exception as error:
            self.problems.append(f"the optimizer's state cannot be loaded: {error!r}")
        finally:
            names.clear()
            names.update(before)

    def _stage_record(self) -> None:
        known = {
            (prefix, site.name): site for prefix, sites in self.sites.items() for site in sites
        }
        for entry in self.state["record"]:
            site = known.get((entry["guide"], entry["site"]))
            if site is None:
                self.problems.append(f"it has a gradient of an unknown site {entry['site']!r}")
                continue
            try:
                parts = GradientRecord.read_parts(plain(entry["parts"], "the record"))
                check_parts(parts, site.shape)
            except Exception as error:
                self.problems.append(f"its gradient of site {entry['site']!r}: {error!r}")
                continue
            self.record.append((entry["guide"], entry["site"], parts))

    def _check_rest(self) -> None:
        steps, plates = self.state["steps"], self.state["elbo"]["max_plate_nesting"]
        if steps < 0:
            self.problems.append(f"expected a number of steps, got {steps!r}")
        if not (plates == math.inf or (type(plates) is int and plates >= 0)):
            self.problems.append(f"expected a number of nested plates, got {plates!r}")
        stepped = [
            entry["module"] or f"store.{name}"
            for name, entry in self.state["store"].items()
            if entry["ours"] and steps
        ]
        optim = self.state["optim"]
        for prefix, guide in _sparse_guides(self.svi):
            keys = [f"guide.{prefix}{name}" for name in guide.raw_names]
            if any(key in optim for key in keys):
                stepped += keys
        missing = [key for key in dict.fromkeys(stepped) if key not in optim]
        if missing:
            self.problems.append(f"it has no optimizer of {missing}")
        try:
            check_random_state(self.state["random"])
        except Exception as error:
            self.problems.append(f"its random state is damaged: {error}")

    def commit(self) -> None:
        """Change everything."""
        svi, state = self.svi, self.state
        for prefix, guide in _sparse_guides(svi):
            if self.sites[prefix] and not guide.sites:
                raw = [self.parameters[f"guide.{prefix}{name}"] for name in guide.raw_names]
                indices = state["guide"][prefix + "indices"].clone()
                guide.take_sites(self.sites[prefix], raw, indices)
        for kind, module in _modules(svi).items():
            module.load_state_dict(state[kind])
        if any(self.sites.values()):
            for part in svi.guide.modules():
                if isinstance(part, AutoGuide) and part.prototype_trace is None:
                    part._setup_prototype = partial(_unseen_setup, part)
        with torch.no_grad():
            for ours, value in self.copies:
                ours.copy_(value)
        self._commit_store()
        self._commit_optimizers()
        svi.steps = state["steps"]
        svi._record = GradientRecord()
        svi._record.scales = list(state.get("scales", ()))  # older files have none
        guides = dict(_sparse_guides(svi))
        for prefix, site, parts in self.record:
            svi._record.add_parts(guides[prefix].active_sets[site], parts)
        if hasattr(_elbo(svi), "max_plate_nesting"):
            _elbo(svi).max_plate_nesting = state["elbo"]["max_plate_nesting"]
        svi._may_fuse, svi._fused = state["elbo"]["may_fuse"], None
        set_random_state(state["random"])

    def _commit_store(self) -> None:
        store = pyro.get_param_store()
        for name, (parameter, constraint) in self.links.items():
            store._params[name] = parameter
            store._param_to_name[parameter] = name
            store._constraints[name] = constraint

    def _commit_optimizers(self) -> None:
        optim = self.svi.optim
        optim.optim_objs.clear()
        optim.grad_clip.clear()
        for parameter, (optimizer, clip, has_grad) in self.optimizers.items():
            optim.optim_objs[parameter], optim.grad_clip[parameter] = optimizer, clip
            parameter.grad = torch.zeros_like(parameter) if has_grad else None


def _unseen_setup(guide: AutoGuide, *args: Any, **kwargs: Any) -> None:
    """Have an autoguide see its model as if it had done so before the file was saved."""
    with leaving_no_trace():
        type(guide)._setup_prototype(guide, *args, **kwargs)
    del guide._setup_prototype


def _own_constraints(svi: Any) -> dict[str, Any]:
    """The constraints of parameters of Pyro modules, by their place in the modules."""
    return {
        f"{kind}.{prefix}{'.' if prefix else ''}{name}_unconstrained": constraint
        for kind, module in _modules(svi).items()
        for prefix, part in module.named_modules()
        for name, (constraint, _) in getattr(part, "_pyro_params", {}).items()
        if isinstance(constraint, Constraint)
    }


def _described_tensor(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    words = f"{tuple(value.shape)} {value.dtype}"
    if value.layout != torch.strided:
        words += f" {value.layout}"
    return f"{words} without numbers" if value.is_meta else words


def _described(schedule: Mapping[str, Any]) -> str:
    fields = ", ".join(f"{key}={value!r}" for key, value in schedule["fields"].items())
    return f"{schedule['class']}({fields})"
