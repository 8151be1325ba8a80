"""Guides that must agree, and what their losses must be."""

from functools import partial

import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.infer.autoguide import AutoNormal
from torch.distributions import Independent, Normal, transform_to

from pyro_ssvi import AutoSparseNormal, SparseTensor

# AutoNormal's own first scale, for all.
KINDS = {
    "AutoNormal": AutoNormal,
    "density=1": partial(AutoSparseNormal, density=1.0, init_scale=0.1),
    "density=0.3": partial(AutoSparseNormal, density=0.3, init_scale=0.1),
}


def each(values):
    """A parametrisation's values and ids."""
    return {"argvalues": list(values.values()), "ids": list(values)}


def fresh(seed=0):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)


def twins(model, *args, **kwargs):
    """An AutoNormal and an AutoSparseNormal at density 1, which have both seen the model."""
    guides = []
    for kind in ("AutoNormal", "density=1"):
        fresh()
        guides.append(KINDS[kind](model, **kwargs))
        guides[-1](*args)
    pyro.clear_param_store()
    return guides


def randomise(guide):
    for param in guide.parameters():
        param.data.copy_(torch.randn_like(param) * 0.3 - 0.2)


def match(dense, sparse):
    """Give a sparse guide the parameters that an AutoNormal has at its active coordinates."""
    params = dict(dense.named_parameters())
    for mine, theirs in (("loc_unconstrained", "locs"), ("scale_unconstrained", "scales")):
        parts = []
        for site in sparse.sites:
            full = params[f"{theirs}.{site.name}_unconstrained"].data
            active = sparse.active_sets[site.name]
            parts.append(active.gather(full) if site.is_sparse else full.reshape(-1))
        getattr(sparse, mine).data.copy_(torch.cat(parts))


def scales(guide):
    """The standard deviation of each active coordinate."""
    return transform_to(guide.scale_constraint)(guide.scale_unconstrained)


def elements(fn):
    """A distribution of single elements, without to_event() and mask()."""
    while isinstance(fn, Independent | MaskedDistribution):
        fn = fn.base_dist
    return fn


def site_weight(node):
    """What handlers multiply the density of each element by."""
    weight = torch.as_tensor(node["scale"])
    weight = weight if node["mask"] is None else weight * node["mask"]
    return weight.reshape(weight.shape + (1,) * node["fn"].event_dim)


def brute_force_loss(model, guide, *args):
    """Trace_ELBO's loss by dense tensors, element by element, inactive elements left out."""
    guide_trace = poutine.trace(guide).get_trace(*args)
    drawn = {}
    for node in guide_trace.nodes.values():
        if isinstance(node.get("value"), SparseTensor):
            drawn[node["name"]] = node["value"]
            node["value"] = node["value"].to_dense()
    trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    trace.compute_log_prob()
    guide_trace.compute_log_prob()
    posterior = guide.posterior()
    loss = 0.0
    for name, node in trace.nodes.items():
        if node["type"] != "sample":
            continue
        if name not in drawn:
            loss = loss - node["log_prob_sum"]
            if name in guide_trace.nodes:
                loss = loss + guide_trace.nodes[name]["log_prob_sum"]
            continue
        value, active = node["value"], drawn[name].active
        log_p = elements(node["fn"]).log_prob(value)
        loss = loss - (log_p * site_weight(node))[active.mask].sum()
        q, weight = posterior[name], site_weight(guide_trace.nodes[name]).expand(active.shape)
        log_q = Normal(q.loc, q.scale).log_prob(active.gather(value))
        loss = loss + (log_q * active.gather(weight.contiguous())).sum()
    return loss.detach()
