"""Random numbers of a loss: torch draws them before its programs run, in the loss's order, and they are inputs there.

So a call takes from torch's generators what the plain loss would, and its gradients, by kernels or through the plain
loss, are those of the numbers that it had.
"""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .extents import Extent, as_argument, is_counted, sizes_of
from .ir import Buffer, Extern, Read
from .refusals import CannotFuse
from .values import Drawn, Input

aten = torch.ops.aten
FILLING = ["normal_", "uniform_", "exponential_", "random_", "cauchy_", "log_normal_", "geometric_", "bernoulli_"]
MAKING = ["rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "native_dropout"]
BY_VALUES = ["multinomial", "poisson", "binomial"]  # of a tensor, as the first form of bernoulli, which has two names
DRAWING = frozenset([*FILLING, *MAKING, *BY_VALUES, "normal", "bernoulli"])
SEED = 0x5EED_0F_7ACE  # of generators while a loss is traced
SEEDS = "it seeds torch's random numbers, which a fused loss would do in its first call alone; seed them outside"


class Draws:
    """What a loss draws while it is traced: the steps that draw, and the inputs that they make."""

    def __init__(self, tracer: Any, generators: Sequence[torch.Generator]):
        self.tracer, self.generators = tracer, [_default_generator(tracer.device), *generators]
        self.steps: list[Extern] = []
        self.inputs: list[Drawn] = []

    def draw(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """What a random operator gives: a tensor, or the one that it fills."""
        if name not in DRAWING or self.tracer.in_gradient:
            raise self.tracer.refusal(f"{name} is random in a way of its own")
        self._check_generators([each for each in (*args, *kwargs.values()) if isinstance(each, torch.Generator)])
        if name == "normal" and any(isinstance(argument, Tensor) for argument in args):
            with self.tracer.within():
                return _normal(*args, **kwargs)
        drawn = self._drawn(func, name, args, kwargs)
        if name == "native_dropout":
            with self.tracer.within():
                return _dropped_out(args[0], args[1], drawn), drawn
        if func._schema.is_mutable:
            args[0].write(drawn.value)
        return args[0] if func._schema.is_mutable else drawn

    def _check_generators(self, given: Sequence[torch.Generator]) -> None:
        if any(generator.initial_seed() != SEED for generator in self.generators):
            raise self.tracer.refusal(SEEDS)
        if any(generator.initial_seed() != SEED for generator in given):
            raise self.tracer.refusal("it makes a torch.Generator; make that an argument or an attribute")

    def _drawn(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """What an operator draws, which is the last of its results, as a new input."""
        if any(argument.name == "device" for argument in func._schema.arguments):
            kwargs = {**kwargs, "device": self._device(name, kwargs.get("device"))}
        shape, dtype = _kind(name, args, kwargs)
        if any(map(is_counted, shape)):
            raise self.tracer.refusal(f"{name} draws as many numbers as a mask chooses, which depends on values")
        if isinstance(args[0], Tensor) and name not in BY_VALUES and func is not aten.bernoulli.default:
            args = (self._like(args[0], func._schema.is_mutable), *args[1:])
        arguments, keywords = (as_argument(given, partial(self._readable, name)) for given in (args, kwargs))
        drawn = Drawn(f"drawn{len(self.inputs)}", shape, dtype)
        results = [f"result{k}_of_{drawn.name}" for k in range(len(func._schema.returns) - 1)] + [drawn.name]
        buffers = tuple([Buffer(result, sizes_of(shape), dtype) for result in results])
        self.steps.append(Extern(buffers, func, arguments, keywords))
        self.inputs.append(drawn)
        return self.tracer.traced(drawn)

    def _device(self, name: str, given: torch.device | None) -> torch.device:
        device = self.tracer.device
        if given is None and not name.endswith("_like"):
            given = torch.get_default_device()
        if given is not None and given.type != device.type:
            raise self.tracer.refusal(f"{name} draws on {given.type}, where the arguments are on {device.type}")
        return device

    def _like(self, tensor: Any, is_written: bool) -> Read:
        """A tensor of a shape, for an operator to which it does not matter what stands there."""
        if isinstance(tensor.value, Input) and not is_written:
            return Read(tensor.value.name)
        blank = Buffer(f"blank{len(self.steps)}", sizes_of(tensor.shape), tensor.dtype)
        keywords = {"dtype": tensor.dtype, "device": self.tracer.device}
        self.steps.append(Extern((blank,), aten.empty.memory_format, ([*blank.sizes],), keywords))
        return Read(blank.name)

    def _readable(self, name: str, argument: Any) -> Any:
        """An argument of an operator, with inputs by name."""
        if not isinstance(argument, Tensor):
            return argument
        value = self.tracer.value(argument)
        if not isinstance(value, Input):
            raise self.tracer.refusal(f"{name} draws by what the loss computes; by an argument alone it is fused")
        return Read(value.name)


def _kind(name: str, args: Any, kwargs: Any) -> tuple[tuple[Extent, ...], torch.dtype]:
    """The shape and the dtype of what an operator draws."""
    first = args[0]
    if name == "multinomial":
        return (*first.shape[:-1], args[1]), torch.int64
    if isinstance(first, Tensor):
        return tuple(first.shape), torch.bool if name == "native_dropout" else kwargs.get("dtype") or first.dtype
    if name == "randperm":
        shape = (first,)
    else:
        shape = tuple(next(argument for argument in args if isinstance(argument, (list, tuple))))
    default = torch.int64 if name.startswith("randint") or name == "randperm" else torch.get_default_dtype()
    return shape, kwargs.get("dtype") or default


def _normal(mean: Any, std: Any = 1.0, **kwargs: Any) -> Tensor:
    """Normal numbers by a tensor, as torch makes them: of standard ones."""
    both = isinstance(mean, Tensor) and isinstance(std, Tensor)
    like = mean + std if both else mean if isinstance(mean, Tensor) else std
    return aten.empty_like(like).normal_(**kwargs) * std + mean


def _dropped_out(x: Any, p: float, mask: Any) -> Any:
    """What native_dropout gives of a mask."""
    return x * mask * (0.0 if p == 1 else 1 / (1 - p))


class Redrawn(TorchDispatchMode):
    """Gives a loss the numbers that were drawn for it before."""

    def __init__(self, drawn: Sequence[Tensor]):
        super().__init__()
        self._left = iter(drawn)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name == "normal" and any(isinstance(argument, Tensor) for argument in args):
            with self:
                return _normal(*args, **kwargs)
        drawn = next(self._left)
        if func is aten.native_dropout.default:
            return _dropped_out(args[0], args[1], drawn), drawn
        return args[0].copy_(drawn) if func._schema.is_mutable else drawn.clone()


def _default_generator(device: torch.device) -> torch.Generator:
    return torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]


class Untouched:
    """Takes nothing from generators, torch's or Python's: a trace only notes what a loss draws from torch's.

    Raises:
        CannotFuse: for a loss that draws in Python, or seeds.
    """

    def __init__(self, generators: Sequence[torch.Generator]):
        self._generators = generators
        modules = (random, sys.modules["numpy"].random) if "numpy" in sys.modules else (random,)
        self._setters = [getattr(module, "setstate", None) or module.set_state for module in modules]
        self._getters = [getattr(module, "getstate", None) or module.get_state for module in modules]

    def __enter__(self) -> None:
        self._of_python = self._drawn_in_python()
        self._of_torch = [generator.get_state() for generator in self._generators]
        for generator in self._generators:
            generator.manual_seed(SEED)

    def _drawn_in_python(self) -> list[Any]:
        return [get() for get in self._getters]

    def __exit__(self, *exception: Any) -> None:
        seeded = any(generator.initial_seed() != SEED for generator in self._generators)
        for generator, state in zip(self._generators, self._of_torch):
            generator.set_state(state)
        if pickle.dumps(self._of_python) != pickle.dumps(self._drawn_in_python()):
            for set_state, state in zip(self._setters, self._of_python):
                set_state(state)
            raise CannotFuse("it draws random numbers in Python, which would be the same in every call")
        if seeded:
            raise CannotFuse(SEEDS)
