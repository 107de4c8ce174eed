"""One declarative spec per loss: the tests, the benches and the documentation read nothing else."""

from . import divergence, linear, pointwise, softmax
from ._spec import Bench, ErrorSample, LossSpec, Sample, convert

SPECS: tuple[LossSpec, ...] = (*softmax.SPECS, *linear.SPECS, *divergence.SPECS, *pointwise.SPECS)

__all__ = ["SPECS", "Bench", "ErrorSample", "LossSpec", "Sample", "convert"]
