"""C++ of one loop of a kernel: its operations; ``loads`` has what they start from, ``results`` what they end in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from .body import Body, words_of
from .expressions import COMPARISONS, COMPUTED, constant, identifier, is_blockwise, operation, size_of
from .ir import WHOLE, ZERO, Expression, Index, Stage
from .loads import load
from .memory import factor_of, looped, total
from .results import result
from .schedule import Loop

if TYPE_CHECKING:
    from .passes import Pass, Space


class Nest:
    """The source of one loop of a kernel."""

    def __init__(self, of: Pass, loop: Loop, space: Space) -> None:
        self.of, self.loop, self.space, self.memory = of, loop, space, of.memory
        self.lanes, self.lane_names = space.axes, {axis.name for axis in space.axes}
        self.outside = [axis for axis in loop.inner if axis.name not in self.lane_names]  # looped over one by one
        self.keeps_order = any(stage.combine in ("argmax", "argmin") for stage in loop.stages)
        self.before: list[str] = []
        self.scalars: list[str] = []
        self.blocks: list[str] = []
        self.body = Body(of.array)
        self.joins: list[str] = []
        self.after: list[str] = []
        self.values: dict[int, str] = {}
        self.texts: dict[tuple[str, bool], str] = {}
        self.viewed: dict[str, str] = {}
        for stage in loop.stages:
            for node in stage.expression.nodes:
                self.values[id(node)] = self._value(node)
            result(self, stage, [self.values[id(value)] for value in stage.values])

    def lines(self) -> list[str]:
        head = [f"// {stage.buffer.name}{_reduction_note(stage)}" for stage in self.loop.stages]
        if self.of.is_rows:
            inner = [*self.blocks, *self.body.lines(set())[0], *self.joins]
            if self.lanes:
                step = f"for (int64_t begin = 0, end; begin < {self.space.name}.numel; begin = end) {{"
                inner = [step, f"end = {self.space.name}.end(begin);", "const int64_t n = end - begin;", *inner, "}"]
            return [*head, *self.before, *looped(self.outside, [*self.scalars, *inner]), *self.after]
        # What is the same along the loops around the lanes is computed before them.
        changing = {axis.name for axis in self.outside}
        steady, inner = _split([*self.scalars, *self.blocks], changing)
        before, within = self.body.lines(changing)
        loops = looped(self.outside, [*inner, *within, *self.joins])
        return [*head, *self.before, *steady, *before, *loops, *self.after]

    def assign(self, kind: str, text: str, varies: bool) -> str:
        """The name of what a text computes, once."""
        if (text, varies) not in self.texts:
            self.texts[text, varies] = name = self.of.name("v")
            if varies:
                self.body.define(kind, name, text)
            else:
                self.scalars.append(f"const {kind} {name} = {text};")
        return self.texts[text, varies]

    def _value(self, node: Expression) -> str:
        kind = COMPUTED[node.dtype]
        if node.op == "load":
            return load(self, node)
        if node.op == "constant":
            return constant(node["value"], node.dtype)
        if node.op == "parameter":
            return self.assign(kind, f"static_cast<{kind}>(a.parameter_{identifier(node['name'])})", False)
        if node.op == "size":
            return self.assign(kind, f"static_cast<{kind}>({size_of(node['value'])})", False)
        if node.op == "index":
            return self.assign("int64_t", *self.position(node["value"]))
        if node.op in COMPARISONS and (text := self._lane_compared(node)):
            return self.assign("bool", text, True)
        arguments = [self.values[id(argument)] for argument in node.arguments]
        varies = self.body.vary(arguments)
        if node.op == "cast" and COMPUTED[node.arguments[0].dtype] == kind:
            return arguments[0]
        if node.op in WHOLE:  # what ``results`` adds up or stores
            return arguments[0]
        if node.op == "checked":
            return self._checked(arguments[0], size_of(node["size"]), varies)
        if varies and is_blockwise(node):
            return self._over_block(node, arguments)
        if varies and node.op == "div" and node.dtype.is_floating_point and arguments[1] not in self.body:
            divisor = self.assign(f"Divisor<{kind}>", f"Divisor<{kind}>({arguments[1]})", False)
            return self.assign(kind, f"{divisor}.quotient({arguments[0]})", True)
        if varies and node.op == "where" and node.dtype is not torch.bool and arguments[0] not in self.body:
            choice = self.assign(f"Choice<{kind}>", f"Choice<{kind}>({arguments[0]})", False)
            return self.assign(kind, f"{choice}.of({arguments[1]}, {arguments[2]})", True)
        return self.assign(kind, operation(node, arguments, varies), varies)

    def _lane_compared(self, node: Expression) -> str:
        """A position along the lanes, compared with what is the same for all: in 32 bits, as wide as float's lanes."""
        index, other = node.arguments
        bound = self.values[id(other)]
        if index.op != "index" or self.body.vary([bound]):
            return ""
        base, lanes = self.split(index["value"])
        if index["value"].divisor != 1 or len(self.lanes) != 1 or list(lanes.values()) != ["1"]:
            return ""
        text = f"lane_of({bound} - ({base}) - begin)"
        if (text, False) not in self.texts:
            self.texts[text, False] = lane = self.of.name("v")
            self.blocks.append(f"const int32_t {lane} = {text};")
        return f"static_cast<int32_t>(i) {COMPARISONS[node.op]} {self.texts[text, False]}"

    def _over_block(self, node: Expression, arguments: Sequence[str]) -> str:
        # The exponent of a block is looked at once for all of its lanes.
        function = "power" if node.op == "pow" and arguments[1] not in self.body else node.op
        key = f"{function}({', '.join(arguments)})", True
        if key not in self.texts:
            self.texts[key] = self.of.name("v")
            kinds = [COMPUTED[argument.dtype] for argument in node.arguments]
            given = list(zip(arguments, kinds))
            self.body.call(COMPUTED[node.dtype], self.texts[key], f"blocks::{function}_", given)
        return self.texts[key]

    def _checked(self, index: str, size: str, varies: bool) -> str:
        inside = self.assign("bool", f"lies_in({index}, {size})", varies)
        if not self.of.at_end:
            self.of.at_start.append("int64_t failed = 0;")
            self.of.at_end.append("if (failed < 0) *a.failed = 1;")
        (self.body.note if varies else self.scalars.append)(f"failed |= straying({index}, {size});")
        return self.assign("int64_t", f"{inside} ? {index} : 0", varies)

    # Places

    def position(self, index: Index) -> tuple[str, bool]:
        """A position along axes as C++, and whether it differs from lane to lane."""
        base, lanes = self.split(index)
        if not lanes:
            text = base
        elif len(self.lanes) == 1:
            ((_, factor),) = lanes.items()
            text = f"{base} + (begin + i) * {factor}"
        else:
            text = f"{self.offsets(lanes, base)}[i]"
        return text if index.divisor == 1 else f"exact_quotient<{index.divisor}>({text})", bool(lanes)

    def split(self, index: Index) -> tuple[str, dict[str, str]]:
        """Where what an index divides is for the loops around the lanes, and its factor for each axis of the lanes."""
        base = total([(axis, factor_of(factor)) for axis, factor in index.terms if axis not in self.lane_names])
        base = base if index.offset == ZERO else f"{base} + {size_of(index.offset)}"
        return base, {axis: factor_of(factor) for axis, factor in index.terms if axis in self.lane_names}

    def offsets(self, by_axis: Mapping[str, str], base: str) -> str:
        """A block of positions along lanes that are several axes."""
        steps, block = self.space.steps(by_axis), self.of.name("k")
        scratch = self.of.array("int64_t")
        self.blocks.append(f"const int64_t* {block} = {steps}.block({self.seek(steps)}, n, {base}, {scratch});")
        return block

    def seek(self, view: str) -> str:
        if self.of.is_rows:
            return f"{view}.seek(begin)"
        line = f"const Seek {view}_at = {view}.seek(begin);"
        if line not in self.of.at_block:
            self.of.at_block.append(line)
        return f"{view}_at"


def _split(lines: Sequence[str], changing: set[str]) -> tuple[list[str], list[str]]:
    """Definitions that take nothing that changes, and all else; what that defines is added to what changes."""
    steady, inner = [], []
    for line in lines:
        if changing and (not line.startswith("const ") or not changing.isdisjoint(words_of(line))):
            changing.update(re.findall(r"(\w+) = ", line)[:1])
            inner.append(line)
        else:
            steady.append(line)
    return steady, inner


def _reduction_note(stage: Stage) -> str:
    if stage.combine is None:
        return ""
    return f" = {stage.combine} over {', '.join(axis.name for axis in stage.reduced)}"
