"""Runs a loss and its gradient once on tensors without elements, and keeps what would have been computed."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .draws import Draws, Untouched
from .extents import Extent, extent_of, is_counted, number_of
from .externs import LEFT_TO_TORCH, results
from .ir import Extern, Size
from .masks import Mask, Masks
from .operators import ORDERED
from .piecewise import Outline
from .refusals import CannotFuse, on_reading, refused
from .sizes import LARGEST, Assumptions
from .values import Complex, Drawn, External, ExternalCall, Input, Scalar, Value

aten = torch.ops.aten
# Operators of Python in which a size or a hyper-parameter may stand beside a tensor.
ARITHMETIC = {
    name.format(name_of_operator)
    for name_of_operator in [
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "true_divide",
        "pow",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "maximum",
        "minimum",
        "where",
        "clamp",
        "fill",
        "masked_fill",
    ]
    for name in ("{}", "__{}__", "__r{}__", "__i{}__", "{}_")
}


# How a value written through a view becomes one of the base: functions of the base, the new value and the view's
# arguments.
PUT_BACK: dict[str, Callable[..., Tensor]] = {
    "slice": lambda base, new, *where: aten.slice_scatter(base, new, *where),
    "select": lambda base, new, *where: aten.select_scatter(base, new, *where),
    "diagonal": lambda base, new, *where: aten.diagonal_scatter(base, new, *where),
    "view": lambda base, new, *_: aten.view(new, base.shape),
    "squeeze": lambda base, new, *_: aten.view(new, base.shape),
    "unsqueeze": lambda base, new, *_: aten.view(new, base.shape),
    "transpose": lambda base, new, *dims: aten.transpose(new, *dims),
    "t": lambda base, new: aten.t(new),
    "permute": lambda base, new, order: aten.permute(new, [order.index(d) for d in range(len(order))]),
    "alias": lambda base, new: new,
    "detach": lambda base, new: new,
}


class Traced(Tensor):
    """A tensor without elements whose :class:`Value` says what they would be.

    A view has a base, a function that makes its value of the base's, and one that puts a written value back.
    """

    _value: Value
    _of: Value | None  # the base's value of which _value was made
    base: Traced | None
    view_of: Callable[[Value], Value]
    put: Callable[[Value, Value], Value] | None
    may_write: bool  # though it is an input

    @staticmethod
    def of(value: Value, device: torch.device, requires_grad: bool = False) -> Traced:
        for extent in value.shape:
            if isinstance(extent, torch.SymInt):
                extent.node.settle_emptiness()
        tensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            Traced,
            value.shape,
            strides=_contiguous(value.shape),
            storage_size=0,  # of open sizes it takes long to compute
            dtype=value.dtype,
            device=device,
            requires_grad=requires_grad,
        )
        tensor._value, tensor._of, tensor.base, tensor.put = value, None, None, None
        tensor.may_write = False
        return tensor

    @property
    def value(self) -> Value:
        if self.base is not None and self.base.value is not self._of:
            self._of = self.base.value
            self._value = self.view_of(self._of)
        return self._value

    def write(self, value: Value) -> None:
        """What an in-place operator does, on a view to its base."""
        if self.base is None:
            if isinstance(self._value, Input) and not (self.may_write or isinstance(self._value, Drawn)):
                raise CannotFuse("writes into an argument of the loss")
            self._value = value
        elif self.put is None:
            raise CannotFuse("writes into a view of a kind that it cannot be written back through")
        else:
            self.base.write(self.put(self.base.value, value))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Traced({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise CannotFuse("a tensor of it is kept from one call to the next")


def _contiguous(shape: Sequence[Extent]) -> list[Extent]:
    """The strides of a tensor without gaps."""
    sizes: list[Any] = [number_of(extent) for extent in reversed(shape[1:])]
    return [1, *map(extent_of, accumulate(sizes, operator.mul))][: len(shape)][::-1]


@dataclass(frozen=True)
class Trace:
    """What a loss computes of its inputs, and what its gradient computes of them and of the outputs' gradients."""

    inputs: tuple[Input, ...]
    draws: tuple[Extern, ...]  # what is to draw its random numbers first
    drawn: tuple[Drawn, ...]
    constants: dict[Input, Tensor]  # small tensors that the loss makes of numbers
    outputs: tuple[Value, ...]
    structure: Any  # of the outputs, for pytree
    cotangents: tuple[Input | None, ...]  # the outputs' gradients, of those that have one
    gradients: tuple[Value | None, ...]  # one for each input that requires it, None where it has no influence
    assumptions: Assumptions
    checks: Sequence[ExternalCall]  # operators that only raise where something is wrong
    checks_of_gradient: Sequence[ExternalCall]

    def without_gradients(self) -> Trace:
        return replace(self, cotangents=(None,) * len(self.cotangents), gradients=(), checks_of_gradient=())


