"""The pointwise family: one kernel each way, the formula a compile-time constant."""

import torch
import triton
import triton.language as tl

from .numerics import log1p, tanh
from .sums import SUM_BLOCK, few_sums

BLOCK = 1024


@triton.jit
def logit_terms(x):
    """sigmoid(x), sigmoid(-x), softplus(x), softplus(-x) from one exponential, without subtracting from 1."""
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    shared = log1p(e)
    positive = x >= 0
    p = tl.where(positive, larger, smaller)
    complement = tl.where(positive, smaller, larger)
    return p, complement, shared + tl.where(x > 0, x, 0.0), shared + tl.where(x < 0, -x, 0.0)


@triton.jit
def bounded_log(x):
    """log x, at least -100, as torch's binary cross entropy has it."""
    return tl.where(x > 0, tl.maximum(tl.log(tl.where(x > 0, x, 1.0)), -100.0), tl.where(x == 0, -100.0, float("nan")))


@triton.jit
def power(u, gamma):
    return tl.where(gamma == 0, 1.0, tl.where(u > 0, tl.exp(gamma * tl.log(tl.where(u > 0, u, 1.0))), u * 0.0))


@triton.jit
def value(x, t, q, a, b, FORMULA: tl.constexpr):
    d = x - t
    if FORMULA == "mse":
        return d * d
    elif FORMULA == "l1":
        return tl.abs(d)
    elif FORMULA == "smooth_l1":
        return tl.where(tl.abs(d) < a, 0.5 * d * d / a, tl.abs(d) - 0.5 * a)
    elif FORMULA == "huber":
        return tl.where(tl.abs(d) <= a, 0.5 * d * d, a * (tl.abs(d) - 0.5 * a))
    elif FORMULA == "log_cosh":
        slope = tanh(d)
        far = tl.abs(d) + log1p(tl.exp(-2.0 * tl.abs(d))) - 0.693147180559945309
        return tl.where(tl.abs(d) < 0.5, -0.5 * log1p(-slope * slope), far)
    elif FORMULA == "charbonnier":
        return tl.sqrt(d * d + a)
    elif FORMULA == "bce":
        inside = (x >= 0) & (x <= 1) & (t >= 0) & (t <= 1)
        log_not = tl.maximum(log1p(-tl.where(x < 1, x, 0.0)), -100.0)
        loss = (t - 1.0) * tl.where(x < 1, log_not, -100.0) - t * bounded_log(x)
        return tl.where(inside, loss, float("nan"))
    elif FORMULA == "bce_with_logits":
        p, complement, softplus, softplus_minus = logit_terms(x)
        return (1.0 - t) * softplus + q * t * softplus_minus
    elif FORMULA == "kl_div":
        loss = t * tl.log(tl.where(t > 0, t, 1.0)) - t * x
        return tl.where(t < 0, float("nan"), loss)
    elif FORMULA == "kl_div_log_target":
        return tl.exp(t) * (t - x)
    else:
        tl.static_assert(FORMULA == "sigmoid_focal", "there is no such formula")
        p, complement, softplus, softplus_minus = logit_terms(x)
        cross_entropy = (1.0 - t) * softplus + t * softplus_minus
        scale = tl.where(a >= 0, a * t + (1.0 - a) * (1.0 - t), 1.0)
        return scale * power(p * (1.0 - t) + complement * t, b) * cross_entropy


