"""Divergences of rows of logits: a program to a pair of rows, in blocks of its classes."""

import torch
import triton
import triton.language as tl

from .numerics import expm1_near_zero, log1p, log_below_one, over


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
def terms(log_s, log_t, beta, DIVERGENCE: tl.constexpr):
    """A class's value, and p times the value's derivative with respect to p, for the student's p and the teacher's."""
    s, t = tl.exp(log_s), tl.exp(log_t)
    if DIVERGENCE == "forward_kl":
        value = times_log(t, log_t - log_s)
        return value, -t, value
    elif DIVERGENCE == "reverse_kl":
        value = times_log(s, log_s - log_t)
        return value, value, -s
    elif DIVERGENCE == "jsd":
        ratio_s, ratio_t = log_ratios(log_s, log_t, beta)
        of_student = (1.0 - beta) * times_log(s, ratio_s)
        of_teacher = beta * times_log(t, ratio_t)
        return of_student + of_teacher, of_student, of_teacher
    else:
        tl.static_assert(DIVERGENCE == "tvd", "there is no such divergence")
        sign = tl.where(s > t, 0.5, tl.where(s < t, -0.5, 0.0))
        # larger - smaller = larger (1 - exp(their logarithms' difference)), where both are near 1, too
        smaller = -tl.abs(log_s - log_t)
        value = 0.5 * times_log(tl.maximum(s, t), -expm1_nonpositive(smaller, tl.exp(smaller)))
        return value, s * sign, -t * sign


@triton.jit
def log_sum_of_row(logits, classes, temperature, accumulate: tl.constexpr, BLOCK: tl.constexpr):
    """The maximum of a row and the logarithm of its sum of exponentials."""
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
    return maximum, tl.where(maximum == float("-inf"), float("nan"), log1p(rest + (top - 1.0)))


@triton.jit
def add_to(total, lost, value, COMPENSATED: tl.constexpr):
    """A sum, and what its additions rounded away: total - lost is nearly exact."""
    if not COMPENSATED:
        return total + value, lost
    corrected = value - lost
    larger = total + corrected
    return larger, (larger - total) - corrected


@triton.jit
def sum_of(total, lost, COMPENSATED: tl.constexpr):
    return tl.sum(total.to(tl.float64) - lost.to(tl.float64)) if COMPENSATED else tl.sum(total)


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
    maximum_s, log_sum_s = log_sum_of_row(of_s, classes, temperature, accumulate, 2 * BLOCK)
    maximum_t, log_sum_t = log_sum_of_row(of_t, classes, temperature, accumulate, 2 * BLOCK)
    # Where one class has nearly everything, its gradient is the difference of a total and nearly the same.
    COMPENSATED: tl.constexpr = student.dtype.element_ty.primitive_bitwidth >= 32
    loss = tl.zeros((BLOCK,), accumulate)
    total_s, lost_s = tl.zeros((BLOCK,), accumulate), tl.zeros((BLOCK,), accumulate)
    total_t, lost_t = tl.zeros((BLOCK,), accumulate), tl.zeros((BLOCK,), accumulate)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = columns < classes
        z_s = over(tl.load(of_s + columns, mask=mask, other=0.0).to(accumulate), temperature)
        z_t = over(tl.load(of_t + columns, mask=mask, other=0.0).to(accumulate), temperature)
        log_s = (z_s - maximum_s) - log_sum_s
        log_t = (z_t - maximum_t) - log_sum_t
        value, of_student, of_teacher = terms(log_s, log_t, beta, DIVERGENCE)
        loss += tl.where(mask, value, 0.0)
        total_s, lost_s = add_to(total_s, lost_s, tl.where(mask, of_student, 0.0), COMPENSATED)
        total_t, lost_t = add_to(total_t, lost_t, tl.where(mask, of_teacher, 0.0), COMPENSATED)
    loss = tl.sum(loss)
    total_s = sum_of(total_s, lost_s, COMPENSATED)
    total_t = sum_of(total_t, lost_t, COMPENSATED)
    # Known beforehand, but for a NaN, which must stay.
    if DIVERGENCE == "forward_kl":
        total_s = tl.where(total_s == total_s, -1.0, total_s)
    elif DIVERGENCE == "reverse_kl":
        total_t = tl.where(total_t == total_t, -1.0, total_t)
    tl.store(losses + row, loss)
    tl.store(statistics + row, maximum_s)
    tl.store(statistics + rows + row, log_sum_s)
    tl.store(statistics + 2 * rows + row, maximum_t)
    tl.store(statistics + 3 * rows + row, log_sum_t)
    tl.store(statistics + 4 * rows + row, total_s.to(accumulate))
    tl.store(statistics + 5 * rows + row, total_t.to(accumulate))


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
    maximum_s, log_sum_s = tl.load(statistics + row), tl.load(statistics + rows + row)
    maximum_t, log_sum_t = tl.load(statistics + 2 * rows + row), tl.load(statistics + 3 * rows + row)
    total_s, total_t = tl.load(statistics + 4 * rows + row), tl.load(statistics + 5 * rows + row)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = columns < classes
        z_s = over(tl.load(student + row * stride_student + columns, mask=mask, other=0.0).to(accumulate), temperature)
        z_t = over(tl.load(teacher + row * stride_teacher + columns, mask=mask, other=0.0).to(accumulate), temperature)
        log_s = (z_s - maximum_s) - log_sum_s
        log_t = (z_t - maximum_t) - log_sum_t
        _, of_student, of_teacher = terms(log_s, log_t, beta, DIVERGENCE)
        # A row that nobody asks for has a gradient of exactly 0, whatever its logits.
        k = upstream / temperature
        if STUDENT_GRAD:
            result = tl.where(upstream == 0, 0.0, k * (of_student - tl.exp(log_s) * total_s))
            place = grad_student + row * stride_grad_student + columns
            tl.store(place, result.to(grad_student.dtype.element_ty), mask=mask)
        if TEACHER_GRAD:
            result = tl.where(upstream == 0, 0.0, k * (of_teacher - tl.exp(log_t) * total_t))
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
    """The divergence of every pair of rows, and six numbers of each; arguments as the operator's."""
    rows, classes = student.shape
    accumulate = torch.float64 if student.dtype == torch.float64 else torch.float32
    losses = student.new_empty((rows,), dtype=accumulate)
    statistics = student.new_empty((6, rows), dtype=accumulate)
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
