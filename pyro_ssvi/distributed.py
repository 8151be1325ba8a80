"""Data-parallel training on :mod:`torch.distributed`: several processes, one sparse posterior."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.distributed as dist
from pyro import poutine
from pyro.infer.util import torch_item
from torch import Tensor

from . import checkpoint, posterior
from .active_set import ActiveSet
from .addition import Random
from .exchange import Move
from .gradient_record import GradientRecord
from .guides import AutoSparseGuide
from .random_state import leaving_no_trace
from .svi import SSVI

__all__ = ["DistributedSSVI"]


class DistributedSSVI(SSVI):
    """SSVI in several processes, each with its own batches of the data.

    Use it under ``torchrun``, where ``SSVI`` was, with a ``DistributedSampler`` for the data and
    other random numbers in each process::

        torch.distributed.init_process_group()
        pyro.set_rng_seed(torch.distributed.get_rank())
        svi = DistributedSSVI(model, guide, optim, Trace_ELBO(), schedule=schedule)

    Loss and gradients of a step are means over the processes, so a model scales the likelihood
    of its own batch to all the data, as it does alone. What is sent are the gradients of active
    coordinates, and of what is dense: in an exchange each process proposes coordinates by its own
    gradient, and the best of all proposals by the mean gradient are added. All processes have the
    same parameters and active sets, those of rank 0 at first; after each exchange it is checked.

    All of them call :meth:`step`, :meth:`exchange`, :meth:`save`, :meth:`load`,
    :meth:`export`, :meth:`state_dict` and :meth:`load_state_dict` together.

    :param process_group: the processes that take part, by default all.
    :param args: as for :class:`~pyro_ssvi.SSVI`, as are ``kwargs``.
    :raises RuntimeError: without a process group; and in a step or an exchange, in all processes,
        if they do not agree in what they train.
    """

    def __init__(
        self, *args: Any, process_group: dist.ProcessGroup | None = None, **kwargs: Any
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "DistributedSSVI needs a process group: call "
                "torch.distributed.init_process_group() first and start the script by torchrun, "
                "or use SSVI"
            )
        super().__init__(*args, **kwargs)
        self.process_group = process_group
        self.rank = dist.get_rank(process_group)
        self.world_size = dist.get_world_size(process_group)
        # By name, once all processes have the same.
        self._params: dict[str, Tensor] = {}

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step together with the other processes, as :meth:`pyro_ssvi.SSVI.step`.

        :return: the mean of the losses of all processes.
        """
        self._begin(args, kwargs)
        return super().step(*args, **kwargs)

    def exchange(self, *args: Any, **kwargs: Any) -> dict[str, int]:
        """Exchange coordinates now, as :meth:`pyro_ssvi.SSVI.exchange`, each with its batch."""
        self._begin(args, kwargs)
        return super().exchange(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """As that of SSVI, with what belongs to one process only: the same in all of them."""
        state = super().state_dict()
        own = {key: state[key] for key in ("record", "scales", "random")}
        return {**state, "ranks": self._gathered(own)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, of as many processes or of another number of them.

        Another number of processes draws other random numbers, and forgets gradients that wait
        for the next exchange.
        """
        self._restore(state, "the state")

    def save(self, path: str | os.PathLike) -> None:
        """Write :meth:`state_dict` to a file, in rank 0.

        :raises OSError: in all processes, if it could not be written.
        """
        state = self.state_dict()
        self._in_first(lambda: checkpoint.FILES.write(path, state))

    def load(self, path: str | os.PathLike, map_location: Any = None) -> None:
        """Go on from a file, which only rank 0 reads.

        :param map_location: as for :func:`torch.load`, of this process.
        """
        content = self._in_first(Path(path).read_bytes)
        self._restore(checkpoint.FILES.parse(content, path, map_location), str(path))

    def export(self, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """As :meth:`pyro_ssvi.SSVI.export`, in rank 0; all processes call it."""
        self._in_first(lambda: posterior.export(self, path, dtype))

    def _restore(self, state: Mapping[str, Any], source: str) -> None:
        ranks = state.get("ranks", [])
        same = len(ranks) == self.world_size
        own = ranks[self.rank] if same else {"record": [], "scales": []}
        checkpoint.restore(self, {**state, **own}, source=source)
        self._params = {}
        if not same and self.world_size > 1:
            # The file's generator, which is now that of all, says where each goes on.
            seeds = torch.randint(2**31, (self.world_size,)).tolist()
            pyro.set_rng_seed(seeds[self.rank])

    # What all processes do together

    def _begin(self, args: tuple, kwargs: dict) -> None:
        """Have all processes start from what rank 0 has."""
        if self._params or self.world_size == 1:
            return
        with leaving_no_trace(), torch.no_grad(), poutine.trace(param_only=True) as capture:
            self.loss(self.model, self.guide, *args, **kwargs)
        nodes = capture.trace.nodes
        params = {name: nodes[name]["value"].unconstrained() for name in sorted(nodes)}
        self._compare(params)
        with torch.no_grad():
            for param in params.values():
                self._take_from_first(param)
            for guide in self.guides:
                indices = guide.indices.clone()
                self._take_from_first(indices)
                if not torch.equal(indices, guide.indices):
                    guide.indices = indices  # the old one is in active sets
            ours = [guide.indices for guide in self.guides]
            for buffer in (*self.guide.buffers(), *self.model.buffers()):
                if not any(buffer is indices for indices in ours):
                    self._take_from_first(buffer)
        self._params = params

    def _compare(self, params: dict[str, Tensor]) -> None:
        """Raise if processes differ in what a later step would hang at, or be wrong about."""
        settings = {f"parameter {name!r}": _described(param) for name, param in params.items()}
        settings["schedule"] = str(checkpoint.schedule_state(self.schedule))
        settings["addition"] = f"{type(self.addition).__name__}(batches={self.addition.batches})"
        settings["allocation"] = self.allocation
        settings["number of steps"] = str(self.steps)
        draws = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        others = self._gathered((settings, draws))
        for rank, (other, _) in enumerate(others):
            for what in dict.fromkeys([*others[0][0], *other]):
                was, has = others[0][0].get(what), other.get(what)
                if was != has:
                    raise RuntimeError(
                        f"processes differ in {what}: rank 0 has {was}, rank {rank} has {has}"
                    )
        if len({draws for _, draws in others}) < len(others):
            warnings.warn(
                "some processes draw the same random numbers, so their gradients have the same "
                "errors: call pyro.set_rng_seed(seed + rank) in each",
                stacklevel=4,
            )

    def _agreed(self, loss: Any, params: dict[str, Tensor]) -> tuple[Any, set[Tensor]]:
        if self.world_size == 1:
            return super()._agreed(loss, params)
        unknown = sorted(params.keys() - self._params.keys())
        losses = loss if isinstance(loss, tuple) else (loss,)
        # Also tells which parameters to step, and which have a gradient: here it may be others.
        used = [name in params for name in self._params]
        graded = [name in params and params[name].grad is not None for name in self._params]
        head = [*map(torch_item, losses), len(unknown), *used, *graded]
        sums = torch.tensor(head, dtype=torch.float64, device=self._device)
        dist.all_reduce(sums, group=self.process_group)
        means = (sums[: len(losses)] / self.world_size).tolist()
        any_unknown, *counts = sums[len(losses) :].tolist()
        if any_unknown:
            raise RuntimeError(
                f"step {self.steps + 1} uses parameters that the first step did not use, in this "
                f"process {unknown}: have all of them used in the first step"
            )
        self._params.update(params)
        stepped, averaged = (
            [param for param, count in zip(self._params.values(), part, strict=True) if count]
            for part in (counts[: len(used)], counts[len(used) :])
        )
        for dtype in {param.dtype: None for param in averaged}:
            self._average([param for param in averaged if param.dtype == dtype])
        mean = type(loss)(*means) if hasattr(loss, "_fields") else tuple(means)
        return mean if isinstance(loss, tuple) else means[0], set(stepped)

    def _average(self, params: list[Tensor]) -> None:
        """The mean of gradients over all processes, in one message."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=self.process_group)
        flat /= self.world_size
        for param, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
            param.grad = part.view_as(param)

    def _plan(self, guide: AutoSparseGuide, share: float, record: GradientRecord) -> dict:
        if self.world_size == 1:
            return super()._plan(guide, share, record)
        active_sets = guide.active_sets.values()
        recorded = torch.tensor([active in record for active in active_sets], device=self._device)
        everywhere = recorded.to(torch.int64)
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN, group=self.process_group)
        for active, kept in zip(active_sets, everywhere.tolist(), strict=True):
            if not kept:
                record.discard(active)
        moves = super()._plan(guide, share, record)
        return self._moves_of_first(guide, moves)

    @property
    def _processes(self) -> int:  # type: ignore[override]
        return self.world_size

    def _removal_scores(self, *args: Any) -> Tensor:
        scores = super()._removal_scores(*args)
        if self.world_size > 1:  # equal, unless the criterion or the prior's scale is random
            self._take_from_first(scores)
        return scores

    def _read(self, active: ActiveSet, indices: Tensor, record: GradientRecord) -> Tensor:
        sums = super()._read(active, indices, record)
        if self.world_size > 1:
            dist.all_reduce(sums, group=self.process_group)
            sums /= self.world_size
        return sums

    def _moves_of_first(self, guide: AutoSparseGuide, moves: Mapping[str, Move]) -> dict[str, Move]:
        """Rank 0's moves, which others have as well, unless something random decides."""
        own = [
            (len(moves[site.name].indices), moves[site.name].size) if site.name in moves else (0, 0)
            for site in guide.sites
        ]
        sizes = torch.tensor(own, device=self._device)
        self._take_from_first(sizes)
        taken = {}
        for site, (k, size) in zip(guide.sites, sizes.tolist(), strict=True):
            if k:
                move = moves.get(site.name)
                if move is None or len(move.indices) != k:
                    move = Move(sizes.new_empty(k), sizes.new_empty(k), size)
                self._take_from_first(move.indices)
                self._take_from_first(move.source)
                for values in move.first or ():
                    self._take_from_first(values)
                taken[site.name] = move._replace(size=size)
        return taken

    def _choose(self, active: ActiveSet, n: int, record: GradientRecord) -> Tensor:
        if self.world_size == 1 or isinstance(self.addition, Random):
            return super()._choose(active, n, record)
        candidates, scores = self._best(active, n, record)
        if not scores.isfinite().all():
            raise FloatingPointError("its gradient is not finite")
        return candidates

    def _propose(self, active: ActiveSet, n: int, record: GradientRecord) -> tuple[Tensor, Tensor]:
        if self.world_size == 1 or isinstance(self.addition, Random):
            return super()._propose(active, n, record)
        return self._best(active, n, record)

    def _best(self, active: ActiveSet, n: int, record: GradientRecord) -> tuple[Tensor, Tensor]:
        """The best by the mean gradient among those that are best for some process."""
        assert not isinstance(self.addition, Random)
        try:
            own, failed = self.addition.choose(active, n, record), False
        except FloatingPointError:  # the others wait, and are to fail as well
            own, failed = active.indices.new_zeros(n), True
        proposed = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(proposed, own, group=self.process_group)
        candidates = torch.cat(proposed).unique()
        sums = super()._read(active, candidates, record)
        if failed:
            sums.fill_(torch.nan)
        dist.all_reduce(sums, group=self.process_group)
        sums /= self.world_size
        scores = self.addition.scores_at(active, candidates, sums, record, self.world_size)
        scores, best = scores.topk(n, sorted=False)
        best = candidates[best]
        for chosen in (best, scores):  # others' may differ where random numbers take part
            self._take_from_first(chosen)
        return best, scores

    def _exchange(self, share: float, optim: torch.optim.Optimizer | None = None) -> dict[str, int]:
        exchanged = super()._exchange(share, optim)
        if self.world_size > 1:
            self._check_equal()
        return exchanged

    def _check_equal(self) -> None:
        """Compare a number for each parameter and active set that depends on every bit of it."""
        tensors = dict(self._params)
        for i, guide in enumerate(self.guides):
            tensors[f"indices of guide {i}"] = guide.indices
        own = torch.stack([_fingerprint(tensor) for tensor in tensors.values()])
        all_ranks = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(all_ranks, own, group=self.process_group)
        differ = (torch.stack(all_ranks) != all_ranks[0]).tolist()
        for rank, row in enumerate(differ):
            names = [name for name, wrong in zip(tensors, row, strict=True) if wrong]
            if names:
                raise RuntimeError(
                    f"after step {self.steps} rank {rank} has other values than rank 0 of {names}: "
                    "were they changed in one process only, or do processors or versions of torch "
                    "differ? Load the last checkpoint"
                )

    # Messages

    @property
    def _device(self) -> torch.device:
        return next(iter(self._params.values())).device

    @property
    def _source(self) -> int:
        group = self.process_group
        return 0 if group is None else dist.get_global_rank(group, 0)

    def _take_from_first(self, tensor: Tensor) -> None:
        message = tensor.detach().contiguous()
        dist.broadcast(message, self._source, group=self.process_group)
        tensor.detach().copy_(message)

    def _in_first(self, use_file: Callable[[], Any]) -> Any:
        """What it gives in rank 0, which alone calls it; or its error, in all processes."""
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [use_file()]
            except Exception as error:  # whatever it is, the others wait
                outcome = [error]
        dist.broadcast_object_list(outcome, self._source, group=self.process_group)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def _gathered(self, value: Any) -> list:
        """What each has, in the order of ranks."""
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.process_group)
        return values


def _described(param: Tensor) -> str:
    return f"{tuple(param.shape)} {param.dtype} on {param.device.type}"


_BITS: Mapping[int, torch.dtype] = {
    1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64
}  # fmt: skip


def _fingerprint(tensor: Tensor) -> Tensor:
    """A number that depends on every bit and its place, computed where the tensor is."""
    bits = tensor.detach().contiguous().reshape(-1).view(_BITS[tensor.element_size()])
    odd = torch.arange(1, 2 * len(bits) + 1, 2, device=tensor.device)
    return (bits * odd).sum()
