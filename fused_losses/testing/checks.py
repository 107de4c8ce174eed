"""One function per check. Each raises :class:`Fault`, or returns the comparisons it made."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from .accuracy import Comparison, compare

Loss = Callable[..., Tensor]


class Fault(AssertionError):
    """A check that did not hold."""


@dataclass(frozen=True)
class Case:
    """A loss on one sample in one dtype, with its reference there and in fp64."""

    loss: Loss
    reference: Loss
    truth: Loss
    tensors: tuple[Tensor, ...]
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def floating(self) -> tuple[int, ...]:
        return tuple(i for i, tensor in enumerate(self.tensors) if tensor.is_floating_point())

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _leaves(tensors: Sequence[Tensor], needed: Sequence[int]) -> list[Tensor]:
    """Copies in the same memory layout, of which some require grad."""
    copies = []
    for i, tensor in enumerate(tensors):
        fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        copies.append(fresh.copy_(tensor) if _is_dense(tensor) else tensor.detach().clone())
        copies[-1].requires_grad_(i in needed)
    return copies


def _is_dense(tensor: Tensor) -> bool:
    return all(stride > 0 for size, stride in zip(tensor.shape, tensor.stride()) if size > 1)


def run(
    loss: Loss,
    tensors: Sequence[Tensor],
    extras: Mapping[str, Any],
    needed: Sequence[int],
    upstream: float | Tensor = 1.0,
) -> list[Tensor]:
    """The loss and its gradients with respect to some inputs."""
    leaves = _leaves(tensors, needed)
    value = loss(*leaves, **extras)
    if not needed:
        return [value]
    each = isinstance(upstream, Tensor)
    grad_output = upstream.to(value.dtype) if each else torch.full_like(value, upstream)
    return [value.detach(), *torch.autograd.grad(value, [leaves[i] for i in needed], grad_output)]


def _against_truth(case: Case, needed: Sequence[int], upstream: float | Tensor = 1.0) -> list[Comparison]:
    ours = run(case.loss, case.tensors, case.extras, needed, upstream)
    reference = run(case.reference, case.tensors, case.extras, needed, upstream)
    wide = {name: _double(value) for name, value in case.extras.items()}
    truth = run(case.truth, [_double(tensor) for tensor in case.tensors], wide, needed, upstream)
    return [compare(*three) for three in zip(ours, reference, truth)]


def value(case: Case) -> list[Comparison]:
    """The loss is as accurate as the reference."""
    with torch.no_grad():
        return _against_truth(case, ())


def gradient(case: Case) -> list[Comparison]:
    """So are its gradients, for every input that the reference differentiates."""
    return _against_truth(case, case.floating)


def upstream(case: Case) -> list[Comparison]:
    """Gradients follow any upstream gradient: small, large, zero, and one of its own for each element."""
    shape = case.reference(*case.tensors, **case.extras).shape
    generator = torch.Generator().manual_seed(0)
    each = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    factors: list[float | Tensor] = [0.25, 3.0, 0.0, each.to(case.tensors[0].device)]
    if case.dtype not in (torch.bfloat16, torch.float16):
        factors.append(65536.0)
    return [c for factor in factors for c in _against_truth(case, case.floating, factor)]


def subsets(case: Case) -> list[Comparison]:
    """Every subset of the inputs may require grad."""
    choices = [s for n in range(1, len(case.floating)) for s in combinations(case.floating, n)]
    return [comparison for chosen in choices for comparison in _against_truth(case, chosen)]


def repeated_backward(case: Case) -> list[Comparison]:
    """A second backward through a retained graph gives the same bits."""
    leaves = _leaves(case.tensors, case.floating)
    loss = case.loss(*leaves, **case.extras)
    wanted = [leaves[i] for i in case.floating]
    runs = [torch.autograd.grad(loss, wanted, torch.full_like(loss, 3.0), retain_graph=True) for _ in range(2)]
    _same_bits("a second backward", *runs)
    return []


def deterministic(case: Case) -> list[Comparison]:
    """Two runs give the same bits."""
    runs = [run(case.loss, case.tensors, case.extras, case.floating) for _ in range(2)]
    _same_bits("a second run", *runs)
    return []


def _same_bits(what: str, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for a, b in zip(first, second):
        if not torch.equal(a.nan_to_num(nan=1234.5), b.nan_to_num(nan=1234.5)):
            raise Fault(f"{what} differs by up to {float((a - b).abs().max()):.3g}")


def unmutated(case: Case) -> list[Comparison]:
    """Inputs keep their bits."""
    leaves = _leaves(case.tensors, case.floating)
    before = [leaf.detach().clone() for leaf in leaves]
    loss = case.loss(*leaves, **case.extras)
    torch.autograd.grad(loss, [leaves[i] for i in case.floating], torch.full_like(loss, 1.0))
    _same_bits("an input after backward", [leaf.detach() for leaf in leaves], before)
    return []


def no_grad(case: Case) -> list[Comparison]:
    """Without gradients the value is the same and carries no graph."""
    leaves = _leaves(case.tensors, case.floating)
    expected = case.loss(*leaves, **case.extras).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = case.loss(*leaves, **case.extras)
        if result.requires_grad:
            raise Fault(f"under {mode.__name__} the loss requires grad")
        _same_bits(f"the value under {mode.__name__}", [result], [expected])
    return []


def layouts(case: Case) -> list[Comparison]:
    """Strided, offset and expanded inputs give what contiguous ones give."""
    comparisons = []
    for rearrange in (_permuted, _spread, _shifted):
        moved = tuple(rearrange(tensor) for tensor in case.tensors)
        comparisons += gradient(Case(case.loss, case.reference, case.truth, moved, case.extras))
    return comparisons


def _permuted(tensor: Tensor) -> Tensor:
    order = list(range(tensor.ndim))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def _spread(tensor: Tensor) -> Tensor:
    wide = tensor.new_zeros([2 * size for size in tensor.shape])
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def _shifted(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(tensor.numel() + 3)[3:].view(tensor.shape).copy_(tensor)


def double_backward(case: Case) -> list[Comparison]:
    """A penalty on the gradient has the right gradient, judged in fp64."""
    if not torch.isfinite(case.reference(*case.tensors, **case.extras)).all():
        return []
    needed = case.floating[:1]

    def penalty(loss: Loss) -> list[Tensor]:
        tensors = [_double(tensor) for tensor in case.tensors]
        extras = {name: _double(value) for name, value in case.extras.items()}
        leaves = _leaves(tensors, needed)
        result = loss(*leaves, **extras).sum()
        (first,) = torch.autograd.grad(result, [leaves[i] for i in needed], create_graph=True)
        if not first.requires_grad:
            return [torch.zeros_like(first)]
        second = torch.autograd.grad(first.square().sum(), [leaves[i] for i in needed], allow_unused=True)
        return [torch.zeros_like(first) if g is None else g for g in second]

    truth = penalty(case.truth)
    return [compare(*three) for three in zip(penalty(_cast(case.loss, torch.float64)), truth, truth)]


def compiled(case: Case) -> list[Comparison]:
    """torch.compile(fullgraph=True) gives the eager result, with static and with dynamic shapes."""
    expected = run(case.loss, case.tensors, case.extras, case.floating)
    for dynamic in (False, True):
        torch.compiler.reset()
        function = torch.compile(
            lambda *tensors: case.loss(*tensors, **case.extras),
            fullgraph=True,
            backend="aot_eager",
            dynamic=dynamic,
        )
        result = run(function, case.tensors, {}, case.floating)
        for a, b in zip(result, expected):
            if not torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-7, equal_nan=True):
                raise Fault(f"compiled with dynamic={dynamic} it differs by {float((a - b).abs().max()):.3g}")
    return []


def copies(case: Case) -> list[Comparison]:
    """A module survives deepcopy, pickle and its own state_dict with its value."""
    if not isinstance(case.loss, nn.Module):
        return []
    expected = case.loss(*case.tensors, **case.extras)
    copied = copy.deepcopy(case.loss)
    copied.load_state_dict(case.loss.state_dict())
    buffer = io.BytesIO()
    pickle.dump(case.loss, buffer)
    for twin in (copied, pickle.loads(buffer.getvalue())):
        _same_bits("a copy of the module", [twin(*case.tensors, **case.extras)], [expected])
    return []


def _cast(loss: Loss, dtype: torch.dtype) -> Loss:
    """The loss with a module's floating buffers and parameters in a dtype."""
    return copy.deepcopy(loss).to(dtype) if isinstance(loss, nn.Module) else loss


CHECKS: dict[str, Callable[[Case], list[Comparison]]] = {
    check.__name__: check
    for check in (
        value,
        gradient,
        upstream,
        subsets,
        repeated_backward,
        double_backward,
        layouts,
        deterministic,
        unmutated,
        no_grad,
        copies,
        compiled,
    )
}


def make_case(
    loss: Loss, reference: Loss, tensors: Sequence[Tensor], extras: Mapping[str, Any], dtype: torch.dtype
) -> Case:
    """A case in a dtype, from a loss and a sample in any floating dtype."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return Case(
        _cast(loss, dtype),
        _cast(reference, dtype),
        _cast(_cast(reference, dtype), torch.float64),  # of the weights as the dtype rounds them
        tuple(cast(tensor) for tensor in tensors),
        {name: cast(value) for name, value in extras.items()},
    )
