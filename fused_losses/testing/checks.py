"""One function per check: each returns the comparisons it made, or None where it does not apply to a case."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .accuracy import FACTOR, Comparison, compare, fault, same_bits
from .case import Case, Loss, Upstream, gradients_of, leaves, run, upstream_like
from .layouts import LAYOUTS
from .memory import peak_bytes
from .transforms import TRANSFORMS

Comparisons = list[Comparison] | None
Run = Callable[[Loss, Case], Sequence[Tensor]]


def against_truth(case: Case, how: Run) -> list[Comparison]:
    """Runs the loss, its reference and the truth in one way and compares each result."""
    wide = case.in_double()
    results = how(case.loss, case), how(case.reference, case), how(case.truth, wide)
    return [compare(*three) for three in zip(*results)]


def _gradients(case: Case, needed: Sequence[int], upstream: Upstream = 1.0) -> list[Comparison]:
    return against_truth(case, lambda loss, c: run(loss, c.tensors, c.extras, needed, upstream))


def _same(what: str, first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Comparison]:
    return [
        Comparison(0.0, 0.0)
        if same_bits(a, b)
        else fault(f"{what} differs by up to {float((a.double() - b.double()).abs().max()):.3g}")
        for a, b in zip(first, second)
    ]


def value(case: Case) -> Comparisons:
    """The loss is as accurate as the reference."""
    with torch.no_grad():
        return _gradients(case, ())


def gradient(case: Case) -> Comparisons:
    """So are its gradients, for every input that the reference differentiates."""
    return _gradients(case, case.floating)


def upstream(case: Case) -> Comparisons:
    """Gradients follow any upstream gradient: small, large, zero, and one of its own for each element."""
    shape = case.reference(*case.tensors, **case.extras).shape
    each = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    factors: list[Upstream] = [0.25, 3.0, 0.0, each, -each]
    if torch.finfo(case.dtype).max > 65536.0:
        factors.append(65536.0)
    return [c for factor in factors for c in _gradients(case, case.floating, factor)]


def linearity(case: Case) -> Comparisons:
    """Four times the upstream gradient is four times the gradient, to the last bits."""
    ours, theirs = _nonlinearity(case.loss, case), _nonlinearity(case.reference, case)
    return [Comparison(a, FACTOR * b + granted) for (a, granted), (b, _) in zip(ours, theirs)]


def _nonlinearity(loss: Loss, case: Case) -> list[tuple[float, float]]:
    """How far each gradient is from four times another, and the rounding of the largest."""
    small, large = (run(loss, case.tensors, case.extras, case.floating, factor)[1:] for factor in (0.5, 2.0))
    results = []
    for once, scaled in zip(small, large):
        expected = once.double() * 4.0
        error = (scaled.double() - expected).nan_to_num(0.0, 0.0, 0.0).abs()
        scale = expected.nan_to_num(0.0, 0.0, 0.0).abs()
        largest = [float(t.max()) if t.numel() else 0.0 for t in (error, scale)]
        results.append((largest[0], largest[1] * torch.finfo(case.dtype).eps))
    return results


def subsets(case: Case) -> Comparisons:
    """Every subset of the inputs may require grad."""
    if len(case.floating) < 2:
        return None
    choices = [s for n in range(1, len(case.floating)) for s in combinations(case.floating, n)]
    return [comparison for chosen in choices for comparison in _gradients(case, chosen)]


def repeated_backward(case: Case) -> Comparisons:
    """A second backward through a retained graph gives the same bits, also after one with another upstream."""
    arguments = leaves(case.tensors, case.floating)
    loss = case.loss(*arguments, **case.extras)
    wanted = [arguments[i] for i in case.floating]
    first, _, again = (
        gradients_of(loss, wanted, upstream_like(loss, factor), retain_graph=True) for factor in (3.0, 0.5, 3.0)
    )
    return _same("a second backward", again, first)


def deterministic(case: Case) -> Comparisons:
    """Two runs give the same bits, and so do one thread and two, unless the reference has operators that do not."""
    same_threads = _same("another run", *(_run_on(case.loss, case, torch.get_num_threads()) for _ in range(2)))
    with FlopCounterMode(display=False) as products, torch.no_grad():
        case.reference(*case.tensors, **case.extras)
    if products.get_total_flops() > 0 or not all(c.ok for c in _on_two_threads(case.reference, case)):
        return same_threads
    return same_threads + _on_two_threads(case.loss, case)


def _on_two_threads(loss: Loss, case: Case) -> list[Comparison]:
    return _same("a run on two threads", *(_run_on(loss, case, count) for count in (2, 1)))


def _run_on(loss: Loss, case: Case, threads: int) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return run(loss, case.tensors, case.extras, case.floating)
    finally:
        torch.set_num_threads(before)


def unmutated(case: Case) -> Comparisons:
    """Inputs keep their bits, and so does memory between the elements of a strided input."""
    arguments = leaves(case.tensors, case.floating)
    memories = [_memory_of(argument) for argument in arguments]
    before = [memory.clone() for memory in memories]
    versions = [argument._version for argument in arguments]
    loss = case.loss(*arguments, **case.extras)
    gradients_of(loss, [arguments[i] for i in case.floating], upstream_like(loss, 1.0))
    if versions != [argument._version for argument in arguments]:
        return [fault("an input was written to in place")]
    return _same("an input after backward", memories, before)


def _memory_of(tensor: Tensor) -> Tensor:
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((elements,), (1,), 0)


def no_grad(case: Case) -> Comparisons:
    """Without gradients the value is the same and carries no graph."""
    arguments = leaves(case.tensors, case.floating)
    expected = case.loss(*arguments, **case.extras)
    if case.floating and not expected.requires_grad:
        return [fault("the loss does not require grad although its inputs do")]
    comparisons = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = case.loss(*arguments, **case.extras)
        if result.requires_grad:
            return [fault(f"under {mode.__name__} the loss requires grad")]
        comparisons += _same(f"the value under {mode.__name__}", [result], [expected.detach()])
    return comparisons


def layouts(case: Case) -> Comparisons:
    """Permuted, spread, offset and expanded inputs are as accurate as contiguous ones."""
    moved = [case.rearranged(layout, only) for layout in LAYOUTS for only in (None, 0)]
    usual = [_rounding(result, case.dtype) for result in run(case.loss, case.tensors, case.extras, case.floating)]
    return [
        # Equal rows may cancel: what is left is the rounding of gradients of the usual size. Theirs is the same
        # rounding n times, where that of n different rows adds up to its square root.
        Comparison(found.error, found.budget + rounding * math.sqrt(_copies(other)), found.message)
        for other in moved
        for found, rounding in zip(_gradients(other, other.floating), usual)
    ]


def _copies(case: Case) -> int:
    """How often expanded inputs repeat their elements."""
    strides = ([n for n, stride in zip(t.shape, t.stride()) if stride == 0 and n > 0] for t in case.tensors)
    return max(math.prod(sizes) for sizes in strides)


def _rounding(result: Tensor, dtype: torch.dtype) -> float:
    largest = float(result.nan_to_num(0.0, 0.0, 0.0).abs().max()) if result.numel() else 0.0
    return 4.0 * torch.finfo(dtype).eps * largest


def double_backward(case: Case) -> Comparisons:
    """A penalty on the gradients has the right gradient."""
    if not torch.isfinite(case.reference(*case.tensors, **case.extras)).all():
        return None
    return against_truth(case, _penalty)


def _penalty(loss: Loss, case: Case) -> list[Tensor]:
    arguments = leaves(case.tensors, case.floating)
    wanted = [arguments[i] for i in case.floating]
    result = loss(*arguments, **case.extras).sum()
    first = gradients_of(result, wanted, create_graph=True)
    penalty = sum((g.square().sum() for g in first), start=torch.zeros_like(result))
    return list(gradients_of(penalty, wanted))


def gradcheck(case: Case) -> Comparisons:
    """Gradients and their gradients agree with finite differences, where the reference's do; in fp64 only."""
    if case.dtype is not torch.float64:
        return None
    checks: tuple[Callable[..., bool], ...] = (torch.autograd.gradcheck, torch.autograd.gradgradcheck)
    comparisons: list[Comparison] = []
    on_cpu = _on_cpu(case)
    for index in case.floating:
        for check in checks:
            if _agrees(check, on_cpu.reference, on_cpu, index):
                agrees = _agrees(check, case.loss, case, index)
                comparisons.append(Comparison(0.0, 0.0) if agrees else fault(f"{check.__name__} of input {index}"))
    return comparisons or None


