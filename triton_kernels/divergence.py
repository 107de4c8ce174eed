"""Divergences of rows of logits: a program to a pair of rows, in blocks of its classes."""

import torch
import triton
import triton.language as tl

from .numerics import expm1_near_zero, log1p, log_below_one, over, reciprocal


@triton.jit
def times_log(p, log_ratio):
    return tl.where(p == 0, 0.0, p * log_ratio)


@triton.jit
def expm1_nonpositive(x, exp_x):
    return tl.where(x > -0.5, expm1_near_zero(x), exp_x - 1.0)


@triton.jit
def log_ratios(log_s, log_t, beta):
    """log(s / m) and log(t / m) for m = beta t + (1 - beta) s, exact where both underflow and where both are near 1."""
    difference = log_s - log_t
    smaller = -tl.abs(difference)
    ratio = tl.exp(smaller)
    own, other = tl.where(difference > 0, 1.0 - beta, beta), tl.where(difference > 0, beta, 1.0 - beta)
    of_larger = -log_below_one(own + other * ratio, other * expm1_nonpositive(smaller, ratio))
    of_smaller = smaller + of_larger
    return tl.where(difference > 0, of_larger, of_smaller), tl.where(difference > 0, of_smaller, of_larger)


@triton.jit
def terms(s, t, log_s, log_t, sum_s, sum_t, scale_s, scale_t, beta, DIVERGENCE: tl.constexpr):
    """A class's value, and its weights s and t times the value's derivatives with respect to the probabilities.

    Rounded probabilities would not sum to 1, and where one class has nearly everything, its gradient would show it.
    """
    if DIVERGENCE == "forward_kl":
        of_teacher = times_log(t, log_t - log_s)
        return of_teacher * scale_t, -t * (scale_t * sum_s), of_teacher
    elif DIVERGENCE == "reverse_kl":
        of_student = times_log(s, log_s - log_t)
        return of_student * scale_s, of_student, -s * (scale_s * sum_t)
    elif DIVERGENCE == "jsd":
        ratio_s, ratio_t = log_ratios(log_s, log_t, beta)
        of_student = (1.0 - beta) * times_log(s, ratio_s)
        of_teacher = beta * times_log(t, ratio_t)
        return of_student * scale_s + of_teacher * scale_t, of_student, of_teacher
    else:
        tl.static_assert(DIVERGENCE == "tvd", "there is no such divergence")
        p_s, p_t = s * scale_s, t * scale_t
        sign = tl.where(p_s > p_t, 0.5, tl.where(p_s < p_t, -0.5, 0.0))
        # larger - smaller = larger (1 - exp(their logarithms' difference)), where both are near 1, too
        smaller = -tl.abs(log_s - log_t)
        value = 0.5 * times_log(tl.maximum(p_s, p_t), -expm1_nonpositive(smaller, tl.exp(smaller)))
        return value, s * sign, -t * sign


@triton.jit
def row_sums(logits, classes, temperature, accumulate: tl.constexpr, BLOCK: tl.constexpr):
    """The maximum of a row, the sum of exp(z - maximum) and its logarithm."""
    maximum = tl.full((), float("-inf"), accumulate)
    top = tl.zeros((), accumulate)
    rest = tl.zeros((), accumulate)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        x = tl.load(logits + columns, mask=columns < classes, other=float("-inf")).to(accumulate)
        z = over(x, temperature)
        larger = tl.maximum(maximum, tl.max(z, axis=0))
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        grown = larger > maximum
        rest = tl.where(grown, (rest + top) * tl.exp(maximum - reference), rest)
        top = tl.where(grown, 0.0, top)
        is_top = tl.where(z == reference, 1.0, 0.0)
        top += tl.sum(is_top, axis=0)
        rest += tl.sum(tl.exp(z - reference) - is_top, axis=0)
        maximum = larger
    log_sum = tl.where(maximum == float("-inf"), float("nan"), log1p(rest + (top - 1.0)))
    return maximum, top + rest, log_sum


@triton.jit
def weights(z, maximum, log_sum):
    """exp(z - maximum), weights of the classes, and the logarithms of their probabilities."""
    below = z - maximum
    return tl.exp(below), below - log_sum


@triton.jit
def add_to(total, lost, value, EXACT: tl.constexpr):
    """A sum, and what its additions rounded away."""
    larger = total + value
    if not EXACT:
        return larger, lost
    added = larger - total
    return larger, lost + ((total - (larger - added)) + (value - added))


@triton.jit
def sum_of(total, lost):
    return tl.sum(total.to(tl.float64) + lost.to(tl.float64))


@triton.jit
def mean_of(total, weights, accumulate: tl.constexpr):
    """The mean of a derivative, rounded, and what that lost; nothing is left of infinity."""
    mean = total / weights
    high = mean.to(accumulate)
    low = (mean - high.to(tl.float64)).to(accumulate)
    return high, tl.where(low == low, low, 0.0)


