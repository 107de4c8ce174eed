"""What passes over memory have in common: where it takes long to compute, the first keeps it for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .ir import WIDE, Axis, Buffer, Expression, Extern, Index, Program, Stage, names_in
from .lowering import cost
from .schedule import Kernel, schedule

WRITE_AND_READ, READ = 64, 16  # operations that surely take longer than to keep an element, and than to read one


def scheduled(program: Program) -> list[Kernel | Extern]:
    """Kernels and externs, where the first that needs what is costly keeps it for the others."""
    kernels = schedule(program)
    while (found := _most_costly(program, kernels)) is not None:
        program = _kept(program, *found)
        kernels = schedule(program)
    return kernels


def _most_costly(program: Program, kernels: Sequence[Kernel | Extern]) -> tuple[Expression, tuple[Axis, ...]] | None:
    """The expression that is worth most, with its axes."""
    users = _users(program)
    costs = {node: cost(node) for node in _largest(users)}
    costly = [node for node in sorted(costs, key=lambda node: -costs[node]) if costs[node] > WRITE_AND_READ - READ]
    homes = _homes(kernels) if costly else {}
    for node in costly:
        axes = _axes_of(node, users[node][0])
        if node.dtype in WIDE or not all(_may_read(stage, node, axes) for stage in users[node]):
            continue
        by_home = {homes[stage.buffer.name]: stage for stage in users[node]}
        _, *again = by_home.values()
        if sum(costs[node] + READ * _reads_saved(node, stage, axes) for stage in again) > WRITE_AND_READ:
            return node, axes
    return None


def _may_read(stage: Stage, expression: Expression, axes: Sequence[Axis]) -> bool:
    """Whether a stage computes an expression once for each of its own points, as a part of what it is of."""
    is_all = expression is stage.expression and not stage.reduced
    return set(stage.mentioned) == set(axes) and not stage.places and not is_all


def _reads_saved(expression: Expression, stage: Stage, axes: Sequence[Axis]) -> int:
    """How many tensors a stage reads along all axes for nothing but an expression."""
    elsewhere: set[Expression] = set()
    waiting = [stage.expression]
    while waiting:
        node = waiting.pop()
        if node is not expression and node not in elsewhere:
            elsewhere.add(node)
            waiting += node.children
    read = {node["buffer"] for node in elsewhere if node.op == "load"}
    along = {axis.name for axis in axes}
    return len(
        {node["buffer"] for node in expression.nodes if node.op == "load" and along <= names_in(node["index"])} - read
    )


def _homes(kernels: Sequence[Kernel | Extern]) -> dict[str, tuple[int, int]]:
    """For each buffer the pass over memory that makes it: a kernel, or a loop of one whose rows are planes or more.

    Rows along one axis stay in cache from one loop to the next, and what they have in common is quick to compute again.
    """
    homes = {}
    for k, kernel in enumerate(kernels):
        for j, loop in enumerate([] if isinstance(kernel, Extern) else kernel.loops):
            homes.update((stage.buffer.name, (k, j if len(loop.inner) > 1 else 0)) for stage in loop.stages)
    return homes


def _users(program: Program) -> dict[Expression, list[Stage]]:
    """The stages that compute each expression."""
    users: dict[Expression, list[Stage]] = {}
    for stage in _stages(program.steps):
        for node in stage.expression.nodes:
            users.setdefault(node, []).append(stage)
    return users


def _largest(users: dict[Expression, list[Stage]]) -> list[Expression]:
    """What several stages compute, but for what they only compute as parts of the same."""
    parts = {child for node in users for child in node.children if len(users[node]) == len(users[child])}
    return [node for node, stages in users.items() if len(stages) > 1 and node.arguments and node not in parts]


def _stages(steps: Sequence[Stage | Extern]) -> list[Stage]:
    return [step for step in steps if isinstance(step, Stage)]


def _axes_of(expression: Expression, stage: Stage) -> tuple[Axis, ...]:
    """The axes of a stage that an expression runs along, in the order of their names' numbers."""
    along: set[str] = set()
    for node in expression.nodes:
        if node.op == "load":
            along |= names_in(node["index"])
        elif node.op == "index":
            along |= names_in((node["value"],))
    return tuple(sorted((axis for axis in stage.mentioned if axis.name in along), key=lambda axis: int(axis.name[1:])))


def _kept(program: Program, expression: Expression, axes: tuple[Axis, ...]) -> Program:
    """The program with a stage that stores an expression before what it is part of."""
    name = f"k{sum(isinstance(step, Stage) for step in program.steps)}"
    buffer = Buffer(name, tuple(axis.extent for axis in axes), expression.dtype)
    where = tuple(Index(((axis.name, 1),)) for axis in axes)
    load = Expression("load", expression.dtype, (), (("buffer", name), ("index", where), ("guarded", False)))
    done = {expression: load}
    steps: list[Stage | Extern] = []
    for step in program.steps:
        if isinstance(step, Stage) and expression in step.expression.nodes:
            if len(done) == 1:
                steps.append(Stage(buffer, axes, expression))
            step = replace(step, expression=_replaced(step.expression, done))
        steps.append(step)
    return replace(program, steps=tuple(steps))


def _replaced(root: Expression, done: dict[Expression, Expression]) -> Expression:
    """An expression in which some nodes stand for others; what was made anew already is the same again."""
    for node in root.nodes:
        if node not in done:
            done[node] = node.rebuilt(done)
    return done[root]