def _on_cpu(case: Case) -> Case:
    """Where a finite difference that leaves the domain raises: on a GPU it ends the process."""
    reference = copy.deepcopy(case.reference).cpu() if isinstance(case.reference, nn.Module) else case.reference
    return replace(case.rearranged(Tensor.cpu), reference=reference)


def _agrees(check: Callable[..., bool], loss: Loss, case: Case, index: int) -> bool:
    def of_one(tensor: Tensor) -> Tensor:
        arguments = [tensor if i == index else t for i, t in enumerate(case.tensors)]
        return loss(*arguments, **case.extras)

    start = case.tensors[index].clone(memory_format=torch.contiguous_format).requires_grad_()
    if not of_one(start).requires_grad:
        return False  # there is nothing to compare
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of the random directions that are compared
            # The same gradients twice, but for sums in another order: other checks ask for the same bits.
            return check(of_one, (start,), fast_mode=True, raise_exception=False, nondet_tol=1e-10)
    except (RuntimeError, ValueError):  # a finite difference may leave the domain
        return False


def transforms(case: Case) -> Comparisons:
    """torch.func's grad, vmap and jvp, and batched and compiled gradients, where the reference has them."""
    comparisons = []
    for transform in TRANSFORMS:
        try:
            transform(case.reference, case)
        except (RuntimeError, NotImplementedError):
            continue
        comparisons += against_truth(case, transform)
    return comparisons or None