@triton.jit
def keep(place, rows, maximum, sum, log_sum, high, low):
    tl.store(place, maximum)
    tl.store(place + rows, sum)
    tl.store(place + 2 * rows, log_sum)
    tl.store(place + 3 * rows, high)
    tl.store(place + 4 * rows, low)


@triton.jit
def known(place, rows):
    """What was kept."""
    maximum, sum, log_sum = tl.load(place), tl.load(place + rows), tl.load(place + 2 * rows)
    return maximum, sum, log_sum, tl.load(place + 3 * rows), tl.load(place + 4 * rows)


@triton.jit
def from_mean(term, weight, high, low):
    """weight (derivative - mean), from the weight times the derivative."""
    return tl.fma(-weight, low, tl.fma(-weight, high, term))


@triton.jit
def forward_kernel(
    student,
    teacher,
    losses,
    statistics,
    rows,
    classes,
    stride_student,
    stride_teacher,
    beta: tl.float64,
    temperature: tl.float64,
    DIVERGENCE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    accumulate: tl.constexpr = tl.float64 if WIDE else tl.float32
    beta, temperature = tl.cast(beta, accumulate), tl.cast(temperature, accumulate)
    row = tl.program_id(0).to(tl.int64)
    of_s, of_t = student + row * stride_student, teacher + row * stride_teacher
    # Of one row rather than two, and so in blocks of twice as many classes.
    maximum_s, sum_s, log_sum_s = row_sums(of_s, classes, temperature, accumulate, 2 * BLOCK)
    maximum_t, sum_t, log_sum_t = row_sums(of_t, classes, temperature, accumulate, 2 * BLOCK)
    scale_s, scale_t = reciprocal(sum_s), reciprocal(sum_t)
    # Where one class has nearly everything, its derivative is nearly the mean over the row: which is in two parts, and
    # by the weights as the gradient has them, not as they were summed before the row's maximum was known.
    EXACT: tl.constexpr = student.dtype.element_ty == tl.float32
    PART: tl.constexpr = BLOCK // 2 if EXACT and BLOCK > 1 else BLOCK  # exact sums take twice the registers
    loss = tl.zeros((PART,), accumulate)
    total_s, lost_s = tl.zeros((PART,), accumulate), tl.zeros((PART,), accumulate)
    total_t, lost_t = tl.zeros((PART,), accumulate), tl.zeros((PART,), accumulate)
    weights_s, rest_s = tl.zeros((PART,), accumulate), tl.zeros((PART,), accumulate)
    weights_t, rest_t = tl.zeros((PART,), accumulate), tl.zeros((PART,), accumulate)
    for start in range(0, classes, PART):
        columns = start + tl.arange(0, PART).to(tl.int64)
        mask = columns < classes
        z_s = over(tl.load(of_s + columns, mask=mask, other=0.0).to(accumulate), temperature)
        z_t = over(tl.load(of_t + columns, mask=mask, other=0.0).to(accumulate), temperature)
        s, log_s = weights(z_s, maximum_s, log_sum_s)
        t, log_t = weights(z_t, maximum_t, log_sum_t)
        value, of_student, of_teacher = terms(s, t, log_s, log_t, sum_s, sum_t, scale_s, scale_t, beta, DIVERGENCE)
        loss += tl.where(mask, value, 0.0)
        total_s, lost_s = add_to(total_s, lost_s, tl.where(mask, of_student, 0.0), EXACT)
        total_t, lost_t = add_to(total_t, lost_t, tl.where(mask, of_teacher, 0.0), EXACT)
        weights_s, rest_s = add_to(weights_s, rest_s, tl.where(mask, s, 0.0), EXACT)
        weights_t, rest_t = add_to(weights_t, rest_t, tl.where(mask, t, 0.0), EXACT)
    loss = tl.sum(loss)
    weights_s = sum_of(weights_s, rest_s)
    weights_t = sum_of(weights_t, rest_t)
    high_s, low_s = mean_of(sum_of(total_s, lost_s), weights_s, accumulate)
    high_t, low_t = mean_of(sum_of(total_t, lost_t), weights_t, accumulate)
    tl.store(losses + row, loss)
    keep(statistics + row, rows, maximum_s, sum_s, log_sum_s, high_s, low_s)
    keep(statistics + 5 * rows + row, rows, maximum_t, sum_t, log_sum_t, high_t, low_t)


@triton.jit
def backward_kernel(
    grad_losses,
    student,
    teacher,
    statistics,
    grad_student,
    grad_teacher,
    rows,
    classes,
    stride_student,
    stride_teacher,
    stride_grad_student,
    stride_grad_teacher,
    beta: tl.float64,
    temperature: tl.float64,
    DIVERGENCE: tl.constexpr,
    STUDENT_GRAD: tl.constexpr,
    TEACHER_GRAD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of a pair of rows; they may be written over the logits they are of."""
    accumulate: tl.constexpr = tl.float64 if WIDE else tl.float32
    beta, temperature = tl.cast(beta, accumulate), tl.cast(temperature, accumulate)
    row = tl.program_id(0).to(tl.int64)
    upstream = tl.load(grad_losses + row).to(accumulate)
    maximum_s, sum_s, log_sum_s, high_s, low_s = known(statistics + row, rows)
    maximum_t, sum_t, log_sum_t, high_t, low_t = known(statistics + 5 * rows + row, rows)
    scale_s, scale_t = reciprocal(sum_s), reciprocal(sum_t)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = columns < classes
        z_s = over(tl.load(student + row * stride_student + columns, mask=mask, other=0.0).to(accumulate), temperature)
        z_t = over(tl.load(teacher + row * stride_teacher + columns, mask=mask, other=0.0).to(accumulate), temperature)
        s, log_s = weights(z_s, maximum_s, log_sum_s)
        t, log_t = weights(z_t, maximum_t, log_sum_t)
        _, of_student, of_teacher = terms(s, t, log_s, log_t, sum_s, sum_t, scale_s, scale_t, beta, DIVERGENCE)
        # A row that nobody asks for has a gradient of exactly 0, whatever its logits.
        k = upstream / temperature
        if STUDENT_GRAD:
            result = tl.where(upstream == 0, 0.0, k * scale_s * from_mean(of_student, s, high_s, low_s))
            place = grad_student + row * stride_grad_student + columns
            tl.store(place, result.to(grad_student.dtype.element_ty), mask=mask)
        if TEACHER_GRAD:
            result = tl.where(upstream == 0, 0.0, k * scale_t * from_mean(of_teacher, t, high_t, low_t))
            place = grad_teacher + row * stride_grad_teacher + columns
            tl.store(place, result.to(grad_teacher.dtype.element_ty), mask=mask)


def arguments_of(divergence, beta, temperature, student):
    """The numbers and constants that both kernels share."""
    block = min(1024, triton.next_power_of_2(max(1, student.shape[1])))
    numbers = beta, temperature
    constants = {
        "DIVERGENCE": divergence,
        "WIDE": student.dtype == torch.float64,
        "BLOCK": block,
    }
    return numbers, constants


def divergence_forward(student, teacher, divergence, beta, temperature):
    """The divergence of every pair of rows, and ten numbers of each; arguments as the operator's."""
    rows, classes = student.shape
    accumulate = torch.float64 if student.dtype == torch.float64 else torch.float32
    losses = student.new_empty((rows,), dtype=accumulate)
    statistics = student.new_empty((10, rows), dtype=accumulate)
    numbers, constants = arguments_of(divergence, beta, temperature, student)
    if rows > 0:
        forward_kernel[(rows,)](
            student, teacher, losses, statistics, rows, classes, student.stride(0), teacher.stride(0), *numbers,
            **constants,
        )  # fmt: skip
    return losses, statistics


def launch_backward(grad_losses, student, teacher, statistics, grad_student, grad_teacher, *kind):
    """Writes the gradients that there is memory for."""
    rows, classes = student.shape
    numbers, constants = arguments_of(*kind, student)
    asked = [gradient is not None for gradient in (grad_student, grad_teacher)]
    strides = [0 if gradient is None else gradient.stride(0) for gradient in (grad_student, grad_teacher)]
    if rows > 0 and any(asked):
        backward_kernel[(rows,)](
            grad_losses.contiguous(), student, teacher, statistics, grad_student, grad_teacher, rows, classes,
            student.stride(0), teacher.stride(0), *strides, *numbers, STUDENT_GRAD=asked[0], TEACHER_GRAD=asked[1],
            **constants,
        )  # fmt: skip


def divergence_backward(
    grad_losses, student, teacher, statistics, divergence, beta, temperature, student_grad, teacher_grad
):
    """Gradients with respect to both; one that is not asked for is empty."""
    shape = student.shape
    gradients = [student.new_empty(shape) if asked else None for asked in (student_grad, teacher_grad)]
    launch_backward(grad_losses, student, teacher, statistics, *gradients, divergence, beta, temperature)
    return tuple(student.new_empty((0, shape[1])) if gradient is None else gradient for gradient in gradients)


def divergence_backward_(
    grad_losses, student, teacher, statistics, divergence, beta, temperature, student_grad, teacher_grad
):
    """Writes the gradients over the logits they are of."""
    gradients = student if student_grad else None, teacher if teacher_grad else None
    launch_backward(grad_losses, student, teacher, statistics, *gradients, divergence, beta, temperature)
