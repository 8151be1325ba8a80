"""The value of a sparse site, as the model receives it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils._pytree import tree_map

from . import autograd
from .active_set import ActiveSet
from .errors import MaterialiseError, PerformanceWarning, warn_caller
from .gradient_record import recording

__all__ = ["SparseTensor", "dense_fallbacks", "forbid_materialise", "implements"]

#: How often each function met a sparse value that it has no rule for, and got a dense one.
dense_fallbacks: Counter[str] = Counter()

_RULES: dict[Any, Callable] = {}
_FORBIDDEN: ContextVar[bool] = ContextVar("materialise_forbidden", default=False)

_T: Any = Tensor  # torch's stubs do not know that attributes are descriptors

# What these say of the wrapper is true of the value: they need no numbers.
_METADATA: set[Any] = {
    _T.__hash__,
    _T.__len__,
    _T.device.__get__,
    _T.dim,
    _T.dtype.__get__,
    _T.element_size,
    _T.get_device,
    _T.grad.__get__,
    _T.grad_fn.__get__,
    _T.is_complex,
    _T.is_cpu.__get__,
    _T.is_cuda.__get__,
    _T.is_floating_point,
    _T.is_leaf.__get__,
    _T.is_meta.__get__,
    _T.is_quantized.__get__,
    _T.is_sparse.__get__,
    _T.is_sparse_csr.__get__,
    _T.itemsize.__get__,
    _T.layout.__get__,
    _T.ndim.__get__,
    _T.ndimension,
    _T.nelement,
    _T.numel,
    _T.requires_grad.__get__,
    _T.shape.__get__,
    _T.size,
    torch.is_complex,
    torch.is_floating_point,
    torch.numel,
}
# On a throw-away dense copy these would do nothing, without a word.
_REFUSED = {Tensor.register_hook, Tensor.retain_grad, Tensor.backward}


class SparseTensor(Tensor):
    """A tensor with ``values`` at its active coordinates and exact zeros elsewhere.

    It has the site's shape, dtype and device, and goes wherever a tensor goes. Functions with
    a rule (see :mod:`pyro_ssvi.rules`) read the active entries only. All others get the dense
    tensor, so every program runs; they are counted in :data:`dense_fallbacks`, with a
    :class:`~pyro_ssvi.errors.PerformanceWarning` at the first time for each function. In-place
    functions are refused: they would change a copy.

    Gradients flow to ``values``, whichever way the tensor is used.

    :param values: ``[*batch, K]``.
    :param active: where the values lie in a tensor of shape ``active.shape``.
    :param transposed: whether this is the transpose (of the last two dimensions) of that tensor.
    :ivar posterior: the :class:`SparseNormal` that the value was drawn from, under local
        reparameterisation: products then draw their own result, see :class:`SSVI`.
    :raises ValueError: if there is not one value for each active coordinate.
    """

    values: Tensor  # type: ignore[assignment]
    active: ActiveSet
    transposed: bool
    posterior: Any = None

    @staticmethod
    def __new__(
        cls: type[SparseTensor], values: Tensor, active: ActiveSet, transposed: bool = False
    ) -> SparseTensor:
        if values.shape[-1:] != (len(active),):
            raise ValueError(
                f"SparseTensor expects values [*batch, {len(active)}] for {active}, "
                f"got shape {tuple(values.shape)}"
            )
        shape = values.shape[:-1] + active.shape
        if transposed:
            shape = torch.Size((*shape[:-2], shape[-1], shape[-2]))
        self = _Attach.apply(values, shape, active, transposed)
        self.values, self.active, self.transposed = values, active, transposed
        return self

    def __init__(self, values: Tensor, active: ActiveSet, transposed: bool = False) -> None:
        pass

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # The rules' gradients are not made for torch.func's transforms.
        rule = None if torch._C._are_functorch_transforms_active() else _RULES.get(func)
        if rule is not None:
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        elif func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return _materialise(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:  # how autograd saves a tensor
            return args[0]._like(args[0].values.detach())
        # Below autograd there is no telling what becomes of the gradient: better no answer.
        raise RuntimeError(
            f"{func} reached a SparseTensor without torch's function protocol: "
            "pass x.to_dense() instead"
        )

    def to_dense(self) -> Tensor:  # type: ignore[override]
        """The dense tensor; differentiable."""
        dense = autograd.scatter(self.values, self.active)
        return dense.transpose(-1, -2) if self.transposed else dense

    def as_subclass(self, cls: Any) -> Any:
        """The dense tensor as a ``cls``; torch would ask no rule for this."""
        return self.to_dense().as_subclass(cls)

    def _like(self, values: Tensor) -> SparseTensor:
        active = self.active.to(values.device)
        return SparseTensor(values, active, self.transposed)

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"SparseTensor(shape={tuple(self.shape)}, active={len(self.active)}, "
            f"density={self.active.density:.3g}, dtype={self.dtype}, device={self.device})"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return SparseTensor, (self.values, self.active, self.transposed)

    def __deepcopy__(self, memo: dict) -> SparseTensor:
        copy = memo[id(self)] = self._like(self.values.detach().clone())
        return copy


class _Attach(torch.autograd.Function):
    """Makes the wrapper, and hangs it on its values in autograd's graph.

    Rules go straight to the values. What takes the wrapper itself, such as an autograd function
    of the user's, sends its gradient through here.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, shape: torch.Size, active: ActiveSet, transposed: bool
    ) -> Tensor:
        ctx.active, ctx.transposed, ctx.record = active, transposed, recording()
        return Tensor._make_wrapper_subclass(
            SparseTensor, shape, dtype=values.dtype, device=values.device
        )

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        g = g.to_dense()
        if ctx.transposed:
            g = g.transpose(-1, -2)
        if ctx.record is not None:
            ctx.record.add_dense(ctx.active, g)
        return ctx.active.gather(g), None, None, None