def copies(case: Case) -> Comparisons:
    """A module survives deepcopy, pickle and its own state_dict with its value."""
    if not isinstance(case.loss, nn.Module):
        return None
    expected = case.loss(*case.tensors, **case.extras)
    copied = copy.deepcopy(case.loss)
    copied.load_state_dict(case.loss.state_dict())
    buffer = io.BytesIO()
    pickle.dump(case.loss, buffer)
    twins = copied, pickle.loads(buffer.getvalue()), copied.to(case.tensors[0].device)
    results = [twin(*case.tensors, **case.extras) for twin in twins]
    faithful = against_truth(case, lambda loss, c: [loss(*c.tensors, **c.extras)])
    return faithful + _same("a copy of the module", results, [expected] * len(results))


def compiled(case: Case) -> Comparisons:
    """torch.compile(fullgraph=True) is as accurate, with static and with dynamic shapes."""
    comparisons = []
    for dynamic in (False, True):
        torch.compiler.reset()

        def through_compile(loss: Loss, c: Case, dynamic: bool = dynamic) -> list[Tensor]:
            if loss is case.loss:
                loss = torch.compile(_plain_function(loss), fullgraph=True, backend="aot_eager", dynamic=dynamic)
            return run(loss, c.tensors, c.extras, c.floating)

        comparisons += against_truth(case, through_compile)
    return comparisons


def _plain_function(loss: Loss) -> Loss:
    return lambda *tensors, **extras: loss(*tensors, **extras)


def memory(case: Case) -> Comparisons:
    """Beyond its result and the gradients, a loss needs an eighth of the inputs at most; give it large samples."""
    device = str(case.tensors[0].device)
    slack = 2**14 + sum(tensor.nbytes for tensor in case.tensors) // 8
    arguments = leaves(case.tensors, case.floating)
    result = case.loss(*arguments, **case.extras).detach()
    each = upstream_like(result, 1.0)
    wanted = [arguments[i] for i in case.floating]

    def forward() -> Tensor:
        with torch.no_grad():
            return case.loss(*arguments, **case.extras)

    def both() -> Sequence[Tensor]:
        return gradients_of(case.loss(*arguments, **case.extras), wanted, each)

    gradients = sum(tensor.numel() * tensor.element_size() for tensor in wanted)
    return [
        Comparison(float(peak_bytes(forward, device)), float(result.nbytes + slack)),
        Comparison(float(peak_bytes(both, device)), float(result.nbytes + gradients + slack)),
    ]


def _named(*checks: Callable[[Case], Comparisons]) -> dict[str, Callable[[Case], Comparisons]]:
    return {check.__name__: check for check in checks}


CHECKS = _named(
    value,
    gradient,
    upstream,
    linearity,
    subsets,
    repeated_backward,
    double_backward,
    gradcheck,
    transforms,
    layouts,
    deterministic,
    unmutated,
    no_grad,
    copies,
    compiled,
)
# Asked for by name only: a loss in plain torch is right without it.
OPTIONAL_CHECKS = _named(memory)