class Tracer(TorchDispatchMode):
    """Turns every operator into values."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # no compiler ever sees a trace, and marking it so would import the compiler: 1.5 s

    def __init__(self, device: torch.device, assumptions: Assumptions, generators: Sequence[torch.Generator]):
        super().__init__()
        self.device, self.assumptions = device, assumptions
        self.draws = Draws(self, generators)
        self.lifted: dict[int, Traced] = {}  # by the id of the real tensor they stand for
        self.constants: dict[Input, Tensor] = {}
        self.masks = Masks()
        self.outline = Outline()
        self.checks: dict[bool, list[ExternalCall]] = {False: [], True: []}  # by whether they are of the gradient
        self.in_gradient, self.depth = False, 0  # how many operators are taken apart

        from .table import COMPLEX_OPERATORS, OPERATORS

        self.operators = {True: COMPLEX_OPERATORS, False: OPERATORS}  # by whether they are of complex numbers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, is_random, is_mutable = _known_of(func)
        if name == "lift_fresh" and not isinstance(args[0], Traced):
            return self.traced(self.constant(args[0]))
        if name == "size":
            raise self.refusal("it calls an operator that wants sizes as fixed numbers, which are open here")
        if is_random:
            return self.draws.draw(func, name, args, kwargs)
        if is_mutable:
            return self._in_place(func, name, args, kwargs)
        complex_numbers = _has_complex_numbers([*args, *kwargs.values()])
        handler = self.operators[complex_numbers].get(name)
        if handler is not None:
            if self.masks and name in ORDERED and self._are_chosen([*args, *kwargs.values()]):
                raise self.refusal(f"{name} depends on where the elements stand that a boolean mask chooses")
            result = handler(self, *self._values(args), **self._values(kwargs))
            if result is not NotImplemented:
                return self._wrapped(func, args, kwargs, result)
        with self.within():
            if func in decomposition_table and not complex_numbers and name not in LEFT_TO_TORCH:
                return _undecorated(decomposition_table[func])(*args, **kwargs)
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self._external(func, args, kwargs)

    @contextmanager
    def within(self) -> Iterator[None]:
        """While what an operator is made of is traced."""
        self.depth += 1
        try:
            with self:
                yield
        finally:
            self.depth -= 1

    @property
    def is_asked_by_loss(self) -> bool:
        """Whether the loss itself calls an operator, rather than its gradient or another operator."""
        return not self.in_gradient and self.depth == 0

    def count(self, mask: Mask) -> Extent:
        """How many elements a mask chooses, as a size: to torch, which may ask, one that no tensor of a call has."""
        return self.assumptions.atom(Size("count", mask), LARGEST // 2 + len(self.masks), 0).extent

    def _are_chosen(self, arguments: Any) -> bool:
        """Whether some of the arguments are what a mask chooses, or how many that are."""
        if isinstance(arguments, (list, tuple)):
            return any(map(self._are_chosen, arguments))
        if isinstance(arguments, Traced):
            return any(map(is_counted, arguments.value.shape))
        return is_counted(arguments)

    def refusal(self, reason: str) -> CannotFuse:
        return refused(reason, "in its gradient" if self.in_gradient else None)

    def traced(self, value: Value) -> Traced:
        return Traced.of(value, self.device)

    def value(self, argument: Any) -> Any:
        """The value of a tensor; anything else as it is."""
        if isinstance(argument, Traced):
            return argument.value
        return self.lift(argument) if isinstance(argument, Tensor) else argument

    def _values(self, arguments: Any) -> Any:
        kind = type(arguments)
        if kind is list or kind is tuple:
            return kind([self._values(argument) for argument in arguments])
        if kind is dict:
            return {name: self._values(argument) for name, argument in arguments.items()}
        return self.value(arguments)

    def lift(self, tensor: Tensor) -> Value:
        """The value of a real tensor that the loss met: one of its own, or made of numbers just now."""
        if id(tensor) in self.lifted:
            return self.lifted[id(tensor)].value
        raise self.refusal(
            "it reads a tensor that is neither an argument nor a parameter, buffer or attribute of the loss; "
            "pass it as an argument, or make it a buffer"
        )

    def constant(self, tensor: Tensor) -> Value:
        """A tensor that the loss made of numbers."""
        if tensor.is_complex():
            return Complex(self.constant(tensor.real), self.constant(tensor.imag))
        if tensor.ndim == 0:
            return Scalar(tensor.item(), tensor.dtype)
        value = Input(f"constant{len(self.constants)}", tensor.shape, tensor.dtype)
        self.constants[value] = tensor
        return value

    def _wrapped(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Tensors of the values of a result; those of a view know their base."""
        if isinstance(result, (list, tuple)):
            parts = [self.traced(value) if isinstance(value, Value) else value for value in result]
            if func.is_view:
                for k, part in enumerate(parts):
                    self._link(part, args[0], lambda value, k=k: self._again(func, value, args, kwargs)[k], None)
            return type(result)(parts)
        if not isinstance(result, Value):
            return result
        traced = self.traced(result)
        if func.is_view:
            put = PUT_BACK.get(_known_of(func)[0])
            self._link(
                traced,
                args[0],
                lambda value: self._again(func, value, args, kwargs),
                put and (lambda base, value: self.value(put(*map(self.traced, (base, value)), *args[1:]))),
            )
        return traced

    def _again(self, func: Any, value: Value, args: Any, kwargs: Any) -> Any:
        with self.within():
            result = func(self.traced(value), *args[1:], **kwargs)
        return result.value if isinstance(result, Traced) else [part.value for part in result]

    def _link(self, view: Any, base: Any, view_of: Any, put: Any) -> None:
        if isinstance(base, Traced):
            view.base, view._of, view.view_of, view.put = base, base.value, view_of, put

    def _in_place(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        written = args[0] if args and isinstance(args[0], Traced) else None
        if not name.endswith("_") or written is None:
            raise self.refusal(f"{name} writes into a tensor that it is given")
        if torch.Tag.inplace_view in func.tags:
            raise self.refusal(f"{name} changes the shape of a tensor; use {name[:-1]}")
        with self.within():
            # A copy may be written over, where what it is of may be an argument.
            new = aten.clone(args[1]) if name == "copy_" else _out_of_place(func)(*args, **kwargs)
            new = aten.expand(aten._to_copy(new, dtype=written.dtype), written.shape)
            try:
                written.write(new.value)
            except CannotFuse as reason:
                raise self.refusal(f"{name} {reason}; use {name[:-1]}") from reason
        return written

    def _external(self, func: Any, args: Any, kwargs: Any) -> Any:
        name, *_ = _known_of(func)
        if name == "as_strided":
            raise self.refusal("as_strided depends on how a tensor lies in memory")
        if name == "_local_scalar_dense":
            raise self.refusal(on_reading())
        if self.masks and self._are_chosen([*args, *kwargs.values()]):
            raise self.refusal(f"{name} needs what a boolean mask chooses one after the other in memory")
        if any(tag in func.tags for tag in (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)):
            raise self.refusal(f"{name} gives a result whose size depends on values")

        try:
            returned = results(self, func, name, args, kwargs)
        except Exception as error:
            raise self.refusal(f"{name} has no shape function for open sizes") from error
        call = ExternalCall(func, self._values(args), self._values(kwargs))
        if returned is None:
            self.checks[self.in_gradient].append(call)
            return None
        outputs, structure = tree_flatten(returned)
        empty = torch.empty(0)  # stands for a result that was not asked for, such as a gradient
        kinds = [empty if output is None else output for output in outputs]
        call.outputs = [External(call, k, tuple(t.shape), t.dtype) for k, t in enumerate(kinds)]
        if isinstance(returned, Tensor):
            return self._wrapped(func, args, kwargs, call.outputs[0])
        made = [None if t is None else self.traced(output) for t, output in zip(outputs, call.outputs)]
        return tree_unflatten(made, structure)


@functools.cache
def _out_of_place(func: Any) -> Any:
    """The operator that gives what an in-place one writes; not every one calls its overloads alike."""
    packet = getattr(aten, _known_of(func)[0][:-1])
    wanted = [argument.type for argument in func._schema.arguments]
    for name in (func._overloadname, *packet.overloads()):
        overload = getattr(packet, name, None)
        if overload is not None and [argument.type for argument in overload._schema.arguments] == wanted:
            return overload
    raise CannotFuse(f"{func} has no form that gives its result back")


_KEEPS_COMPILER_OUT = torch._disable_dynamo(lambda: None).__code__


def _undecorated(decomposition: Callable[..., Any]) -> Callable[..., Any]:
    """A decomposition of torch's behind what keeps the compiler out of it, importing that first: a whole second."""
    inner: Any = decomposition
    while hasattr(inner, "__wrapped__"):
        if inner.__code__ is _KEEPS_COMPILER_OUT:
            return inner.__wrapped__
        inner = inner.__wrapped__
    return decomposition


@functools.cache
def _known_of(func: Any) -> tuple[str, bool, bool]:
    """The name of an operator, whether it is random, and whether it writes into what it is given."""
    schema = func._schema
    return schema.name.split("::")[1], torch.Tag.nondeterministic_seeded in func.tags, schema.is_mutable


def _has_complex_numbers(arguments: Any) -> bool:
    if isinstance(arguments, (list, tuple)):
        return any(map(_has_complex_numbers, arguments))
    if isinstance(arguments, Traced):  # whose own method, a function of torch, would go through the modes
        return arguments._value.dtype.is_complex
    if isinstance(arguments, Tensor):
        return arguments.is_complex()
    return isinstance(arguments, complex) or (isinstance(arguments, torch.dtype) and arguments.is_complex)


class Numbers(TorchFunctionMode):
    """Lets sizes and hyper-parameters stand in arithmetic with tensors; elsewhere they become plain numbers."""

    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

        from .rewrites import REWRITES

        self.rewrites = REWRITES

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.tracer.lifted:  # here rather than in dispatch, for autograd to see
            args, kwargs = tree_map(self._lifted, args), tree_map(self._lifted, kwargs)
        if func in self.rewrites:
            return self.rewrites[func](self.tracer, *args, **kwargs)
        if func is Tensor.__setitem__ and not isinstance(args[2], Tensor):
            args = (args[0], args[1], self.tracer.traced(Scalar(args[2], args[0].dtype)))
        values = [*args, *kwargs.values()]
        if any(isinstance(v, (torch.SymInt, torch.SymFloat)) for v in values):
            tensors = [v for v in values if isinstance(v, Tensor)]
            if name in ARITHMETIC and tensors:
                dtype = tensors[-1].dtype if name == "where" else tensors[0].dtype
                args = tuple(self._tensor(a, dtype) for a in args)
                kwargs = {k: self._tensor(a, dtype) for k, a in kwargs.items()}
            else:
                args = tuple(self._plain(a) for a in args)
                kwargs = {k: self._plain(a) for k, a in kwargs.items()}
        return func(*args, **kwargs)

    def _lifted(self, argument: Any) -> Any:
        return self.tracer.lifted.get(id(argument), argument) if isinstance(argument, Tensor) else argument

    def _tensor(self, number: Any, dtype: torch.dtype) -> Any:
        """A number as a tensor that does not change the dtype of what it meets."""
        if isinstance(number, torch.SymFloat) and not (dtype.is_floating_point or dtype.is_complex):
            dtype = torch.get_default_dtype()
        elif isinstance(number, torch.SymInt) and dtype is torch.bool:
            dtype = torch.int64
        elif not isinstance(number, (torch.SymInt, torch.SymFloat)):
            return number
        return self.tracer.traced(Scalar(number, dtype))

    def _plain(self, number: Any) -> Any:
        return number.node.guard_float() if isinstance(number, torch.SymFloat) else number


def trace(
    loss: Callable[[list[Any], Any], Any],
    tensors: Sequence[Tensor],
    assumptions: Assumptions,
    requires_grad: Sequence[bool],
    generators: Sequence[torch.Generator] = (),
    may_write: Sequence[bool] = (),
) -> Trace:
    """Traces a loss and, where a tensor requires it, its gradient.

    Args:
        loss: is called with the tensors and the tracer.
        tensors: what it is called with at first; only their shapes and dtypes count.
        assumptions: gathers what the trace relies on.
        requires_grad: for each tensor, whether a gradient is wanted.
        generators: those that the loss may draw from, besides torch's own.
        may_write: for each tensor, whether the loss may write it; as a default none.

    Raises:
        CannotFuse: with the reason.
    """
    if any(tensor.is_complex() for tensor in tensors):
        raise CannotFuse("it takes complex numbers; real ones are fused, and what becomes of them")
    device = tensors[0].device
    inputs = _inputs(tensors, assumptions)
    leaves = [Traced.of(value, device, need) for value, need in zip(inputs, requires_grad)]
    for leaf, may in zip(leaves, may_write):
        leaf.may_write = may
    tracer = Tracer(device, assumptions, generators)
    with (
        Untouched(tracer.draws.generators),
        tracer,
        Numbers(tracer),
        torch.set_grad_enabled(any(requires_grad)),
        _saving_as_it_is(),
    ):
        result = loss(list(leaves), tracer)
        outputs, structure = tree_flatten(result)
        for output in outputs:
            if not isinstance(output, Traced):
                raise CannotFuse(f"it returns {type(output).__name__}, which is no tensor computed from its arguments")
            if output.is_complex():
                raise CannotFuse("it returns complex numbers")
            if any(map(is_counted, output.value.shape)):
                raise CannotFuse("it returns what a boolean mask chooses, whose size depends on values")
        wanted = [leaf for leaf, need in zip(leaves, requires_grad) if need]
        tracer.in_gradient = True
        cotangents = [
            Input(f"grad_output{k}", output.shape, output.dtype) if output.requires_grad else None
            for k, output in enumerate(outputs)
        ]
        learnt = tuple([output for output in outputs if output.requires_grad])
        gradients: Sequence[Any] = [None] * len(wanted)
        values = tuple(output.value for output in outputs)
        if learnt:
            ones = tuple([tracer.traced(cotangent) for cotangent in cotangents if cotangent is not None])
            with torch.autocast(device.type, enabled=False):  # as outside the block in which a loss is called
                # What torch.autograd.grad does, but for a look at the shapes that imports sympy: a quarter of a second.
                gradients = _engine_run_backward(
                    learnt, ones, False, False, tuple(wanted), allow_unreachable=True, accumulate_grad=False
                )
    return Trace(
        inputs,
        tuple(tracer.draws.steps),
        tuple(tracer.draws.inputs),
        tracer.constants,
        values,
        structure,
        tuple(cotangents),
        tuple(map(tracer.value, gradients)),
        assumptions,
        *(tracer.checks[of_gradient] for of_gradient in (False, True)),
    )


def _saving_as_it_is() -> Any:
    """Keeps what is traced from the hooks of checkpoints and their like, which would take it for tensors of theirs."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _inputs(tensors: Sequence[Tensor], assumptions: Assumptions) -> tuple[Input, ...]:
    """Inputs whose equal sizes are the same open size; those of 0 and 1 are fixed."""
    seen: dict[int, Extent] = {0: 0, 1: 1}
    inputs = []
    for k, tensor in enumerate(tensors):
        name = f"input{k}"
        for dimension, size in enumerate(tensor.shape):
            if size not in seen:
                seen[size] = assumptions.size(name, dimension, size)
        inputs.append(Input(name, [seen[size] for size in tensor.shape], tensor.dtype))
    return tuple(inputs)
