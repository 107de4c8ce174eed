"""The whole numbers that a kernel is launched with: sizes, and strides along its axes, combined before the launch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..ir import Size
from ..runtime import number_of

Term = tuple[Size, tuple[str, int] | None]  # a size, times the stride of a buffer along a dimension
Linear = tuple[Term, ...]  # the sum of terms


@dataclass
class Numbers:
    """The numbers of one kernel by name, each once."""

    names: dict[Linear, str] = field(default_factory=dict)  # of which divisibility is worth a kernel of its own
    plain: dict[Linear, str] = field(default_factory=dict)  # of which it is not

    def name(self, number: Linear, wanted: str, is_plain: bool = False) -> str:
        names = self.plain if is_plain else self.names
        if number not in names:
            taken = {*self.names.values(), *self.plain.values()}
            suffixes = (f"{wanted}_{k}" for k in range(1, len(taken) + 2))
            names[number] = wanted if wanted not in taken else next(s for s in suffixes if s not in taken)
        return names[number]

    def size(self, size: Size, wanted: str = "size", is_plain: bool = True) -> str:
        """A size as a literal, or the name it is given by."""
        return str(size.value) if size.op == "const" else self.name(((size, None),), wanted, is_plain)

    @property
    def every(self) -> list[tuple[Linear, str]]:
        """All of them, in the order of the arguments."""
        return [*self.names.items(), *self.plain.items()]


def value_of(number: Linear, tensors: Mapping[str, Tensor]) -> int:
    total = 0
    for size, stride in number:
        total += number_of(size)(tensors) * (1 if stride is None else tensors[stride[0]].stride(stride[1]))
    return total


def inputs_of(numbers: Iterable[Linear], sizes: Iterable[Size]) -> Iterator[str]:
    """Names of the buffers that numbers and sizes are computed from."""
    waiting = list(sizes)
    for number in numbers:
        for size, stride in number:
            waiting.append(size)
            yield from () if stride is None else (stride[0],)
    while waiting:
        size = waiting.pop()
        waiting += size.arguments
        if size.op == "size":
            yield size.value[0]