@triton.jit
def gradient(x, t, q, a, b, FORMULA: tl.constexpr):
    """The derivatives with respect to x and t."""
    d = x - t
    if FORMULA == "mse":
        return 2.0 * d, -2.0 * d
    elif FORMULA == "l1":
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0)).to(d.dtype)
        return sign, -sign
    elif FORMULA == "smooth_l1":
        slope = tl.where(tl.abs(d) < a, d / a, tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d)))
        return slope, -slope
    elif FORMULA == "huber":
        slope = tl.where(tl.abs(d) <= a, d, tl.where(d > 0, a, tl.where(d < 0, -a, d)))
        return slope, -slope
    elif FORMULA == "log_cosh":
        slope = tanh(d)
        return slope, -slope
    elif FORMULA == "charbonnier":
        slope = d / tl.sqrt(d * d + a)
        return slope, -slope
    elif FORMULA == "bce":
        inside = (x >= 0) & (x <= 1) & (t >= 0) & (t <= 1)
        variance = tl.maximum((1.0 - x) * x, 1e-12)
        log_not = tl.where(x < 1, tl.maximum(log1p(-tl.where(x < 1, x, 0.0)), -100.0), -100.0)
        dx = tl.where(inside, (x - t) / variance, float("nan"))
        return dx, tl.where(inside, log_not - bounded_log(x), float("nan"))
    elif FORMULA == "bce_with_logits":
        p, complement, softplus, softplus_minus = logit_terms(x)
        return (1.0 - t) * p - q * t * complement, q * softplus_minus - softplus
    elif FORMULA == "kl_div":
        # Where log t is not finite torch's derivative is NaN.
        inside = (t > 0) & (t < float("inf"))
        return -t, tl.where(inside, (tl.log(tl.where(inside, t, 1.0)) - x) + 1.0, float("nan"))
    elif FORMULA == "kl_div_log_target":
        p = tl.exp(t)
        return -p, p * ((t - x) + 1.0)
    else:
        tl.static_assert(FORMULA == "sigmoid_focal", "there is no such formula")
        return focal_gradient(x, t, a, b)


@triton.jit
def focal_gradient(x, t, alpha, gamma):
    p, complement, softplus, softplus_minus = logit_terms(x)
    cross_entropy = (1.0 - t) * softplus + t * softplus_minus
    u = p * (1.0 - t) + complement * t
    focus = power(u, gamma)
    scale = tl.where(alpha >= 0, alpha * t + (1.0 - alpha) * (1.0 - t), 1.0)
    # p (1 - p) / u tends to 1 where u underflows, which it only does for hard targets.
    ratio = tl.where(u > 0, p * complement / tl.where(u > 0, u, 1.0), 1.0)
    slope_x = gamma * focus * ratio * cross_entropy * (1.0 - 2.0 * t)
    slope_t = tl.where(gamma == 0, 0.0, gamma * power(u, gamma - 1.0) * (complement - p) * cross_entropy)
    alpha_slope = tl.where(alpha >= 0, 2.0 * alpha - 1.0, 0.0)
    dx = scale * (slope_x + focus * (p * (1.0 - t) - complement * t))
    return dx, alpha_slope * focus * cross_entropy + scale * (slope_t - focus * x)


