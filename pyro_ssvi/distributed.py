"""Data-parallel training on :mod:`torch.distributed`: several processes, one sparse posterior."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import pyro
import torch
import torch.distributed as dist
from pyro import poutine
from pyro.infer.util import torch_item, zero_grads
from torch import Tensor

from . import checkpoint, posterior
from .active_set import ActiveSet
from .addition import Evidence
from .allocation import Proposals, Rounds
from .errors import warn_caller
from .exchange import best
from .gradient_record import GradientRecord
from .guides import AutoSparseGuide
from .random_state import leaving_no_trace
from .svi import SSVI, Choice

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
    :raises RuntimeError: without a process group; and in all processes, if they do not agree in
        what they train, are not at the same point, or one of them has an error.
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
        if self.rank < 0:
            raise ValueError(
                "this process is not in process_group: make a DistributedSSVI only in those that "
                f"are, {dist.get_process_group_ranks(process_group)}"
            )
        # By name, once all processes have the same.
        self._params: dict[str, Tensor] = {}
        self._num_losses = 0

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
        """As that of SSVI, with the record and the random state of each process as well."""
        state = self._in_all("gather the state", super().state_dict)
        if self._params:
            self._check_equal()
        own = {key: state[key] for key in ("record", "scales", "random")}
        return {**state, "ranks": self._gathered(own)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, of as many processes or of another number of them.

        Another number of processes draws other random numbers, and forgets gradients that wait
        for the next exchange.

        :raises ValueError: if the state does not fit in one of the processes, and RuntimeError in
            the others; then nothing has changed in any.
        """
        self._restore(lambda: state, "the state")

    def save(self, path: str | os.PathLike) -> None:
        """Write :meth:`state_dict` to a file, in rank 0.

        :raises OSError: in all processes, if it could not be written.
        """
        state = self.state_dict()
        self._in_first("save", lambda: checkpoint.FILES.write(path, state))

    def load(self, path: str | os.PathLike, map_location: Any = None) -> None:
        """Go on from a file, which only rank 0 reads; as :meth:`load_state_dict`.

        :param map_location: as for :func:`torch.load`, of this process.
        """
        content = self._in_first("load", lambda: checkpoint.FILES.content(path))
        self._restore(lambda: checkpoint.FILES.parse(content, path, map_location), str(path))

    def export(self, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """As :meth:`pyro_ssvi.SSVI.export`, in rank 0; all processes call it."""
        self._in_first("export", lambda: posterior.export(self, path, dtype))

    def _restore(self, read: Callable[[], Mapping[str, Any]], source: str) -> None:
        def stage() -> tuple[checkpoint.Staged, bool]:
            state = read()
            checkpoint.check(state, source)
            ranks = state.get("ranks", [])
            same = len(ranks) == self.world_size
            own = ranks[self.rank] if same else {"record": [], "scales": []}
            return checkpoint.stage(self, {**state, **own}, source), same

        staged, same = self._in_all("load", stage)
        staged.commit()
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
        capture = poutine.trace(param_only=True)

        def run() -> Any:
            with leaving_no_trace(), torch.no_grad(), capture:
                return self.loss(self.model, self.guide, *args, **kwargs)

        loss = self._in_all("take the first step", run)
        nodes = capture.trace.nodes
        params = {name: nodes[name]["value"].unconstrained() for name in sorted(nodes)}
        self._compare(self._settings(params))
        draws = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        if len(set(self._gathered(draws))) < self.world_size:
            warn_caller(
                "some processes draw the same random numbers, so their gradients have the same "
                "errors: call pyro.set_rng_seed(seed + rank) in each"
            )
        with torch.no_grad():
            for param in params.values():
                self._take_from_first(param)
            for guide in self.guides:
                indices = guide.indices.clone()
                self._take_from_first(indices)
                if not torch.equal(indices, guide.indices):
                    guide.indices = indices  # the old one is in active sets
            ours = [guide.indices for guide in self.guides]
            for _, buffer in self._buffers():
                if not any(buffer is indices for indices in ours):
                    self._take_from_first(buffer)
        self._params = params
        self._num_losses = len(loss) if isinstance(loss, tuple) else 1

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        for kind, module in (("guide", self.guide), ("model", self.model)):
            yield from module.named_buffers(prefix=kind)

    def _settings(self, params: dict[str, Tensor]) -> dict[str, str]:
        """What a later step would hang at, or be wrong about, if processes differed in it."""
        settings = {f"parameter {name!r}": _described(param) for name, param in params.items()}
        settings |= {f"buffer {name!r}": _described(buffer) for name, buffer in self._buffers()}
        for guide in self.guides:
            for i, site in enumerate(guide.sites):
                what = f"number {i}, {site.k} active of {tuple(site.shape)}, {site.structure}"
                settings[f"site {site.name!r}"] = what
        settings["schedule"] = str(checkpoint.schedule_state(self.schedule))
        settings["addition"] = f"{type(self.addition).__name__}(batches={self.addition.batches})"
        settings["allocation"] = self.allocation
        settings["loss"] = type(self._elbo).__name__
        values = {"kl_weight": self.kl_weight, "local_reparam": self.local_reparam}
        options = self.optim.pt_optim_args
        if not callable(options):
            values |= {f"option {key!r} of the optimizer": options[key] for key in options}
        plain = (bool, int, float, str, tuple)
        return settings | {key: str(v) for key, v in values.items() if isinstance(v, plain)}

    def _compare(self, settings: dict[str, str]) -> None:
        """Raise in all processes if they differ in one of these."""
        first, *_ = others = self._gathered(settings)
        for rank, other in enumerate(others):
            for what in dict.fromkeys([*first, *other]):
                was, has = first.get(what), other.get(what)
                if was != has:
                    raise RuntimeError(
                        f"processes differ in {what}: rank 0 has {was}, rank {rank} has {has}"
                    )

    def _gradients(self, args: tuple, kwargs: dict) -> tuple[Any, dict[str, Tensor]]:
        """The mean loss, and the parameters that any process used, with their mean gradients."""
        if self.world_size == 1:
            return super()._gradients(args, kwargs)
        now = self.steps + 1
        loss: Any = 0.0
        params: dict[str, Tensor] = {}
        numbers: list[float] = []
        error = None
        try:
            loss, params = super()._gradients(args, kwargs)
            unknown = sorted(params.keys() - self._params.keys())
            if unknown:
                raise RuntimeError(
                    f"step {now} uses parameters {unknown} that the first step did not use: have "
                    "all of them used in the first step"
                )
            self._params.update(params)
            losses = loss if isinstance(loss, tuple) else (loss,)
            numbers += map(torch_item, losses)
            # Also tells which parameters to step, and which have a gradient: here it may be others.
            numbers += [name in params for name in self._params]
            graded = [param.grad is not None for param in params.values()]
            graded_names = {name for name, has in zip(params, graded, strict=True) if has}
            numbers += [name in graded_names for name in self._params]
        except Exception as caught:  # whatever it is, the others wait
            error = caught
        try:
            due = " with an exchange" if self.schedule.due(now) else ""
            rows = self._meet(f"take step {now}{due}", error, numbers)
        except Exception:
            zero_grads(set(params.values()))
            self._record = GradientRecord()
            raise
        sums = [sum(column) for column in zip(*rows, strict=True)]
        means = [each / self.world_size for each in sums[: len(losses)]]
        counts = iter(sums[len(losses) :])
        stepped = {name: param for name, param in self._params.items() if next(counts)}
        averaged = [param for param in self._params.values() if next(counts)]
        for dtype in {param.dtype: None for param in averaged}:
            self._average([param for param in averaged if param.dtype == dtype])
        mean = type(loss)(*means) if hasattr(loss, "_fields") else tuple(means)
        return mean if isinstance(loss, tuple) else means[0], stepped

    def _average(self, params: list[Tensor]) -> None:
        """The mean of gradients over all processes, in one message."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=self.process_group)
        flat /= self.world_size
        for param, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
            param.grad = part.view_as(param)

    def _look(self, args: tuple, kwargs: dict) -> None:
        look = super()._look
        self._in_all("exchange", lambda: look(args, kwargs))

    def _choices(
        self, guide: AutoSparseGuide, share: float, record: GradientRecord
    ) -> dict[str, Choice]:
        """One choice of all processes.

        Those leave that do in rank 0: with a criterion that draws they may be others. Of those
        that are to come in any process, the best come; without gradients, those of rank 0.
        """
        choices = super()._choices
        if self.world_size == 1:
            return choices(guide, share, record)
        active_sets = guide.active_sets
        recorded = [active in record for active in active_sets.values()]
        everywhere = torch.tensor(recorded, device=self._device).to(torch.int64)
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN, group=self.process_group)
        for active, kept in zip(active_sets.values(), everywhere.tolist(), strict=True):
            if not kept:
                record.discard(active)
        own = self._in_all("plan an exchange", lambda: choices(guide, share, record))
        removed = {name: self._of_first(choice.removed) for name, choice in own.items()}
        if not self.addition.batches:
            added = {name: choice.added for name, choice in own.items()}
        else:
            pools = {
                active_sets[name]: self._pool(active_sets[name], choice.added, record)
                for name, choice in own.items()
            }

            def propose(active: ActiveSet, rounds: Rounds, room: Tensor | None) -> Proposals:
                return best(active, rounds, *pools[active], room=room)

            added = self._in_all(
                "choose coordinates", lambda: self._arrivals(guide, removed, propose)
            )
        return {name: Choice(removed[name], self._of_first(each)) for name, each in added.items()}

    def _pool(
        self, active: ActiveSet, own: Tensor, record: GradientRecord
    ) -> tuple[Tensor, Tensor]:
        """All that processes propose for a site, and its scores by what they know together.

        :param own: flat indices of units.
        """
        candidates = self._from_all(own).unique()
        coordinates = active.unit_coordinates(candidates)
        places, order = coordinates.flatten().sort()
        sums = self._read(active, places, record)
        scores = self.addition.scores_at(active, places, sums, record, self.world_size)
        scores = torch.empty_like(scores).scatter_(0, order, scores)
        return candidates, scores.view(coordinates.shape).sum(-1)

    def _read(self, active: ActiveSet, places: Tensor, record: GradientRecord) -> Tensor:
        """What all processes know of some coordinates, on average."""
        sums = self.addition.read(active, places, record)
        dist.all_reduce(sums, group=self.process_group)
        return sums / self.world_size

    def _first_values(
        self, active: ActiveSet, added: Tensor, record: GradientRecord
    ) -> tuple[Tensor, Tensor]:
        if self.world_size == 1:
            return super()._first_values(active, added, record)
        assert isinstance(self.addition, Evidence)
        sums = self._read(active, added, record)
        first = self.addition.first_values(active, added, sums, record, self.world_size)
        for values in first:  # the prior's scale may be another
            self._take_from_first(values)
        return first

    def _exchange(self, share: float, optim: torch.optim.Optimizer | None = None) -> dict[str, int]:
        if self.world_size == 1:
            return super()._exchange(share, optim)
        self._compare({"share to exchange": str(share)})
        exchanged = super()._exchange(share, optim)
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

    # Meetings, where all find out whether one has failed, or is somewhere else

    def _meet(self, doing: str, error: Exception | None, numbers: list[float]) -> list[list]:
        """Tell each other some numbers, or raise in all processes if one cannot go on.

        :param doing: the same in all processes, or they are not at the same point.
        :param error: what has gone wrong here.
        :param numbers: as many in all processes; none if there is an error.
        :return: those of each.
        :raises FloatingPointError: if there is no other error in any process.
        """
        # One size for all meetings: gloo mixes up messages of different sizes.
        size = self._num_losses + 2 * len(self._params)
        digest = int.from_bytes(hashlib.sha256(doing.encode()).digest()[:6], "big")
        own = [digest, error is not None, *numbers, *[0.0] * (size - len(numbers))]
        rows = self._rows(own)
        if any(row[0] != digest for row in rows):
            self._raise_apart(doing)
        if any(row[1] for row in rows):
            self._raise_together(error)
        return [row[2:] for row in rows]

    def _rows(self, own: list[float]) -> list[list[float]]:
        if not self._params:
            return self._gathered(own)
        head = torch.tensor(own, dtype=torch.float64, device=self._device)
        heads = [torch.empty_like(head) for _ in range(self.world_size)]
        dist.all_gather(heads, head, group=self.process_group)
        return torch.stack(heads).tolist()

    def _raise_apart(self, doing: str) -> NoReturn:
        first, *_ = others = self._gathered(doing)
        rank, other = next((r, other) for r, other in enumerate(others) if other != first)
        raise RuntimeError(
            f"rank 0 is to {first}, but rank {rank} to {other}: have all processes take as many "
            "steps, and save and load together"
        )

    def _raise_together(self, error: Exception | None) -> NoReturn:
        passable = isinstance(error, FloatingPointError)
        text = "" if error is None else f"{type(error).__name__}: {error}"
        others = self._gathered((text, passable))
        # What skips an exchange in one process may not do so where another has to stop.
        failed = [(skips, rank, text) for rank, (text, skips) in enumerate(others) if text]
        skips, rank, text = min(failed)
        if error is not None and passable == skips:
            raise error
        raise (FloatingPointError if skips else RuntimeError)(f"rank {rank} has failed: {text}")

    def _in_all(self, doing: str, act: Callable[[], Any]) -> Any:
        """What it gives here; if it fails in one process, there is an error in all of them."""
        outcome, error = None, None
        try:
            outcome = act()
        except Exception as caught:  # whatever it is, the others wait
            error = caught
        self._meet(doing, error, [])
        return outcome

    def _in_first(self, doing: str, use_file: Callable[[], Any]) -> Any:
        """What it gives in rank 0, which alone calls it; or its error, in all processes."""
        self._meet(doing, None, [])
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [use_file()]
            except Exception as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, self._source, group=self.process_group)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    # Messages

    @property
    def _device(self) -> torch.device:
        return next(iter(self._params.values())).device

    @property
    def _source(self) -> int:
        group = self.process_group
        return 0 if group is None else dist.get_global_rank(group, 0)

    def _of_first(self, values: Tensor) -> Tensor:
        """What rank 0 has, ``[n]``, of whatever size."""
        size = torch.tensor([len(values)], device=self._device)
        self._take_from_first(size)
        same = len(values) == int(size)
        result = values.clone() if same else values.new_empty(int(size))
        self._take_from_first(result)
        return result

    def _from_all(self, values: Tensor) -> Tensor:
        """What all have, one after the other."""
        own = torch.tensor([len(values)], device=self._device)
        sizes = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(sizes, own, group=self.process_group)
        lengths = [int(size) for size in sizes]
        message = values.new_zeros(max(lengths))
        message[: len(values)] = values
        messages = [torch.empty_like(message) for _ in lengths]
        dist.all_gather(messages, message, group=self.process_group)
        return torch.cat([each[:n] for each, n in zip(messages, lengths, strict=True)])

    def _take_from_first(self, tensor: Tensor) -> None:
        message = tensor.detach().contiguous()
        dist.broadcast(message, self._source, group=self.process_group)
        tensor.detach().copy_(message)

    def _gathered(self, value: Any) -> list:
        """What each has, in the order of ranks."""
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.process_group)
        return values


def _described(param: Tensor) -> str:
    return f"{tuple(param.shape)} {param.dtype} on {param.device.type}"


_BITS = {kind.itemsize: kind for kind in (torch.int8, torch.int16, torch.int32, torch.int64)}


def _fingerprint(tensor: Tensor) -> Tensor:
    """A number that depends on every bit and its place, computed where the tensor is."""
    bits = tensor.detach().contiguous().reshape(-1).view(_BITS[tensor.element_size()])
    odd = torch.arange(1, 2 * len(bits) + 1, 2, device=tensor.device)
    return (bits * odd).sum()
