"""What guides with sparse support share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import init_to_feasible
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.infer.util import is_validation_enabled
from pyro.nn import PyroParam
from pyro.ops.tensor_utils import periodic_repeat
from torch import Tensor
from torch.distributions import biject_to, transform_to

from ..active_set import ActiveSet
from ..densities import Policy, check_density
from ..distributions import SparseDelta, SparseNormal, TransformedDelta, is_elementwise_real
from ..exchange import Move, carry
from ..random_state import leaving_no_trace
from ..sparse_tensor import SparseTensor
from ..structures import Structure
from .prototype import Density, ShapesMessenger, SparseInitMessenger, Structures
from .site_table import (
    Site,
    density_differences,
    failing,
    read_table,
    table,
    table_differences,
    take_counts,
)
from .summary import Summary
from .warm_start import warm_start

__all__ = ["AutoSparseGuide"]


class AutoSparseGuide(AutoGuide):
    """The base of all guides here: sites and their active sets, exchanges, files.

    A guide's parameters have a row for each active coordinate, of one site after the other, so an
    optimizer handles a few tensors, whatever the number of sites. A subclass says which they are,
    and what they mean:

    - :attr:`parameter_constraints`, their names and constraints, ``loc`` among them;
    - :meth:`from_marginals` and :meth:`marginals`, from and to a location and a standard deviation
      of each coordinate;
    - :meth:`site_posterior`, the distribution of one site.

    Sparse are real-valued sites with two or more dimensions and independent elements. Sites
    that are constrained, have fewer dimensions, are local to a subsampled plate, or stand for
    data that ``obs_mask`` leaves out are dense, and so is everything at ``density=1``.

    :param model: a Pyro model.
    :param density: as for :class:`~pyro_ssvi.AutoSparseNormal`, as are the others.
    :raises ValueError: as AutoSparseNormal.
    """

    loc: Tensor
    indices: Tensor  # of all sparse sites, one after the other
    #: Standard deviation of each coordinate at first.
    first_scale = 1.0
    #: Whether the posterior is one of independent normals, as local reparameterisation needs it.
    mean_field = False

    def __init__(
        self,
        model: Callable,
        *,
        density: Density = 0.1,
        structure: Structures = None,
        init_loc_fn: Callable = init_to_feasible,
        create_plates: Callable | None = None,
    ) -> None:
        if isinstance(density, Mapping):
            density = {name: check_density(value, name) for name, value in density.items()}
        elif not (callable(density) or isinstance(density, Policy)):
            density = check_density(density)
        structures = structure.values() if isinstance(structure, Mapping) else [structure]
        if not all(each is None or isinstance(each, Structure) for each in structures):
            raise ValueError(
                "expected a structure such as Tiles(4, 4), or {site: structure}, "
                f"got {structure!r}"
            )
        self.density = density
        self.structure = structure
        self.init_loc_fn = init_loc_fn
        self._init = SparseInitMessenger(init_loc_fn, density, structure)
        super().__init__(self._init(model), create_plates=create_plates)
        self._bare_model = (model,)  # not registered as a submodule
        #: Known from the first call on, or from load_state_dict().
        self.sites: list[Site] = []
        self._made_from: tuple[Tensor | None, int] = (None, 0)

    # What a subclass says

    @property
    def parameter_constraints(self) -> dict[str, constraints.Constraint]:
        """The constraint of each parameter, by name: tensors ``[K, ...]``."""
        return {"loc": constraints.real}

    def from_marginals(self, loc: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """The parameters with these marginals, in the order of :attr:`parameter_constraints`.

        :param loc: ``[K]``, of the unconstrained coordinates.
        :param scale: their standard deviations, ``[K]``.
        """
        raise NotImplementedError

    def added(self, loc: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """The parameters of coordinates that an exchange adds, by their marginals, ``[K]`` each."""
        return self.from_marginals(loc, scale)

    def marginals(self, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Location and standard deviation of each unconstrained coordinate, ``[K]`` each.

        :param parameters: in the order of :attr:`parameter_constraints`.
        """
        raise NotImplementedError

    def site_posterior(self, site: Site, *parameters: Tensor) -> dist.TorchDistribution:
        """The posterior of one site, given its part of the flat parameters."""
        raise NotImplementedError

    # Setting up

    def set_up(self, *args: Any, **kwargs: Any) -> None:
        """Run the model once, if the guide has not seen it."""
        if self.prototype_trace is None:
            with torch.inference_mode(False):  # or the parameters could never be trained
                self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            # A loaded guide goes on where it was saved, as if it had always known the model.
            with leaving_no_trace() if self.sites else nullcontext():
                if isinstance(self.density, Policy):
                    self._init.density = self._allocate(self.density, args, kwargs)
                super()._setup_prototype(*args, **kwargs)
                self._setup_parameters()
        except BaseException:
            self.prototype_trace = None  # or the next call would take the set-up for done
            raise

    def _prototype_hide_fn(self, msg: Any) -> bool:
        # Neither its plates are this guide's: in Predictive they have other sizes.
        return AutoGuide._prototype_hide_fn(msg) or msg["name"] in self.observed

    def _allocate(self, policy: Policy, args: tuple, kwargs: dict) -> dict[str, float]:
        messenger = ShapesMessenger(self.init_loc_fn)
        messenger.observed = self.observed
        with leaving_no_trace():
            poutine.block(messenger(self._bare_model[0]))(*args, **kwargs)
        densities = policy.allocate(messenger.shapes)
        return {name: check_density(value, name) for name, value in densities.items()}

    def _setup_parameters(self) -> None:
        trace: Any = self.prototype_trace
        latents = dict(trace.iter_stochastic_nodes())
        sites, locs, indices = [], [], []
        for name, node in latents.items():
            site, loc = self._setup_site(name, node)
            sites.append(site)
            locs.append(loc)
            if site.is_sparse:
                indices.append(node["value"].active.indices)
        if not sites:
            raise RuntimeError(f"{type(self).__name__} found no latent variables")
        # Before density= and structure=, which are not the user's own where a file was loaded.
        differences = table_differences(self.sites, sites, "the model") if self.sites else []
        if differences:
            raise ValueError("the loaded state is of another model: " + "; ".join(differences))
        if isinstance(self.density, Mapping):
            unknown = sorted(set(self.density) - set(latents))
            if unknown:
                raise ValueError(
                    f"density names {unknown}, but the model's latent sites are {list(latents)}"
                )
        if isinstance(self.structure, Mapping):
            sparse = [site.name for site in sites if site.is_sparse]
            unknown = sorted(set(self.structure) - set(sparse))
            if unknown:
                raise ValueError(f"structure names {unknown}, but the sparse sites are {sparse}")
        devices = {str(loc.device): site.name for loc, site in zip(locs, sites, strict=True)}
        if len(devices) > 1:
            raise ValueError(f"latent sites must be on one device, got (device: site) {devices}")
        self._refuse_stale_store()
        if self.sites:
            take_counts(sites, self.sites)
            self.sites = sites
            return
        loc = torch.cat(locs)
        self.sites = sites
        values = self.from_marginals(loc, torch.full_like(loc, self.first_scale))
        for (key, constraint), value in zip(
            self.parameter_constraints.items(), values, strict=True
        ):
            setattr(self, key, PyroParam(value, constraint))
        flat = torch.cat(indices) if indices else loc.new_empty(0, dtype=torch.int64)
        self.register_buffer("indices", flat)

    def _setup_site(self, name: str, node: Any) -> tuple[Site, Tensor]:
        fn, value = node["fn"], node["value"]
        frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized]
        if isinstance(value, SparseTensor):
            active = value.active
            site = Site(
                name,
                value.shape,
                value.dtype,
                fn.event_dim,
                len(active),
                frames,
                None,
                None if active.is_full else active.structure,
            )
            return site, value.values.detach()
        transform = None
        loc = value.detach()
        if not is_elementwise_real(fn):
            with helpful_support_errors(node):
                transform = biject_to(fn.support)
                loc = transform.inv(loc)
        event_dim = fn.event_dim + loc.dim() - value.dim()
        for frame in frames:
            full_size = frame.full_size or frame.size
            if full_size != frame.size:
                loc = periodic_repeat(loc, full_size, frame.dim - event_dim)
        site = Site(name, loc.shape, loc.dtype, event_dim, loc.numel(), frames, transform)
        return site, loc.reshape(-1)

    def _refuse_stale_store(self) -> None:
        held = dict(pyro.get_param_store().named_parameters())
        for each in self.parameter_constraints:
            name = f"{self._pyro_name}.{each}" if self._pyro_name else each
            value = held.get(name)
            if value is None or value is self._parameters.get(f"{each}_unconstrained"):
                continue
            raise ValueError(
                f"the parameter store holds {name!r} of another guide, or of another time, and "
                "cannot say which coordinates its values belong to. Call "
                "pyro.clear_param_store() before you make or copy a guide, or keep parameters in "
                "their modules with pyro.settings.set(module_local_params=True); to take up "
                "training again use svi.load(path) or guide.load_state_dict(...)"
            )

    def __getstate__(self) -> dict:
        # Not AutoGuide's, which would take the model from this guide, too.
        state = dict(super(AutoGuide, self).__getstate__())
        state["master"] = None
        if self.prototype_trace is not None:
            # It has been run, and need not be copied, nor be picklable.
            state["_model"] = state["_bare_model"] = None
        # A copy's buffer counts its versions anew: nothing made from the old one is its own.
        return {**state, "_made_from": (None, 0)}

    @property
    def observed(self) -> list[str]:
        """Names of the sites that have data; a loaded guide knows them where there are none."""
        return self._init.observed

    def _require_setup(self) -> None:
        if not self.sites:
            raise RuntimeError(
                f"{type(self).__name__} has no parameters before it has seen data: call "
                "guide(*args, **kwargs) once with the model's arguments, or take a step"
            )

    def get_extra_state(self) -> dict[str, Any]:
        """The table of sites that :meth:`state_dict` carries along."""
        return table(self.sites, self.observed, self.parameter_constraints)

    def set_extra_state(self, state: Any) -> None:
        """What is observed; the sites were checked, and taken, before any tensor was loaded."""
        if self.prototype_trace is None:
            self._init.observed = list(state.get("observed", ()))  # older files do not tell

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, metadata: Any, strict: bool, *lists: list
    ) -> None:
        errors = lists[-1]
        try:
            # Torch leaves it in the state, for whatever is loaded from that later.
            if metadata.pop("assign_to_params_buffers", False):
                raise ValueError("assign=True would part a guide from its optimizer: leave it out")
            sites = self.saved_sites(state_dict, prefix)
            if strict:
                self._refuse_unknown(state_dict, prefix)
        except ValueError as error:
            errors.append(str(error))
            return
        if sites and not self.sites:
            raw = [torch.empty_like(state_dict[prefix + name]) for name in self.raw_names]
            indices = torch.empty_like(state_dict[prefix + "indices"])
            self.take_sites(sites, [torch.nn.Parameter(each) for each in raw], indices)
        if self.sites:
            take_counts(self.sites, sites)
            self.indices = torch.empty_like(self.indices)  # the old one is in active sets
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    def _refuse_unknown(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        known = {*self.raw_names, "indices", "_extra_state", *self._parameters, *self._buffers}
        own = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        unknown = [
            key for key in own if key not in known and key.split(".")[0] not in self._modules
        ]
        if unknown:
            raise ValueError(
                f"it does not fit this guide: it has {unknown}. What a guide registers when it "
                "first sees data is to be there before you load: call guide(*args, **kwargs) once"
            )

    def saved_sites(self, state_dict: Mapping[str, Any], prefix: str = "") -> list[Site]:
        """The sites in a state dict, once it is known that they can be loaded into this guide.

        :raises ValueError: if they cannot, with the difference.
        """
        sites = read_table(state_dict, prefix, self.parameter_constraints)
        if not self.sites:
            differences = density_differences(sites, self.density, self.structure)
        elif not sites:
            differences = ["it was saved before the guide had seen data"]
        else:
            differences = table_differences(sites, self.sites, "this guide")
            dtype = state_dict[prefix + "loc_unconstrained"].dtype
            if dtype != self.loc.dtype:
                differences.append(f"loc: saved as {dtype}, this guide's is {self.loc.dtype}")
        if differences:
            raise ValueError("it does not fit this guide: " + "; ".join(differences))
        if sites:
            self._check_saved(sites, [state_dict[prefix + name] for name in self.raw_names])
        if not pyro.settings.get("module_local_params"):
            self._refuse_stale_store()
        return sites

    @torch.no_grad()
    def _check_saved(self, sites: list[Site], raw: Sequence[Tensor]) -> None:
        """Whether saved parameters are those of a posterior."""
        shapes = [tuple(each.shape) for each in raw]
        own = self.parameters_in_place() if self.sites else raw
        try:
            values = self._constrained(raw)
            ok = self.finite(*values)
            fits = all(each.shape == raw[0].shape[:1] for each in (*self.marginals(*values), ok))
        except (IndexError, RuntimeError):  # of operations on shapes that do not go together
            fits = False
        if not fits or any(a.shape != b.shape for a, b in zip(raw, own, strict=True)):
            raise ValueError(f"its parameters are damaged: {self.raw_names} have shapes {shapes}")
        bad = failing(sites, ok)
        if bad:
            raise ValueError(f"loc is not finite or scale is not positive at sites {bad}")

    def take_sites(
        self, sites: list[Site], raw: Sequence[torch.nn.Parameter], indices: Tensor
    ) -> None:
        """Set up what the first call sets up otherwise, but for what only the model knows.

        :param raw: the unconstrained parameters, in the order of :attr:`raw_names`.
        :param indices: of all sparse sites.
        """
        for (name, constraint), value in zip(self.parameter_constraints.items(), raw, strict=True):
            self._pyro_params[name] = constraint, None
            setattr(self, f"{name}_unconstrained", value)
        self.register_buffer("indices", indices)
        self.sites = sites

    @property
    def active_sets(self) -> dict[str, ActiveSet]:
        """The active set of each latent site; that of a dense site is full.

        :raises RuntimeError: if the guide has not seen data.
        """
        self._require_setup()
        # The buffer changes by an exchange, a load_state_dict() or a move to a device.
        buffer, version = self._made_from
        if buffer is not self.indices or version != self.indices._version:
            sizes = [site.k for site in self.sites if site.is_sparse]
            parts = iter(self.indices.split(sizes))
            self._active_sets = {
                site.name: ActiveSet(next(parts), site.shape, site.structure)
                if site.is_sparse
                else ActiveSet.full(site.shape, self.indices.device)
                for site in self.sites
            }
            self._made_from = (self.indices, self.indices._version)
        return self._active_sets

    def split(self, *flat: Tensor) -> list[tuple[Tensor, ...]]:
        """Tensors ``[K, ...]`` of all active coordinates, as a tuple for each site."""
        sizes = [site.k for site in self.sites]
        # One split has one backward; a slice for each site would have one of full size each.
        return list(zip(*(vector.split(sizes) for vector in flat), strict=True))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample all latent sites, given the same ``*args, **kwargs`` as the model.

        :return: a value for each latent site: a :class:`~pyro_ssvi.SparseTensor` or a tensor.
        """
        plates, flat = self._begin(args, kwargs)
        return self._sample_sites(plates, self.site_posterior, *flat)

    def _begin(self, args: tuple, kwargs: dict) -> tuple[dict, tuple[Tensor, ...]]:
        """What a forward pass needs: the plates, and the flat parameters."""
        self.set_up(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        flat = self.flat_parameters()
        if is_validation_enabled():
            self._check_parameters(*flat)
        return plates, flat

    def _sample_sites(
        self, plates: dict, distribution: Callable, *flat: Tensor
    ) -> dict[str, Tensor]:
        """Sample each site from ``distribution(site, *parts)``, with its parts of ``flat``."""
        result = {}
        for site, parts in zip(self.sites, self.split(*flat), strict=True):
            with ExitStack() as stack:
                for frame in site.frames:
                    stack.enter_context(plates[frame.name])
                result[site.name] = pyro.sample(site.name, distribution(site, *parts))
        return result

    @property
    def raw_names(self) -> list[str]:
        """Names of the parameters that an optimizer holds: those without constraints."""
        return [f"{name}_unconstrained" for name in self.parameter_constraints]

    def parameters_in_place(self) -> tuple[torch.nn.Parameter, ...]:
        """The parameters that an optimizer holds, in the order of :attr:`raw_names`."""
        self._require_setup()
        return tuple(getattr(self, name) for name in self.raw_names)

    def flat_parameters(self) -> tuple[Tensor, ...]:
        """The parameters of all sites, as Pyro parameters.

        :raises ValueError: if the parameter store holds those of another guide.
        """
        own = self.parameters_in_place()
        flat = tuple(getattr(self, name) for name in self.parameter_constraints)
        if any(a is not b for a, b in zip(self.parameters_in_place(), own, strict=True)):
            # PyroModule took what the store holds. Take it back, or the next call would do so.
            for name, value in zip(self.raw_names, own, strict=True):
                setattr(self, name, value)
            self._refuse_stale_store()
        return flat

    def _check_parameters(self, *flat: Tensor) -> None:
        # Once for all sites, where distributions would each ask the device.
        ok = self.valid(*flat)
        if not bool(ok.all()):
            bad = failing(self.sites, ok)
            raise ValueError(f"loc is NaN or scale is not positive at sites {bad}")

    def valid(self, loc: Tensor, *others: Tensor) -> Tensor:
        """Whether there can be a distribution with these parameters, ``[K]``."""
        return loc == loc

    def finite(self, *values: Tensor) -> Tensor:
        """As :meth:`valid`, and whether all numbers of a row are finite, ``[K]``."""
        ok = self.valid(*values)
        for value in values:
            ok = ok & value.isfinite().unsqueeze(-1).flatten(1).all(-1)
        return ok

    def normal(self, site: Site, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """Independent normals at a site's coordinates; transformed, where it is constrained."""
        loc, scale = loc.to(site.dtype), scale.to(site.dtype)
        if site.is_sparse:
            active = self.active_sets[site.name]
            return SparseNormal(loc, scale, active, site.event_dim, validate_args=False)
        loc, scale = self.dense(site, loc), self.dense(site, scale)
        normal = dist.Normal(loc, scale, validate_args=False).to_event(site.event_dim)
        if site.transform is None:
            return normal
        # With its cache, log_prob() needs no inverse: the sample's gradient is exact.
        return dist.TransformedDistribution(normal, [site.transform.with_cache()])

    def point(self, site: Site, value: Tensor, density: bool = False) -> dist.TorchDistribution:
        """A point at a site.

        :param value: of its unconstrained coordinates, ``[K]``.
        :param density: whether the point has the density that a constrained site's transform
            gives it.
        """
        value = value.to(site.dtype)
        if site.is_sparse:
            return SparseDelta(value, self.active_sets[site.name], site.event_dim)
        value = self.dense(site, value)
        if site.transform is None:
            return dist.Delta(value, event_dim=site.event_dim)
        constrained = site.transform(value)
        event_dim = site.event_dim + constrained.dim() - value.dim()
        if not density:
            return dist.Delta(constrained, event_dim=event_dim)
        volume = site.transform.log_abs_det_jacobian(value, constrained)
        volume = sum_rightmost(volume, volume.dim() - constrained.dim() + event_dim)
        return TransformedDelta(constrained, -volume, event_dim)

    def dense(self, site: Site, flat: Tensor) -> Tensor:
        """A dense site's part of a flat parameter in its shape; of what its plates choose."""
        dense = flat.reshape(flat.shape[:-1] + site.shape)
        return pyro.subsample(dense, event_dim=site.event_dim) if site.frames else dense

    def exchange(self, moves: Mapping[str, Move], new_scale: float | str = "mean") -> Tensor:
        """Exchange active coordinates: new ones start at loc 0, if a move does not say where.

        :param moves: what happens to which site, for one site or more. Sites may give coordinates
            to others; how many there are in all stays the same.
        :param new_scale: standard deviation of new coordinates: a number, or ``"mean"`` for the
            mean of those of the site's coordinates that stay.
        :return: for each row of the flat parameters, where it came from, or -1 if it is new:
            int64, for carrying an optimizer's state along.
        """
        with torch.no_grad():
            loc, scales = self.marginals(*self._values())
            source = torch.empty(len(loc), dtype=torch.int64, device=loc.device)
            first = torch.zeros_like(loc), torch.ones_like(scales)
            indices = []
            old = new = 0  # where the site's rows lie
            for site, (scale,) in zip(self.sites, self.split(scales), strict=True):
                move = moves.get(site.name)
                rows = slice(new, new + (site.k if move is None else len(move.indices)))
                if move is None:
                    source[rows] = torch.arange(old, old + site.k, device=loc.device)
                else:
                    is_new = move.source < 0
                    source[rows] = torch.where(is_new, -1, move.source + old)
                    stays = scale[move.source[~is_new]]
                    if isinstance(new_scale, str):
                        first[1][rows] = (stays if len(stays) else scale).mean()
                    else:
                        first[1][rows] = new_scale
                    for values, own in zip(first, move.first or (), strict=False):
                        values[rows][is_new] = own.to(values)
                if site.is_sparse:
                    active = self.active_sets[site.name]
                    indices.append(active.indices if move is None else move.indices)
                old, new = old + site.k, rows.stop
            assert new == len(loc)
            for raw, value in zip(
                self.parameters_in_place(), self._raw(self.added(*first)), strict=True
            ):
                carry(raw, source, value)
            for site in self.sites:
                if site.name in moves:
                    site.k = len(moves[site.name].indices)
            self.indices = torch.cat(indices)
        return source

    def _values(self) -> tuple[Tensor, ...]:
        """The parameters as they stand, whatever the store holds."""
        return self._constrained(self.parameters_in_place())

    def _constrained(self, raw: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The parameters with these unconstrained values."""
        constraints = self.parameter_constraints.values()
        return tuple(
            transform_to(constraint)(value)
            for constraint, value in zip(constraints, raw, strict=True)
        )

    def _raw(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Of parameters, the unconstrained values that an optimizer holds."""
        constraints = self.parameter_constraints.values()
        return [
            transform_to(constraint).inv(value)
            for constraint, value in zip(constraints, values, strict=True)
        ]

    def set_marginals(self, loc: Tensor, scale: Tensor, indices: Tensor) -> None:
        """Set the parameters in place, and which coordinates they are of.

        :param loc: ``[K]``, as is ``scale``.
        :param indices: of all sparse sites.
        """
        with torch.no_grad():
            values = self._raw(self.from_marginals(loc, scale))
            for raw, value in zip(self.parameters_in_place(), values, strict=True):
                raw.copy_(value)
            self.indices = indices

    def for_removal(self) -> tuple[Tensor, Tensor]:
        """What a removal criterion is to judge: loc and scale of all sites, ``[K]`` each."""
        return self.marginals(*self._values())

    def warm_start(
        self, source: AutoGuide | Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> None:
        """Start from a fitted guide, or from values such as a trained network's weights.

        A sparse site's active coordinates become those with the largest location, in standard
        deviations where the source has any. Those of a sparse source, another sparse guide or a
        network with weights that are exactly 0, are all taken over, if there are no more than the
        site has; the rest of the site's own, at location 0. Call it before the first step::

            guide.warm_start(dense_guide, x, y)
            guide.warm_start({"w0": weights["0.weight"]}, x, y)

        :param source: an AutoNormal or a sparse guide of the same model, of which locations and
            marginal scales are taken, or another guide, of which medians alone; or values by
            site name. Sites that it does not have stay as they are.
        :param args: of the model, as are ``kwargs``: for a guide that has not seen data.
        :raises ValueError: for names that the model does not have, or other shapes. Then nothing
            has changed.
        """
        self.set_up(*args, **kwargs)
        warm_start(self, source)

    @torch.no_grad()
    def posterior(self) -> dict[str, dist.TorchDistribution]:
        """The posterior of each latent site as it stands, for its full size if it is subsampled.

        :raises RuntimeError: if the guide has not seen data.
        """
        self._require_setup()
        parts = self.split(*(value.clone() for value in self.flat_parameters()))
        return {
            site.name: self.site_posterior(site, *part)
            for site, part in zip(self.sites, parts, strict=True)
        }

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior median of each latent site, as a dense tensor.

        :raises RuntimeError: if the guide has not seen data.
        """
        return {name: value[0] for name, value in self.quantiles([0.5]).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Tensor | list[float], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Posterior quantiles of each latent site, as dense tensors, 0 where inactive::

            guide.quantiles([0.05, 0.5, 0.95])

        :param quantiles: numbers between 0 and 1, ``[n]``.
        :return: ``[n, *shape]`` for each site.
        :raises RuntimeError: if the guide has not seen data.
        """
        self._require_setup()
        results = {}
        marginals = self.split(*self.marginals(*self.flat_parameters()))
        for site, (loc, scale) in zip(self.sites, marginals, strict=True):
            loc, scale = loc.to(site.dtype), scale.to(site.dtype)
            q = torch.as_tensor(quantiles, dtype=loc.dtype, device=loc.device).reshape(-1, 1)
            values = dist.Normal(loc, scale, validate_args=False).icdf(q).where(scale > 0, loc)
            if site.is_sparse:
                results[site.name] = self.active_sets[site.name].scatter(values)
            else:
                values = values.reshape(len(values), *site.shape)
                results[site.name] = values if site.transform is None else site.transform(values)
        return results

    def summary(self) -> Summary:
        """Each site's shape, active coordinates, and bytes beside those of AutoNormal.

        :raises RuntimeError: if the guide has not seen data.
        """
        self._require_setup()
        row = sum(raw[:1].nbytes for raw in self.parameters_in_place())
        return Summary.of(self.active_sets, row, self.loc.element_size())
