"""What a fused loss runs, in words and as source."""

from __future__ import annotations

from dataclasses import dataclass

from .ir import Expression, Extern, Size, Stage
from .programs import Programs, Refusal
from .schedule import nodes
from .served import Served


@dataclass(frozen=True)
class Explanation:
    """What serves a call: prints as text."""

    reason: str | None  # why the plain loss runs; None where kernels do
    externs: tuple[str, ...]  # operators left to torch; empty where the loss is fused wholly
    text: str

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
    lines, externs = [], []
    for title, program in (("forward", last.lowered.forward), ("backward", last.lowered.backward)):
        if program is not None:
            lines += [f"{title}:", *(f"  {_step(step)}" for step in program.steps)]
            externs += [str(step.target) for step in program.steps if isinstance(step, Extern) and _computes(step)]
    lines.append(f"saved between them, besides the inputs: {', '.join(last.lowered.saved) or 'nothing'}")
    return Explanation(None, tuple(dict.fromkeys(externs)), "\n".join(lines))


def _computes(step: Extern) -> bool:
    return "reshape" not in str(step.target)  # which only looks at memory in another shape


def _last(programs: Programs) -> Served | Refusal:
    if programs.last is None:
        raise RuntimeError("nothing has run yet: call the loss first, or pass arguments to explain()")
    return programs.last


def source_of(programs: Programs, language: str) -> str:
    """
    Raises:
        RuntimeError: before the first call, and where the plain loss runs.
        ValueError: for a language that is not generated.
    """
    last = _last(programs)
    if language != "cpp":
        raise ValueError(f"source is generated in cpp, got {language!r}")
    if isinstance(last, Refusal):
        raise RuntimeError(f"there is no source, as the plain loss runs: {last.reason}")
    parts = [last.forward.source, *([last.backward.source] if last.backward is not None else [])]
    return "\n".join(parts)


def _step(step: Stage | Extern) -> str:
    if isinstance(step, Extern):
        names = ", ".join(buffer.name for buffer in step.buffers)
        return f"{names} = {step.target}, by torch: it has no form as loops over elements"
    axes = ", ".join(f"{axis.name} < {_size(axis.extent)}" for axis in step.axes) or "one value"
    over = ", ".join(f"{axis.name} < {_size(axis.extent)}" for axis in step.reduced)
    kind = f"{step.combine} over {over} of" if step.combine else "each"
    return f"{step.buffer.name}[{axes}] = {kind} {_reads(step.expression)}"


def _reads(expression: Expression) -> str:
    """The buffers that an expression reads and how many operations it has."""
    every = list(nodes(expression))
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