def implements(*functions: Any) -> Callable[[Callable], Callable]:
    """Register a rule: what ``functions`` do when one of their arguments is a SparseTensor.

    A rule has the signature of its functions. It returns ``NotImplemented`` where it cannot
    serve; the dense fall-back then does::

        @implements(torch.trace)
        def trace(input):
            ...
    """

    def register(rule: Callable) -> Callable:
        _RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


@contextmanager
def forbid_materialise() -> Iterator[None]:
    """Turn dense fall-backs into :class:`~pyro_ssvi.errors.MaterialiseError`, for tests."""
    token = _FORBIDDEN.set(True)
    try:
        yield
    finally:
        _FORBIDDEN.reset(token)


def _materialise(func: Callable, args: tuple, kwargs: dict) -> Any:
    name = resolve_name(func) or getattr(func, "__qualname__", repr(func))
    _refuse_mutation(func, name, args, kwargs)
    if _FORBIDDEN.get():
        raise MaterialiseError(f"{name} has no rule for these sparse arguments")
    if name not in dense_fallbacks:
        warn_caller(
            f"{name} has no rule for these sparse arguments and gets a dense tensor. The result "
            "is right, but costs what a dense guide costs. 'Which operations are sparse' in the "
            "docs says how to avoid it; pyro_ssvi.dense_fallbacks counts such calls.",
            PerformanceWarning,
        )
    dense_fallbacks[name] += 1
    args, kwargs = tree_map(_dense, (args, kwargs))
    return func(*args, **kwargs)


def _dense(x: Any) -> Any:
    return x.to_dense() if isinstance(x, SparseTensor) else x


def _refuse_mutation(func: Callable, name: str, args: tuple, kwargs: dict) -> None:
    short = getattr(func, "__name__", "")
    mutates = (
        func in _REFUSED
        or short in ("__set__", "__setitem__", "__delitem__")
        or (short.endswith("_") and not short.endswith("__"))
        or kwargs.get("inplace") is True
    )
    target = args[0] if args else next(iter(kwargs.values()), None)
    if mutates and isinstance(target, SparseTensor):
        # Not a TypeError: Python would take `w += 1` for `w = w + 1`.
        raise RuntimeError(
            f"{name} would change a copy of the sparse value, with no effect on the posterior: use "
            "the out-of-place function, or work on x.to_dense() or x.values"
        )
    if isinstance(kwargs.get("out"), SparseTensor):
        raise RuntimeError(f"{name} cannot write to a sparse value: drop out=")
