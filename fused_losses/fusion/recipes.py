"""What the text of a program is made of, as bytes: far quicker to have than the text, and as good to know it by."""

from __future__ import annotations

import functools
import hashlib
import pickle
from pathlib import Path
from typing import Any

from .ir import Expression, Extern, Program, Stage


@functools.cache
def generator(folder: Path = Path(__file__).parent) -> bytes:
    """A digest of the code that makes texts: every module in this one's folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\0".encode() + content)
    return digest.digest()


def recipe(program: Program, form: Any) -> bytes:
    """Bytes that differ wherever programs, or the forms that their texts are in, do.

    Equal programs may have several, as it counts which of their parts are one object.
    """
    nodes: dict[Expression, int] = {}
    written: list[Any] = []

    def plain(value: Any) -> Any:
        """With numbers in the place of expressions, whose depth may be any."""
        if type(value) is tuple:
            return tuple(map(plain, value))
        return nodes[value] if isinstance(value, Expression) else value

    def number(expression: Expression) -> int:
        for node in expression.nodes:
            if node not in nodes:
                written.append((node.op, node.dtype, plain(node.arguments), plain(node.attributes)))
                nodes[node] = len(nodes)
        return nodes[expression]

    def plain_step(step: Stage | Extern) -> Any:
        if isinstance(step, Extern):
            return step.buffers, str(step.target), step.arguments, step.keywords
        return step.buffer, step.axes, number(step.expression), step.reduced, step.combine

    steps = [plain_step(step) for step in program.steps]
    # Numbers stand for expressions alone: that 0 is not -0.0, 1 not 1.0, and a NaN itself is seen to by pickle.
    everything = program.inputs, program.parameters, program.outputs, steps, written, form
    return generator() + pickle.dumps(everything, pickle.HIGHEST_PROTOCOL)
