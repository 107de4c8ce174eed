"""Runs a program of the fusion package in plain torch, element by element of its definition: the oracle of lowering."""

import operator
from dataclasses import replace

import torch

from fused_losses.fusion.ir import Expression, Extern, Index, Read, Size

FUNCTIONS = {
    "neg abs sign exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal sin cos tan sinh cosh tanh asin acos atan",
    "asinh acosh atanh sigmoid erf erfc erfinv lgamma digamma floor ceil round trunc isnan isinf logical_not",
    "bitwise_not add sub mul div pow maximum minimum fmax fmin fmod remainder floor_divide atan2 hypot copysign",
    "lt le gt ge eq ne logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor where",
}
TABLE = {name: getattr(torch, name) for names in FUNCTIONS for name in names.split()}
TABLE["exp_nonpositive"] = torch.exp
SIZES = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "max": max,
    "min": min,
}


class Evaluator:
    """One run of a program: buffers by name, the stage at hand as a grid of its axes."""

    def __init__(self, program, inputs, parameters):
        self.program = program
        self.buffers = {buffer.name: tensor for buffer, tensor in zip(program.inputs, inputs)}
        self.parameters = dict(zip(program.parameters, parameters))
        for buffer, tensor in zip(program.inputs, inputs):
            assert tensor.dtype is buffer.dtype, (buffer, tensor.dtype)
            assert tuple(tensor.shape) == tuple(self.size(s) for s in buffer.sizes), (buffer, tensor.shape)

    def run(self):
        for step in self.program.steps:
            if isinstance(step, Extern):
                self.call(step)
            elif step.expression.op == "beside":
                parts = [self.stage(replace(step, expression=value)) for value in step.values]
                self.buffers[step.buffer.name] = torch.stack(parts, -1)
            else:
                self.buffers[step.buffer.name] = self.stage(step)
        return [self.buffers[name] for name in self.program.outputs]

    def size(self, size):
        if isinstance(size, int):
            return size
        if size.op == "const":
            return size.value
        if size.op == "size":
            name, dimension = size.value
            return self.buffers[name].shape[dimension]
        return SIZES[size.op](*(self.size(argument) for argument in size.arguments))

    def call(self, extern):
        def real(argument):
            if isinstance(argument, Read):
                return self.buffers[argument.name]
            if isinstance(argument, Size):
                return self.size(argument)
            if isinstance(argument, (list, tuple)):
                return type(argument)(map(real, argument))
            return argument

        results = extern.target(*real(extern.arguments), **{k: real(v) for k, v in extern.keywords.items()})
        results = results if isinstance(results, (list, tuple)) else [results]
        for buffer, result in zip(extern.buffers, results):
            if result is None:  # not asked for
                continue
            assert tuple(result.shape) == tuple(self.size(s) for s in buffer.sizes), (extern.target, buffer)
            assert result.dtype is buffer.dtype
            self.buffers[buffer.name] = result

    def stage(self, stage):
        axes = (*stage.axes, *stage.reduced)
        assert len({axis.name for axis in axes}) == len(axes)
        shape = [self.size(axis.extent) for axis in axes]
        self.grid = {
            axis.name: torch.arange(n).view([-1 if i == k else 1 for i in range(len(axes))])
            for k, (axis, n) in enumerate(zip(axes, shape))
        }
        self.memo = {}
        value = self.expression(stage.expression)
        value = value.expand(shape) if isinstance(value, torch.Tensor) else torch.tensor(value).expand(shape)
        wide = torch.float32 if value.dtype in (torch.bfloat16, torch.float16) else value.dtype
        dims = list(range(len(stage.axes), len(axes)))
        assert bool(dims) == (stage.combine is not None)
        result = value.to(wide) if stage.combine is None else self.reduce(value.to(wide), dims, stage.combine)
        assert tuple(result.shape) == tuple(shape[: len(stage.axes)])
        return result.to(stage.buffer.dtype).contiguous()

    def reduce(self, value, dims, combine):
        if combine == "sum":
            return value.sum(dims)
        if combine in ("max", "min"):
            return (value.amax if combine == "max" else value.amin)(dims)
        flat = value.flatten(dims[0])
        if combine == "prod":
            return flat.prod(-1)
        return getattr(flat, combine)(-1)

    def position(self, index, size, guarded):
        """A tensor of positions, and where they are inside; outside they must be guarded."""
        position = self.affine(index) if isinstance(index, Index) else self.expression(index)
        inside = (position >= 0) & (position < size)
        assert guarded or bool(inside.all()), "an unguarded load lies outside"
        return position.clamp(0, max(size - 1, 0)), inside

    def expression(self, node: Expression):
        if node not in self.memo:
            self.memo[node] = self.compute(node)
        return self.memo[node]

    def compute(self, node):
        # Low-precision floats are computed in fp32.
        dtype = torch.float32 if node.dtype in (torch.bfloat16, torch.float16) else node.dtype
        if node.op == "constant":
            return torch.tensor(node["value"], dtype=dtype)
        if node.op == "parameter":
            return torch.tensor(self.parameters[node["name"]], dtype=dtype)
        if node.op == "size":
            return torch.tensor(self.size(node["value"]), dtype=dtype)
        if node.op == "index":
            return self.affine(node["value"])
        if node.op == "load":
            return self.load(node).to(dtype)
        arguments = [self.expression(argument) for argument in node.arguments]
        if node.op == "cast":
            return arguments[0].to(dtype)
        if node.op == "rounded":
            return arguments[0].to(node.dtype).to(dtype)
        if node.op == "checked":
            size = self.size(node["size"])
            if not bool(((arguments[0] >= 0) & (arguments[0] < size)).all()):
                raise IndexError(f"an index is outside 0..{size - 1}")
            return arguments[0]
        if node.op == "cumulated":
            ((axis, _),) = node["index"][0].terms
            value, _ = torch.broadcast_tensors(arguments[0], self.grid[axis])
            return value.cumsum(list(self.grid).index(axis), dtype=dtype)
        if node.op == "placed":
            value, *places = arguments
            for index, place in zip(node["index"], places):
                value = torch.where(self.affine(index) == place, value, torch.zeros((), dtype=dtype))
            return value
        result = TABLE[node.op](*arguments)
        assert result.dtype is dtype, (node.op, result.dtype, node.dtype, [a.dtype for a in arguments])
        return result

    def affine(self, index):
        position = torch.tensor(self.size(index.offset))
        for axis, coefficient in index.terms:
            position = position + self.grid[axis] * self.size(coefficient)
        divides = position % index.divisor == 0
        return torch.where(divides, position // index.divisor, -1)

    def load(self, node):
        buffer = self.buffers[node["buffer"]]
        assert len(node["index"]) == buffer.ndim
        if buffer.ndim == 0:
            return buffer
        inside, positions = torch.tensor(True), []
        for index, size in zip(node["index"], buffer.shape):
            position, within = self.position(index, size, node["guarded"])
            positions.append(position)
            inside = inside & within
        if buffer.numel() == 0:
            return torch.zeros((), dtype=buffer.dtype)
        value = buffer[tuple(positions)]
        return torch.where(inside, value, torch.zeros((), dtype=buffer.dtype))


def evaluate(program, inputs, parameters=()):
    """The outputs of a program for given inputs."""
    return Evaluator(program, inputs, parameters).run()