@triton.jit
def forward_kernel(
    input,
    target,
    weight,
    pos_weight,
    out,
    numel,
    a: tl.float64,
    b: tl.float64,
    FORMULA: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_POS_WEIGHT: tl.constexpr,
    REDUCE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weighted values of a block, or their sum in out[program]."""
    accumulate: tl.constexpr = tl.float64 if WIDE else tl.float32
    a, b = tl.cast(a, accumulate), tl.cast(b, accumulate)
    program = tl.program_id(0)
    index = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    x = tl.load(input + index, mask=mask, other=0.5).to(accumulate)
    t = tl.load(target + index, mask=mask, other=0.5).to(accumulate)
    q = 1.0
    if HAS_POS_WEIGHT:
        q = tl.load(pos_weight + index, mask=mask, other=0.0).to(accumulate)
    result = value(x, t, q, a, b, FORMULA)
    if HAS_WEIGHT:
        result *= tl.load(weight + index, mask=mask, other=0.0).to(accumulate)
    if REDUCE:
        tl.store(out + program, tl.sum(tl.where(mask, result, 0.0)))
    else:
        tl.store(out + index, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def finish_kernel(partial, out, count, numel, MEAN: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One program adds the partial sums."""
    accumulate: tl.constexpr = tl.float64 if WIDE else tl.float32
    total = tl.zeros((BLOCK,), accumulate)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(partial + index, mask=index < count, other=0.0)
    result = tl.sum(total)
    if MEAN:
        result = result / tl.cast(numel, accumulate)  # 1 is a constant
    tl.store(out, result.to(out.dtype.element_ty))


@triton.jit
def backward_kernel(
    grad_output,
    input,
    target,
    weight,
    pos_weight,
    grad_input,
    grad_target,
    numel,
    a: tl.float64,
    b: tl.float64,
    FORMULA: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_POS_WEIGHT: tl.constexpr,
    REDUCTION: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
    TARGET_GRAD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    accumulate: tl.constexpr = tl.float64 if WIDE else tl.float32
    a, b = tl.cast(a, accumulate), tl.cast(b, accumulate)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    x = tl.load(input + index, mask=mask, other=0.5).to(accumulate)
    t = tl.load(target + index, mask=mask, other=0.5).to(accumulate)
    q = 1.0
    if HAS_POS_WEIGHT:
        q = tl.load(pos_weight + index, mask=mask, other=0.0).to(accumulate)
    if REDUCTION == "none":
        scale = tl.load(grad_output + index, mask=mask, other=0.0).to(accumulate)
    else:
        scale = tl.load(grad_output).to(accumulate)
        if REDUCTION == "mean":
            scale = scale / tl.cast(numel, accumulate)
    if HAS_WEIGHT:
        scale = scale * tl.load(weight + index, mask=mask, other=0.0).to(accumulate)
    dx, dt = gradient(x, t, q, a, b, FORMULA)
    if INPUT_GRAD:
        tl.store(grad_input + index, (scale * dx).to(grad_input.dtype.element_ty), mask=mask)
    if TARGET_GRAD:
        tl.store(grad_target + index, (scale * dt).to(grad_target.dtype.element_ty), mask=mask)


def in_layout_of(leader, tensor):
    """The tensor with its elements in memory in the order of a dense leader; copied only where they are not."""
    if tensor is None or tensor.stride() == leader.stride():
        return tensor
    return torch.empty_like(leader, dtype=tensor.dtype).copy_(tensor)


def dense(tensor):
    """The tensor, or a copy of it without gaps or overlaps in torch.empty_like's layout."""
    like = torch.empty_like(tensor, device="meta")
    return tensor if like.stride() == tensor.stride() else torch.empty_like(tensor).copy_(tensor)


def pointwise_forward(formula, input, target, weight, pos_weight, a, b, reduction, out_dtype):
    """The loss of a formula; arguments as the operator's."""
    leader, wide = dense(input), input.dtype == torch.float64
    target, weight, pos_weight = (in_layout_of(leader, tensor) for tensor in (target, weight, pos_weight))
    numel, reduce = leader.numel(), reduction != "none"
    programs = triton.cdiv(numel, BLOCK)
    partial_dtype = torch.float64 if wide else torch.float32
    out = leader.new_empty((1, programs), dtype=partial_dtype) if reduce else torch.empty_like(leader, dtype=out_dtype)
    if programs > 0:
        forward_kernel[(programs,)](
            leader,
            target,
            weight,
            pos_weight,
            out,
            numel,
            a,
            b,
            FORMULA=formula,
            HAS_WEIGHT=weight is not None,
            HAS_POS_WEIGHT=pos_weight is not None,
            REDUCE=reduce,
            WIDE=wide,
            BLOCK=BLOCK,
        )
    if not reduce:
        return out
    if programs == 0:
        return leader.new_full((), float("nan") if reduction == "mean" else 0.0, dtype=out_dtype)
    loss = leader.new_empty((), dtype=out_dtype)
    partial, mean = few_sums(out), reduction == "mean"
    finish_kernel[(1,)](partial, loss, partial.shape[1], numel, MEAN=mean, WIDE=wide, BLOCK=SUM_BLOCK, num_warps=8)
    return loss


def pointwise_backward(
    formula, grad_output, input, target, weight, pos_weight, a, b, reduction, input_grad, target_grad
):
    """Gradients with respect to input and target; the one that is not asked for is empty."""
    leader = dense(input)
    like = torch.empty_like(input) if input_grad else input.new_empty(0)
    grad_target = torch.empty_like(target) if target_grad else input.new_empty(0)
    in_order = grad_target.stride() == leader.stride() or not target_grad
    written = grad_target if in_order else torch.empty_like(leader)
    target, weight, pos_weight = (in_layout_of(leader, tensor) for tensor in (target, weight, pos_weight))
    if reduction == "none":
        grad_output = in_layout_of(leader, grad_output)
    if leader.numel() > 0:
        backward_kernel[(triton.cdiv(leader.numel(), BLOCK),)](
            grad_output,
            leader,
            target,
            weight,
            pos_weight,
            like,
            written,
            leader.numel(),
            a,
            b,
            FORMULA=formula,
            HAS_WEIGHT=weight is not None,
            HAS_POS_WEIGHT=pos_weight is not None,
            REDUCTION=reduction,
            INPUT_GRAD=input_grad,
            TARGET_GRAD=target_grad,
            WIDE=leader.dtype == torch.float64,
            BLOCK=BLOCK,
        )
    return like, grad_target if in_order else grad_target.copy_(written)
