"""What a fused loss runs, what that moves through memory, and its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .built import Built
from .cpp import text_of as cpp_text
from .ir import Expression, Extern, Program, Size, Stage
from .programs import Programs, Refusal
from .schedule import Kernel
from .served import Served
from .sizes import Shapes, evaluate
from .traffic import Traffic, bytes_of, computes, least, traffic
from .triton.source import text_of as triton_text

TEXTS: dict[str, Callable[[Program, Shapes], str]] = {"cpp": cpp_text, "triton": triton_text}


@dataclass(frozen=True)
class Work:
    """Forward or backward of a call: what each of its steps moves, and the least that could do, in bytes."""

    steps: tuple[Traffic, ...]
    least: int

    @property
    def moved(self) -> int:
        return sum(step.moved for step in self.steps)


@dataclass(frozen=True)
class Explanation:
    """What serves a call: prints as text."""

    reason: str | None  # why the plain loss runs; None where kernels do
    externs: tuple[str, ...]  # operators left to torch; empty where the loss is fused wholly
    text: str
    language: str | None = None  # of the kernels
    device: str | None = None
    forward: Work | None = None
    backward: Work | None = None  # None where nothing requires a gradient
    saved: Mapping[str, int] = field(default_factory=dict)  # bytes kept between them, besides the inputs

    def __str__(self) -> str:
        return self.text


def explained(programs: Programs) -> Explanation:
    """
    Raises:
        RuntimeError: before the first call.
    """
    last = _last(programs)
    if isinstance(last, Refusal):
        return Explanation(last.reason, (), f"runs as plain torch: {last.reason}")
    shapes, (first, *rest) = _shapes(programs, last), _ran(programs, last)
    language, device = first.compiled.language, str(last.device)
    kept = first.program.outputs[len(last.shapes) :]
    saved = {name: bytes_of(first.program.buffers[name], shapes) for name in kept}
    makes_gradients = first.program is last.at_once
    forward, lines = _work(first.program, () if makes_gradients else kept, shapes)
    text = [f"{language} on {device}", f"forward: {_moves(forward)}", *lines]
    backward = None
    if makes_gradients:
        backward = Work((), 0)
        text += [f"saved: gradients {_buffers(saved)}", "backward: hands them on, multiplied where its own is not 1"]
    for built in rest:
        backward, lines = _work(built.program, kept, shapes)
        text += [f"saved, besides the inputs: {_buffers(saved)}", f"backward: {_moves(backward)}", *lines]
    steps = [*forward.steps, *(backward.steps if backward is not None else ())]
    externs = tuple(dict.fromkeys(step.operator for step in steps if step.operator is not None and step.moved))
    return Explanation(None, externs, "\n".join(text), language, device, forward, backward, saved)


def _last(programs: Programs) -> Served | Refusal:
    if programs.last is None:
        raise RuntimeError("nothing has run yet: call the loss first, or pass arguments to explain()")
    return programs.last


def source_of(programs: Programs, language: str) -> str:
    """
    Raises:
        RuntimeError: before the first call, where the plain loss runs, and where the language lacks an operation.
        ValueError: for a language that is not generated.
    """
    last = _last(programs)
    if language not in TEXTS:
        raise ValueError(f"source is generated in {' and '.join(TEXTS)}, got {language!r}")
    if isinstance(last, Refusal):
        raise RuntimeError(f"there is no source, as the plain loss runs: {last.reason}")
    shapes = _shapes(programs, last)
    return "\n".join(TEXTS[language](built.program, shapes) for built in _ran(programs, last))


def _ran(programs: Programs, last: Served) -> list[Built]:
    """What the last call ran, and its backward would."""
    count = len(last.names)
    return last.built(any(programs.last_key[-2 * count : -count]))


def _shapes(programs: Programs, last: Served) -> Shapes:
    """Of the inputs of the last call."""
    given = [shape for _, shape in programs.last_key[-len(last.names) :]]
    names = [buffer.name for buffer in _ran(programs, last)[0].program.inputs]
    shapes = dict(zip(names, given))
    drawn = [[evaluate(size, shapes, {}) for size in shape] for shape in last.drawn_shapes]
    return dict(zip(names, [*given, *drawn, *(constant.shape for constant in last.constants)]))


def _work(program: Program, saved: Sequence[str], shapes: Shapes) -> tuple[Work, list[str]]:
    """What a program moves, and its steps in words."""
    lines, moved = [], []
    for step, moves in traffic(program, shapes):
        moved.append(moves)
        if isinstance(step, Kernel):
            lines.append(f"  pass: reads {_buffers(moves.reads)}; writes {_buffers(moves.writes)}")
            lines += [f"    {_stage(stage)}" for stage in step.stages]
        else:
            lines.append(f"  {_operator(step, moves)}")
    return Work(tuple(moved), least(program, saved, shapes)), lines


def _moves(work: Work) -> str:
    return f"moves {in_words(work.moved)}; inputs and outputs once are {in_words(work.least)}"


def _buffers(by_name: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {in_words(count)}" for name, count in by_name.items()) or "nothing"


def in_words(count: int) -> str:
    """
    Example:
        >>> in_words(100), in_words(4096), in_words(3 << 19)
        ('100 B', '4 KiB', '1.5 MiB')
    """
    power = min(max(count, 1).bit_length() - 1, 39) // 10
    return f"{count / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _operator(step: Extern, moves: Traffic) -> str:
    names = ", ".join(buffer.name for buffer in step.buffers)
    if not computes(step):
        return f"{names} = {step.target}: the same memory in another shape"
    if not names:
        return f"{step.target}, by torch: raises where {_buffers(moves.reads)} says that something is wrong"
    moved = f"reads {_buffers(moves.reads)}; writes {_buffers(moves.writes)}"
    return f"{names} = {step.target}, by torch, as it has no form as loops over elements: {moved}"


def _stage(stage: Stage) -> str:
    axes = ", ".join(f"{axis.name} < {_size(axis.extent)}" for axis in stage.axes) or "one value"
    over = ", ".join(f"{axis.name} < {_size(axis.extent)}" for axis in stage.reduced)
    kind = f"{stage.combine} over {over} of" if stage.combine else "each"
    kind = f"sum up to each {stage.cumulated} of" if stage.cumulated else kind
    return f"{stage.buffer.name}[{axes}] = {kind} {_reads(stage.expression)}"


def _reads(expression: Expression) -> str:
    """The buffers that an expression reads and how many operations it has."""
    every = expression.nodes
    buffers = {node["buffer"] for node in every if node.op == "load"}
    operations = sum(bool(node.arguments) for node in every)
    return f"{operations} operations on {', '.join(sorted(buffers)) or 'numbers'}"


def _size(size: Size) -> str:
    if size.op == "const":
        return str(size.value)
    if size.op == "size":
        return f"{size.value[0]}.shape[{size.value[1]}]"
    sign = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//"}[size.op]
    return f"({f' {sign} '.join(map(_size, size.arguments))})"
