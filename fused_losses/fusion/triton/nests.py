"""Triton of one nest of a tile: the values of its stages, and the loops around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from ..expressions import identifier
from ..ir import ONE, ZERO, Expression, Index, Size, Stage, plain_axis
from ..schedule import place_along
from .expressions import COMPUTED, literal, operation, typed
from .numbers import Term
from .reductions import REDUCTIONS
from .spaces import LANE, ROW, STEP, Space, indented
from .tiles import PARTS, PROGRAM, Nest, reduced

if TYPE_CHECKING:
    from .kernels import Writer


class Value(NamedTuple):
    """A name or a literal, and what it differs along."""

    text: str
    along: frozenset[str]


class NestWriter:
    """The source of one nest."""

    def __init__(self, of: Writer, nest: Nest, space: Space) -> None:
        self.of, self.nest, self.space = of, nest, space
        self.steps = Space(STEP, "steps", nest.steps)
        self.kinds = {axis.name: of.rows for axis in of.tile.rows}
        self.kinds |= {axis.name: space for axis in nest.lanes} | {axis.name: self.steps for axis in nest.steps}
        self.pre: list[str] = [_note(stage) for stage in nest.stages]  # for the rows
        self.begin: list[str] = []  # before the inner loop
        self.body: list[str] = []
        self.end: list[str] = []  # after the inner loop
        self.known: dict[str, Value] = {}
        self.values: dict[int, Value] = {}
        self.inside: dict[int, Value] = {}  # of a checked index, whether it is in range
        if any(self._is_in_memory(load) for stage in nest.stages for load in stage.expression.nodes):
            self.pre.append("tl.debug_barrier()  # other threads may have written what is read")
        for stage in nest.stages:
            for node in stage.expression.nodes:
                self.values[id(node)] = self._value(node)
            self._result(stage)
        self.lines = self._looped()

    def _is_in_memory(self, node: Expression) -> bool:
        source = self.of.made.get(node["buffer"]) if node.op == "load" else None
        return source is not None and not self.of.tile.is_point(source)

    def _looped(self) -> list[str]:
        """The loops of a nest; lanes or steps are the inner one."""
        loops = [self._along_lanes()] if self.nest.lanes else []
        if self.nest.steps:
            head = ["at = fl.place(step, NARROW)", *self.steps.decoded("at", self.of.numbers)]
            line = f"for step in range(0, {self.steps.extent(self.of.numbers)}):"
            loops.insert(1 if self.nest.is_steps_inside else 0, (line, head))
        body = [*self.begin, *self.body, *self.end]
        if loops:
            line, head = loops.pop()
            body = [*self.begin, line, *indented([*head, *self.body]), *self.end]
        for line, head in loops:
            body = [line, *indented([*head, *body])]
        return [*self.pre, *body]

    def _along_lanes(self) -> tuple[str, list[str]]:
        """The loop over blocks of lanes, and what stands at its beginning."""
        count, position = self.space.extent(self.of.numbers), self.space.name
        is_shared = self.of.tile.shares == "lanes"
        # A loop that Triton knows to be of one block is none: what several nests compute is then computed once.
        end = f"COLS if WHOLE else fl.place({count}, NARROW)"
        bounds = f"part * COLS, {count}, parts * COLS" if is_shared else f"0, {end}, COLS"
        spread = self.of.spread("COLS", "[None, :]" if self.of.tile.rows else "")
        head = [f"{position} = start + {spread}", f"lane_mask = {position} < {count}"]
        head += ["mask = row_mask & lane_mask"] if self.of.tile.rows else []
        return f"for start in range({bounds}):", [*head, *self.space.decoded(position, self.of.numbers)]

    # Values

    def _assign(self, text: str, along: frozenset[str]) -> Value:
        known, lines = (self.of.known, self.pre) if along <= {ROW} else (self.known, self.body)
        if text not in known:
            known[text] = Value(self.of.name(), along)
            lines.append(f"{known[text].text} = {text}")
        return known[text]

    def _value(self, node: Expression) -> Value:
        if node.op == "load":
            return self._load(node)
        if node.op == "constant":
            return Value(literal(node["value"], node.dtype), frozenset())
        if node.op == "parameter":
            self.of.parameters[node["name"]] = None
            return self._assign(f"tl.cast({identifier(node['name'])}, {COMPUTED[node.dtype]})", frozenset())
        if node.op == "size":
            size = self.of.numbers.size(node["value"])
            return self._assign(f"tl.cast({size}, {COMPUTED[node.dtype]})", frozenset())
        if node.op == "index":
            position = self._position(node["value"])
            return self._assign(f"{position.text}.to(tl.int64)", position.along)
        arguments = [self.values[id(argument)] for argument in node.arguments]
        if node.op == "cast" and COMPUTED[node.arguments[0].dtype] == COMPUTED[node.dtype]:
            return arguments[0]
        if node.op in ("cumulated", "beside"):
            return arguments[0]
        if node.op == "checked":
            return self._checked(node, arguments[0])
        return self._assign(operation(node, [value.text for value in arguments]), _union(arguments))

    def _checked(self, node: Expression, index: Value) -> Value:
        text = typed(index.text, node.dtype)
        inside = self._assign(self._is_inside(text, node["size"]), index.along)
        self.inside[id(node)] = inside
        return self._assign(f"tl.where({inside.text}, {text}, 0)", index.along)

    def _is_inside(self, index: str, size: Size) -> str:
        return f"fl.is_inside({index}, {self.of.numbers.size(size)})"

    def _axis(self, name: str) -> Value:
        """The place along an axis."""
        space = self.kinds.get(name)
        if space is None:
            return Value("program" if name == PROGRAM else name, frozenset())
        return Value(name, frozenset({space.kind}))

    def _position(self, index: Index) -> Value:
        """A position along axes."""
        parts, axes = [], [self._axis(name) for name, _ in index.terms]
        for axis, (name, factor) in zip(axes, index.terms):
            if name in self.kinds:
                self.kinds[name].keeps_axes = True
            number = self.of.numbers.size(factor) if isinstance(factor, Size) else str(factor)
            parts.append(axis.text if number == "1" else f"{axis.text} * {number}")
        if index.offset != ZERO or not parts:
            parts.append(self.of.numbers.size(index.offset))
        position = self._assign(f"fl.place({' + '.join(parts)}, NARROW)", _union(axes))
        if index.divisor == 1:
            return position
        x, by = position.text, index.divisor
        return self._assign(f"tl.where({x} % {by} == 0, {x} // {by}, -1)", position.along)

    def _pointer(self, name: str, indices: Sequence[Index | Expression], is_store: bool = False) -> Value:
        """Where an element is; a store, of which a buffer has one, may stand outside of the loop over the lanes."""
        buffer, numbers = identifier(name), self.of.numbers
        self.of.operands[name] = None
        start, by_axis = _strides(name, indices)
        is_of_parts = not by_axis.keys().isdisjoint(PARTS)  # how many there are must not ask for another kernel
        moves = {
            axis: numbers.name(tuple(terms), f"{buffer}_{axis}", is_of_parts and axis not in PARTS)
            for axis, terms in by_axis.items()
        }
        for space in {id(s): s for s in map(self.kinds.get, moves) if s is not None}.values():
            space.views.append(tuple(moves.get(axis.name) for axis in space.axes))
        self.of.moves[tuple(moves.items())] = None
        parts = [buffer, *([numbers.name(tuple(start), f"{buffer}_start")] if start else [])]
        offsets = [
            Value(text, along) if is_store or not along else self._assign(text, along)
            for along, text in self._offsets(moves).items()
        ]
        parts += [offset.text for offset in offsets]
        places = []
        for dimension, index in enumerate(indices):
            if not _is_linear(index):
                number = numbers.name(((ONE, (name, dimension)),), f"{buffer}_stride{dimension}")
                place = self._position(index) if isinstance(index, Index) else self.values[id(index)]
                places.append((place, number))
        parts += [f"{place.text} * {number}" for place, number in places]
        return Value(" + ".join(parts), _union([*offsets, *(place for place, _ in places)]))

    def _offsets(self, moves: Mapping[str, str]) -> dict[frozenset[str], str]:
        """How far a pointer is moved, by rows and by lanes apart, as loads of a buffer have these in common."""
        terms: dict[frozenset[str], list[str]] = {}
        for axis, number in moves.items():
            place = self._axis(axis)
            terms.setdefault(place.along, []).append(f"{place.text} * {number}")
        return {along: f"({' + '.join(each)})" for along, each in terms.items()}

    def _mask(self, along: frozenset[str]) -> list[str]:
        rows, lanes = ROW in along and bool(self.of.tile.rows), LANE in along
        return ["mask" if rows and lanes else "row_mask"] if rows else ["lane_mask"] if lanes else []

    def _load(self, node: Expression) -> Value:
        name = node["buffer"]
        source = self.of.made.get(name)
        if source is not None and self.of.tile.is_point(source):
            return self.of.locals[name]
        pointer, along = self._pointer(name, node["index"])
        conditions = [*self._mask(along), *(self._guards(node) if node["guarded"] else [])]
        masked = f", mask={' & '.join(conditions)}, other=0" if conditions else ""
        return self._assign(f"tl.load({pointer}{masked}).to({COMPUTED[node.dtype]})", along)

    def _guards(self, node: Expression) -> list[str]:
        """For each dimension whose index may lie outside, whether it lies inside."""
        every = (*self.of.tile.rows, *self.of.tile.batch, *self.nest.lanes, *self.nest.steps)
        extents = {axis.name: axis.extent for axis in every}
        result = []
        for index, size in zip(node["index"], self.of.sizes[node["buffer"]]):
            if isinstance(index, Expression):
                result.append(self._is_inside(typed(self.values[id(index)].text, index.dtype), size))
            elif extents.get(plain_axis(index) or "") != size:
                result.append(self._is_inside(self._position(index).text, size))
        return result

    # Results

    def _result(self, stage: Stage) -> None:
        value, *others = [self._poisoned(stage, value) for value in stage.values]
        if stage.combine is not None:
            self._reduce(stage, value)
        elif stage.cumulated is not None:
            self._cumulate(stage, value)
        elif self.of.tile.is_point(stage):
            name = identifier(stage.buffer.name)
            self.body.append(f"{name}_value = {value}")
            self._finish_point(stage, name)
        else:
            self.body += [self._store(stage, text, part) for part, text in enumerate([value, *others])]

    def _poisoned(self, stage: Stage, expression: Expression) -> str:
        """A value of a stage; NaN where an index that goes into it is out of range, as a GPU cannot raise in time."""
        value, dtype = self.values[id(expression)], expression.dtype
        text = typed(value.text, dtype)
        checks = [self.inside[id(node)] for node in stage.expression.nodes if node.op == "checked"]
        if not checks or not dtype.is_floating_point:
            return text
        inside = " & ".join(check.text for check in checks)
        return self._assign(f'tl.where({inside}, {text}, float("nan"))', _union([value, *checks])).text

    def _finish_point(self, stage: Stage, name: str) -> None:
        """A value for each row, which later nests read."""
        self.of.locals[stage.buffer.name] = Value(f"{name}_value", frozenset({ROW} if self.of.tile.rows else ()))
        if stage.buffer.name in self.of.stored:
            # Last: a store between two nests would have the second load again what the first has loaded.
            self.of.at_row_end.append(self._store(stage, f"{name}_value"))

    def _store(self, stage: Stage, value: str, part: int = 0) -> str:
        indices = [Index() if axis.extent == ONE else Index(((axis.name, 1),)) for axis in stage.axes]
        if len(stage.values) > 1:
            indices.append(Index((), Size("const", part)))
        pointer, along = self._pointer(stage.buffer.name, indices, is_store=True)
        masked = "".join(f", mask={mask}" for mask in self._mask(along))
        return f"tl.store({pointer}, {value}.to({identifier(stage.buffer.name)}.dtype.element_ty){masked})"

    def _reduce(self, stage: Stage, value: str) -> None:
        name = identifier(stage.buffer.name)
        how = REDUCTIONS[stage.combine or ""]
        adds_up = bool(self.of.tile.shares) and not set(self.of.tile.rows) <= set(stage.axes)
        place = self._place(stage) if how.is_place else ""
        start, update = how.lines(name, stage, value, self._full_mask(), self._shape(), place)
        (self.of.at_start if adds_up else self.begin).extend(start)
        self.body += update
        if self.nest.is_steps_inside:
            self.end.append(self._store(stage, f"{name}_place" if how.is_place else f"{name}_all"))
            return
        end = self.of.at_end if adds_up else self.end
        axis = "None" if adds_up or not self.of.tile.rows else "1"
        end.append(f"{name}_value = {how.joined(name, stage, axis, axis == '1')}")
        if adds_up or not self.of.tile.is_point(stage):
            end.append(self._store(stage, f"{name}_value"))
        else:
            self._finish_point(stage, name)

    def _cumulate(self, stage: Stage, value: str) -> None:
        """Stores the sums up to each point of an axis: of the lanes, or for each lane of the steps."""
        name, dtype = identifier(stage.buffer.name), stage.buffer.dtype
        kind = "tl.float64" if dtype.is_floating_point else COMPUTED[dtype]
        x, every = f"{name}_x", f"{name}_all"
        mask = self._full_mask()
        self.body.append(f"{x} = {f'tl.where({mask}, {value}, 0)' if mask else value}.to({kind})")
        if self.kinds[stage.cumulated or ""] is self.steps:
            self.begin.append(f"{every} = tl.full({self._shape()}, 0, {kind})")
            self.body += [f"{every} += {x}", self._store(stage, every)]
            return
        axis, shape = ("1", "(ROWS, 1)") if self.of.tile.rows else ("0", "(1,)")
        self.begin.append(f"{every} = tl.full({shape}, 0, {kind})")
        self.body.append(self._store(stage, f"({every} + tl.cumsum({x}, {axis}))"))
        self.body.append(f"{every} += tl.sum({x}, {axis}, keep_dims=True)")

    def _place(self, stage: Stage) -> str:
        """Where along the flattened reduced axes a point is."""
        return self._position(place_along(reduced(stage))).text

    def _full_mask(self) -> str:
        """What is inside of the tile, of the shape that is accumulated."""
        return "".join(self._mask(frozenset({ROW, LANE} if self.nest.lanes else {ROW})))

    def _shape(self) -> str:
        if not self.nest.lanes:
            return self.of.row_shape if self.of.tile.rows else "()"
        return "(ROWS, COLS)" if self.of.tile.rows else "(COLS,)"


def _union(values: Iterable[Value]) -> frozenset[str]:
    """What anything that is computed from values differs along."""
    return frozenset().union(*(value.along for value in values))


def _is_linear(index: Index | Expression) -> TypeGuard[Index]:
    """Whether an index moves evenly along axes."""
    return isinstance(index, Index) and index.divisor == 1


def _strides(name: str, indices: Sequence[Index | Expression]) -> tuple[list[Term], dict[str, list[Term]]]:
    """Where a load of a buffer starts, and how it moves along each axis; other indices come on top."""
    start: list[Term] = []
    by_axis: dict[str, list[Term]] = {}
    for dimension, index in enumerate(indices):
        if _is_linear(index):
            if index.offset != ZERO:
                start.append((index.offset, (name, dimension)))
            for axis, factor in index.terms:
                size = factor if isinstance(factor, Size) else Size("const", factor)
                by_axis.setdefault(axis, []).append((size, (name, dimension)))
    return start, by_axis


def _note(stage: Stage) -> str:
    over = f" = {stage.combine} over {', '.join(axis.name for axis in reduced(stage))}" if stage.combine else ""
    return f"# {identifier(stage.buffer.name)}{over}"
