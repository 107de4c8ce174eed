"""C++ of loads: blocks of lanes, single elements, and elements whose place is computed or may lie outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .expressions import COMPUTED, identifier, size_of
from .ir import Expression, Index, names_in, plain_axis
from .memory import factor_of, held, place_among, product, total

if TYPE_CHECKING:
    from .nest import Nest

Outside = Sequence[tuple[Index | Expression, str, str]]  # indices that may lie outside, each with size and stride


def load(nest: Nest, node: Expression) -> str:
    """The value of a load."""
    name, kind = node["buffer"], COMPUTED[node.dtype]
    if (source := nest.of.made.get(name)) is not None and nest.of.kernel.is_point(source):
        local = f"local_{identifier(name)}"
        return local if nest.of.is_rows else _lanes_of(nest, kind, local)
    base: list[tuple[str, str]] = []
    lanes: dict[str, list[tuple[str, str]]] = {}
    followed: list[tuple[str, str]] = []
    divided: list[tuple[Index, str]] = []
    for dimension, index in enumerate(node["index"]):
        stride = nest.memory.stride(name, dimension)
        if isinstance(index, Expression):
            followed.append((nest.values[id(index)], stride))
            continue
        if index.divisor != 1:
            divided.append((index, stride))
            continue
        base.append((size_of(index.offset), stride))
        for axis, factor in index.terms:
            term = (factor_of(factor), stride)
            if axis in nest.lane_names:
                lanes.setdefault(axis, []).append(term)
            else:
                base.append((axis, total([term])))
    by_axis = {axis: total(terms) for axis, terms in lanes.items()}
    data, origin = f"a.data_{identifier(name)}", total(base)
    outside = _outside(nest, node) if node["guarded"] else []
    varies = bool(by_axis) or any(nest.split(index)[1] for index, _ in divided)
    if followed or (outside and not varies):
        followed += [(nest.assign("int64_t", *nest.position(index)), stride) for index, stride in divided]
        return _follow(nest, kind, data, origin, by_axis, followed, outside)
    if not varies:
        return nest.assign(kind, f"widen({data}[{origin}])", False)
    return _block(nest, kind, node, origin, by_axis, outside)


def _outside(nest: Nest, node: Expression) -> Outside:
    extents = {axis.name: axis.extent for axis in nest.of.kernel.outer + nest.loop.inner}
    name = node["buffer"]
    return [
        (index, size_of(size), nest.memory.stride(name, dimension))
        for dimension, (index, size) in enumerate(zip(node["index"], nest.memory.buffers[name].sizes))
        if isinstance(index, Expression) or extents.get(plain_axis(index) or "") != size
    ]


def _lanes_of(nest: Nest, kind: str, block: str) -> str:
    """The value that each lane has of a block."""
    if block not in nest.viewed:
        nest.viewed[block] = nest.of.name("v")
        nest.body.load(kind, nest.viewed[block], block)
    return nest.viewed[block]


def _block(nest: Nest, kind: str, node: Expression, origin: str, by_axis: Mapping[str, str], outside: Outside) -> str:
    """A block of lanes, once for each place; where some lie outside, those are 0."""
    data = f"a.data_{identifier(node['buffer'])}"
    if not outside:
        view = nest.space.view("View", data, by_axis, nest.memory.last(node["buffer"]))
        place = f"{nest.seek(view)}, n, {origin}"
        steps = [axis for axis in nest.outside if axis.name in names_in(node["index"])]
        if steps and nest.of.takes_again(node):
            kept = nest.of.kept(kind, (view, origin), product([axis.extent for axis in steps]))
            return _lanes_of(nest, kind, _taken(nest, kind, kept, f"{place_among(steps)}, {view}, {place}"))
        return _lanes_of(nest, kind, _taken(nest, kind, view, place))
    guards = [(*nest.split(index), size, _division(index, stride)) for index, size, stride in outside]  # type: ignore[arg-type]
    along = ", ".join(nest.space.strides(lanes) for _, lanes, _, _ in guards)
    ranges = ", ".join(f"{{{base}, {size}{division}}}" for base, _, size, division in guards)
    view = nest.space.view("Guarded", data, by_axis, f"{{{along}}}")
    return _lanes_of(nest, kind, _taken(nest, kind, view, f"begin, n, {origin}, {{{ranges}}}"))


def _division(index: Index, stride: str) -> str:
    """What a range has of an index that is divided: by what, and how far in memory one place is from the next."""
    return "" if index.divisor == 1 else f", {index.divisor}, {stride}"


def _taken(nest: Nest, kind: str, view: str, where: str) -> str:
    """The block that a view gives."""
    key = f"{view}.block({where}"
    if key not in nest.viewed:
        nest.viewed[key] = block = nest.of.name("x")
        nest.blocks.append(f"const {held(kind)}* {block} = {key}, {nest.of.array(kind)});")
    return nest.viewed[key]


def _follow(
    nest: Nest,
    kind: str,
    data: str,
    origin: str,
    by_axis: Mapping[str, str],
    followed: Sequence[tuple[str, str]],
    outside: Outside,
) -> str:
    """An element whose place is computed, or that is at one place for all lanes and may lie outside."""
    varies = bool(by_axis) or nest.body.vary(index for index, _ in followed)
    place = total([(origin, "1"), *followed])
    if by_axis:
        place = f"{nest.offsets(by_axis, origin)}[i] + {total(followed)}"
    conditions = []
    for index, size, _ in outside:
        if isinstance(index, Expression):
            at = nest.values[id(index)]
        else:
            text, lane = nest.position(index)
            at = nest.assign("int64_t", text, lane)
            varies |= lane
        conditions.append(f"lies_in({at}, {size})")
    if not varies:
        text = f"widen({data}[{place}])"
        return nest.assign(kind, f"{' && '.join(conditions)} ? {text} : {kind}(0)" if conditions else text, False)
    key = f"{data}[{place}] {conditions}"
    if key not in nest.viewed:
        inside = nest.assign("bool", " && ".join(conditions), True) if conditions else ""
        where = nest.assign("int64_t", f"{inside} ? {place} : 0" if inside else place, True)
        element = nest.of.name("v")
        # A loop of its own, so that the others are vectorised.
        nest.body.call(kind, element, "blocks::gather", [(data, ""), (where, "int64_t")])
        nest.viewed[key] = nest.assign(kind, f"{inside} ? {element} : {kind}(0)", True) if inside else element
    return nest.viewed[key]
