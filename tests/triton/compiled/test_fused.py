"""Generated kernels of every kind compile: what the interpreter runs is Triton; and few of them serve many calls."""

import elementwise
import pretend_driver
import pytest
import torch
import torch.nn.functional as F

from fused_losses import fuse

STACK = 16  # bytes that the calls of an exact division may keep


pytestmark = pytest.mark.usefixtures("only_triton")


def robust(x, y):
    return torch.log1p((x - y).square()).mean()


def overlap(x, y):
    """Columns, per-channel sums and a guarded load."""
    p = x.sigmoid()
    return (1 - (p * y).sum((0, 2)) / (p.sum((0, 2)) + 1)).mean() + F.pad(p, (1, 1)).diff(dim=-1).abs().mean()


def instances(x, y):
    """Statistics of a batch, and sums that are read again from memory."""
    centred = x - x.mean((1, 2), keepdim=True)
    scaled = centred / (centred.square().mean((1, 2), keepdim=True) + 1).sqrt()
    return (scaled - x.sum(1, keepdim=True).flip(2)).abs().sum()


def places(x, y):
    return x.argmax(-1), x.argmin(0), (x > y).any(), x.prod(-1)


def floats(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def run(loss, *tensors):
    outputs = fuse(loss, strict=True)(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    learnt = [output for output in outputs if output.requires_grad]
    if learnt:
        torch.autograd.backward([output.sum() for output in learnt])


def both(loss, dtype):
    return lambda: run(loss, floats(4, 16, 256, dtype=dtype), floats(4, 16, 256, dtype=dtype))


def labels(shape, classes):
    return lambda: run(F.cross_entropy, floats(*shape), torch.zeros(classes, dtype=torch.long))


def batch_and_total(x, y):
    """Sums for each sample and over everything, of rows that are read twice."""
    log_p = x.log_softmax(-1)
    return ((log_p.exp() * y).sum((1, 2)) / y.sum((1, 2))).mean() - (log_p * y).sum()


def ordered(x, y):
    """Sums up to each point, along lanes and for each of them, and at computed places."""
    put = x.new_zeros(2).index_add(0, (x > 0).long().flatten(), y.flatten())
    return x.softmax(-1).cumsum(-1).square().mean() + y.cumsum(1).exp().mean() + put.exp().sum()


def spectra(x, y):
    """Pairs of numbers that are stored side by side."""
    return (torch.fft.rfft(x).abs() - torch.fft.rfft(y.float()).abs()).abs().mean()


def windows(x, y):
    """Many loads around each element, and what is made of them read again."""
    return (F.avg_pool2d(x * y, 3, 1) - F.avg_pool2d(x, 3, 1) * F.avg_pool2d(y, 3, 1)).square().mean()


def chosen(x, y):
    """What masks choose, and how many there are."""
    return (x[y > 0] - y[y > 0]).square().mean() + x[..., y[0, 0] > 0].std()


def few_long_rows(loss):
    return lambda: run(loss, floats(2, 512, 512), floats(2, 512, 512))


KINDS = {
    "batch and total": (both(batch_and_total, torch.float32), (90,)),
    "shared rows": (few_long_rows(batch_and_total), (90,)),
    "windows": (few_long_rows(windows), (80, 90)),
    "elements": (both(robust, torch.bfloat16), (80, 120)),
    "many parts": (lambda: run(robust, *2 * [floats(2048, 4096, dtype=torch.float64)]), (90,)),
    "rows": (labels((64, 1024), 64), (90,)),
    "pixels": (labels((2, 16, 64, 64), (2, 64, 64)), (120,)),
    "columns": (both(overlap, torch.float32), (80,)),
    "batch": (both(instances, torch.float32), (100,)),
    "places": (both(places, torch.float64), (90,)),
    "ordered": (both(ordered, torch.float32), (90,)),
    "chosen": (both(chosen, torch.bfloat16), (90,)),
    "spectra": (both(spectra, torch.float32), (90,)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    launch, architectures = KINDS[kind]
    for architecture in architectures:
        compiled = pretend_driver.install(architecture)
        launch()
        assert len(compiled) >= 3
        for kernel in compiled:
            assert kernel.registers <= 128 and kernel.stack <= STACK, f"{kernel.name} spills in sm_{architecture}"
        if kind in ("elements", "rows", "pixels"):
            assert compiled[0].wide_loads and compiled[-1].wide_loads


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (elementwise.of_one, elementwise.floats(torch.float32)),
        (elementwise.of_two, elementwise.floats(torch.float64)),
        (elementwise.of_whole_numbers, elementwise.whole(torch.uint8)),
    ],
)
def test_operations(function, tensors):
    pretend_driver.install(90)
    run(function, *tensors)


def test_sizes_and_numbers_need_no_other_kernel():
    """Only whether sizes are divisible by 16 does, as wide loads go by it."""
    compiled = pretend_driver.install(90)
    loss = fuse(lambda x, y, width=1.0: (torch.log1p((x - y).abs() / width) * width).mean(), strict=True)
    for shape, width in [((64, 48), 1.0), ((128, 96), 0.5), ((16, 4096), 3.0)]:
        loss(torch.zeros(shape), torch.zeros(shape), width)
    assert len(compiled) == 6 and len({kernel.ptx for kernel in compiled}) == 2
    loss(torch.zeros(63, 47), torch.zeros(63, 47), 1.0)
    assert len({kernel.ptx for kernel in compiled}) == 3


def test_a_second_call_launches_what_the_first_did():
    """Past Triton's own choice of a kernel, with the arguments that it would pass."""
    pretend = pretend_driver.use(90)
    loss = fuse(lambda x, y, width=1.0: (torch.log1p((x - y).abs() / width) * width).mean(), strict=True)
    x, y = floats(64, 48), torch.zeros(64, 48)
    steps = []
    for width in (1.5, 1.5, 0.5):
        loss(x, y, width).backward()
        steps.append([(kernel, list(map(told_apart, arguments))) for kernel, arguments in pretend.launched])
        pretend.launched.clear()
    assert len(steps[0]) == 3 and steps[0] == steps[1]
    halved = [(kernel, [0.5 if a == 1.5 else a for a in arguments]) for kernel, arguments in steps[0]]
    assert steps[2] == halved != steps[0]


def told_apart(argument):
    return (argument.shape, argument.stride(), argument.dtype) if isinstance(argument, torch.Tensor) else argument


def test_a_pointer_between_two_packs_has_another_kernel():
    pretend = pretend_driver.use(90)
    loss, memory = fuse(lambda x, y: (x - y).abs().sum(), strict=True), torch.zeros(64 * 48 + 1)
    for start in (0, 1, 0, 1):
        loss(memory[start:][: 64 * 48], torch.zeros(64 * 48))
    first, second, *again = [pretend.launched[k][0] for k in range(0, 8, 2)]
    assert first != second and again == [first, second]
