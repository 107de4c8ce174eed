"""A vocabulary split over ranks gives what one process with the whole head gives, on 2 and 4 ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from ranks import run_cases
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fused_losses.functional import linear_cross_entropy, vocab_parallel_linear_cross_entropy
from fused_losses.testing.accuracy import compare

FEATURES, CLASSES, ROWS = 16, 53, 100
SIZES = {2: (30, 23), 4: (17, 0, 26, 10)}
PER_CLASS = torch.linspace(0.3, 2.0, CLASSES, dtype=torch.float64)
PER_ROW = torch.linspace(0.0, 2.0, ROWS, dtype=torch.float64)
SEVERAL_CHUNKS = {"max_workspace_mb": 1e-3}
EVERY = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "temperature": 2.0, "weight": PER_CLASS}
OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    SEVERAL_CHUNKS,
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.3, "weight": PER_CLASS, "reduction": "none"},
    {"z_loss": 1e-2},
    {"softcap": 3.0},
    {"temperature": 0.5},
    {"weight": PER_CLASS},
    {"sample_weight": PER_ROW},
    {"normalizer": 7.0},
    {"ignore_index": 3},
    {**EVERY, **SEVERAL_CHUNKS, "sample_weight": PER_ROW},
    {**EVERY, **SEVERAL_CHUNKS, "sample_weight": PER_ROW, "reduction": "none"},
    {**EVERY, "sample_weight": PER_ROW, "normalizer": 11.0},
]
DTYPES = torch.float64, torch.float32, torch.bfloat16


def tensors(rows=ROWS, classes=CLASSES, ignored=True):
    """Hidden states, the whole weight, labels and the whole bias, in fp64."""
    generator = torch.Generator().manual_seed(rows + classes)
    input, weight = (torch.randn(n, FEATURES, generator=generator, dtype=torch.float64) for n in (rows, classes))
    labels = torch.randint(classes, (rows,), generator=generator)
    if ignored:
        labels[::6] = -100
    return input / math.sqrt(FEATURES), weight, labels, torch.randn(classes, generator=generator, dtype=torch.float64)


def own(sizes):
    start = sum(sizes[: dist.get_rank()])
    return slice(start, start + sizes[dist.get_rank()])


def the_sizes():
    return SIZES[dist.get_world_size()]


def leaf(tensor, dtype, needed=True):
    return tensor.detach().to(dtype).requires_grad_(needed)


def in_dtype(options, dtype):
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def upstream_of(loss, scale=1.0):
    """A gradient that differs by row; that of a scalar is a power of two."""
    return torch.linspace(-1.0, 2.0, loss.numel(), dtype=loss.dtype) if loss.ndim else loss.new_tensor(scale)


def local_results(whole, options, dtype, needs=(True, True, True), backend="reference"):
    """Loss and gradients of one process."""
    input, weight, labels, bias = whole
    head = [leaf(tensor, dtype, need) for tensor, need in zip((input, weight, bias), needs)]
    options = {k: v for k, v in in_dtype(options, dtype).items() if k != "max_workspace_mb"}
    loss = linear_cross_entropy(*head[:2], labels, linear_bias=head[2], backend=backend, **options)
    loss.backward(upstream_of(loss, 0.5))
    return [loss, *(tensor.grad for tensor in head)]


def split_results(whole, options, dtype, sizes=None, needs=(True, True, True), **more):
    """Loss and gradients of the split head: this rank's of weight and bias."""
    input, weight, labels, bias = whole
    rows = own(sizes or the_sizes())
    head = [leaf(tensor, dtype, need) for tensor, need in zip((input, weight[rows], bias[rows]), needs)]
    options = in_dtype(options, dtype)
    loss = vocab_parallel_linear_cross_entropy(*head[:2], labels, linear_bias=head[2], **options, **more)
    loss.backward(upstream_of(loss, 0.5))
    return [loss, *(tensor.grad for tensor in head)]


def of_rank(results, sizes=None):
    """What a rank must get of one process's results."""
    rows = own(sizes or the_sizes())
    loss, of_input, of_weight, of_bias = results
    return loss, of_input, *(None if g is None else g[rows] for g in (of_weight, of_bias))


def check(results, whole, options, dtype, needs=(True, True, True), sizes=None, budget="reference"):
    """Within the accuracy that every loss promises, and the same bits on every rank where it is the same tensor.

    ``budget`` is the backend whose error in this dtype is the budget.
    """
    theirs = of_rank(local_results(whole, options, dtype, needs, budget), sizes)
    truth = of_rank(local_results(whole, options, torch.float64, needs), sizes)
    same = [tensor is None or same_on_all_ranks(tensor) for tensor in results[:2]]
    wrong = [] if all(same) else [f"ranks differ in loss or gradient of input: {same}"]
    names = "loss", "gradient of input", "gradient of weight", "gradient of bias"
    for name, result, other, expected in zip(names, results, theirs, truth):
        if expected is None or expected.numel() == 0:
            wrong += [] if (result is None) == (expected is None) else [f"{name}: {result} instead of {expected}"]
            continue
        comparison = compare(result, other, expected)
        wrong += [] if comparison.ok else [f"{name}: {comparison}"]
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, wrong)
    assert not any(of_ranks), f"{options}, {dtype}: {of_ranks}"  # on all ranks, so that none waits for another


def same_on_all_ranks(tensor):
    everywhere = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, tensor.detach().contiguous())
    return all(torch.equal(tensor.nan_to_num(-1.0), other.nan_to_num(-1.0)) for other in everywhere)


def every_option():
    for options in OPTIONS:
        for dtype in DTYPES:
            whole = tensors(ignored="ignore_index" not in options)
            check(split_results(whole, options, dtype), whole, options, dtype)


def many_rows_and_classes_keep_their_digits():
    """Held to one process's own kernels: sums over so many classes are the matrix library's, of one or the other."""
    sizes = even(3000)
    for dtype in DTYPES:
        for options in ({}, {"label_smoothing": 0.1, "z_loss": 1e-4}):
            whole = tensors(700, 3000)
            results = split_results(whole, options, dtype, sizes)
            check(results, whole, options, dtype, sizes=sizes, budget=None)


def the_input_gradient_loses_nothing_to_the_sum_over_ranks():
    """Summed in bf16, its error would be 1.2 times that of one process on 2 ranks, and 1.4 times on 4."""
    whole = [t.bfloat16().double() if t.is_floating_point() else t for t in tensors(700, 3000)]
    truth = local_results(whole, {}, torch.float64)[1]
    ours = split_results(whole, {}, torch.bfloat16, even(3000))[1]
    theirs = local_results(whole, {}, torch.bfloat16, backend=None)[1]
    error, of_one_process = ((gradient - truth).square().mean().sqrt() for gradient in (ours, theirs))
    assert error < 1.1 * of_one_process


def even(classes):
    return [len(rows) for rows in torch.arange(classes).chunk(dist.get_world_size())]


def the_reference_backend():
    for options in ({}, EVERY, {"reduction": "none"}):
        results = split_results(tensors(), options, torch.float32, backend="reference")
        check(results, tensors(), options, torch.float32)


def learnt_sample_weights():
    ours, theirs = leaf(PER_ROW, torch.float64), leaf(PER_ROW, torch.float64)
    input, weight, labels, _ = tensors()
    vocab_parallel_linear_cross_entropy(input, weight[own(the_sizes())], labels, sample_weight=ours).backward()
    linear_cross_entropy(input, weight, labels, sample_weight=theirs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def leading_dimensions_and_one_row():
    input, weight, labels, _ = tensors()
    rows = own(the_sizes())
    shaped = vocab_parallel_linear_cross_entropy(
        input.view(4, 25, -1), weight[rows], labels.view(4, 25), reduction="none"
    )
    torch.testing.assert_close(shaped, linear_cross_entropy(input, weight, labels, reduction="none").view(4, 25))
    one = vocab_parallel_linear_cross_entropy(input[1], weight[rows], labels[1])
    torch.testing.assert_close(one, linear_cross_entropy(input[1], weight, labels[1]))


def no_rows():
    rows = own(the_sizes())
    input, weight, labels, bias = tensors()
    head = [leaf(t, torch.float32) for t in (input[:0], weight[rows], bias[rows])]
    loss = vocab_parallel_linear_cross_entropy(*head[:2], labels[:0], linear_bias=head[2], normalizer=1.0)
    loss.backward()
    assert loss == 0.0 and all((t.grad == 0).all() for t in head)


def all_ignored():
    input, weight, labels, bias = tensors()
    whole = input, weight, torch.full_like(labels, -100), bias
    loss, *gradients = split_results(whole, {}, torch.float32)
    assert loss.isnan() and all((g == 0).all() for g in gradients)
    loss, *gradients = split_results(whole, {**EVERY, "normalizer": 1.0}, torch.float32)
    assert loss == 0.0 and all((g == 0).all() for g in gradients)
    loss, *gradients = split_results(whole, {**EVERY, "reduction": "none"}, torch.float32)
    assert (loss == 0.0).all() and all((g == 0).all() for g in gradients)


def ignored_rows_of_nan():
    for options in ({}, {**EVERY, **SEVERAL_CHUNKS}, {"reduction": "none"}):
        input, weight, labels, bias = tensors()
        if "weight" in options:
            labels[6:] = labels[6:].clamp(min=0)  # so few that they stay among the others
        input[labels == -100] = float("nan")
        loss, of_input, *_ = split_results((input, weight, labels, bias), options, torch.float32)
        assert loss.isfinite().all() and (of_input[labels == -100] == 0).all()
        assert of_input.isfinite().all()


def labels_of_one_rank_only():
    first = the_sizes()[0]
    input, weight, labels, bias = tensors()
    whole = input, weight, labels.where(labels == -100, labels % first), bias
    for options in ({}, EVERY):
        check(split_results(whole, options, torch.float32), whole, options, torch.float32)


def frozen_tensors():
    for options in ({}, {"reduction": "none"}):
        for needs in ((False, True, True), (True, False, False), (False, False, True), (True, True, False)):
            results = split_results(tensors(), options, torch.float32, needs=needs)
            check(results, tensors(), options, torch.float32, needs)


def without_gradients():
    input, weight, labels, _ = tensors()
    shard = weight[own(the_sizes())].requires_grad_()
    with torch.no_grad():
        loss = vocab_parallel_linear_cross_entropy(input, shard, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(input, weight, labels))


def a_second_backward():
    for reduction in ("mean", "none"):
        input, weight, labels, _ = tensors()
        head = leaf(input, torch.float32), leaf(weight[own(the_sizes())], torch.float32)
        loss = vocab_parallel_linear_cross_entropy(*head, labels, reduction=reduction, **SEVERAL_CHUNKS)
        first, second = (
            torch.autograd.grad(loss, head, upstream_of(loss, scale), retain_graph=True) for scale in (1.0, 4.0)
        )
        factor = 1.0 if reduction == "none" else 4.0
        assert all(torch.equal(factor * a, b) for a, b in zip(first, second))


def upstream_may_be_vectorised():
    input, weight, labels, _ = tensors()
    head = leaf(input, torch.float64), leaf(weight[own(the_sizes())], torch.float64)
    for reduction in ("sum", "none"):
        loss = vocab_parallel_linear_cross_entropy(*head, labels, reduction=reduction)
        upstream = torch.stack([upstream_of(loss), 2.0 * upstream_of(loss)])
        one, two = torch.autograd.grad(loss, head, upstream, is_grads_batched=True)[0]
        torch.testing.assert_close(2.0 * one, two)


def the_gradient_of_the_gradient_raises():
    for backend in (None, "reference"):
        input, weight, labels, _ = tensors()
        shard = weight[own(the_sizes())].requires_grad_()
        loss = vocab_parallel_linear_cross_entropy(input, shard, labels, backend=backend)
        with pytest.raises(RuntimeError, match=r"first derivatives only.*use linear_cross_entropy"):
            torch.autograd.grad(loss, shard, create_graph=True)


def transforms_raise():
    input, weight, labels, _ = tensors()
    shard = weight[own(the_sizes())]
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        torch.func.grad(lambda x: vocab_parallel_linear_cross_entropy(x, shard, labels))(input)


def peaked_rows():
    """p = 1 - 1e-6 at the label, which any of the ranks holds, while another rank holds the rest."""
    values = torch.full((4, CLASSES), -60.0, dtype=torch.float64)
    labels, others = torch.tensor([0, CLASSES - 1, 20, 40]), torch.tensor([CLASSES - 1, 0, 45, 2])
    places = torch.arange(4)
    values[places, labels], values[places, others] = 0.0, math.log(1e-6)
    values = values.float().double()
    for options in ({"reduction": "none"}, {"z_loss": 1e-2, "reduction": "sum"}):
        check_logits(values, labels, options)
    # In relative terms, which the reference's own budget does not ask for.
    loss, *_, of_bias = split_results(head_of(values, labels), {"reduction": "none"}, torch.float32)
    expected, *_, of_whole_bias = of_rank(local_results(head_of(values, labels), {"reduction": "none"}, torch.float64))
    assert ((loss - expected) / expected).abs().max() < 1e-6
    assert ((of_bias - of_whole_bias).abs() <= 1e-6 * of_whole_bias.abs() + 1e-20).all()


def large_offsets():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, (4, CLASSES), generator=generator).double() * 2.0
    labels = torch.randint(CLASSES, (4,), generator=generator)
    for offset in (2.0**24, -(2.0**24)):
        for options in ({"reduction": "none"}, {"label_smoothing": 0.1, "reduction": "none"}):
            check_logits(values, labels, options, offset)


def check_logits(values, labels, options, offset=0.0):
    whole = head_of(values, labels, offset)
    check(split_results(whole, options, torch.float32), whole, options, torch.float32)


def head_of(values, labels, offset=0.0):
    """A head that makes given logits (N, V): hidden states pick a column of the weight, the bias is the offset."""
    return torch.eye(len(values)).double(), values.t().contiguous(), labels, values.new_full((CLASSES,), offset)


def infinities_and_nan():
    rows = own(the_sizes())
    input, weight, labels, bias = tensors(ignored=False)
    first = the_sizes()[0]
    labels = labels.where(labels >= first, first + 1)
    for hidden, expected in ((slice(0, first), "finite"), (slice(first, CLASSES - 1), "inf")):
        masked = bias.clone()
        masked[hidden] = float("-inf")  # all of the first rank's classes, or all but one of the others'
        loss = vocab_parallel_linear_cross_entropy(
            input, weight[rows], labels, linear_bias=masked[rows], reduction="none"
        )
        whole = linear_cross_entropy(input, weight, labels, linear_bias=masked, reduction="none", backend="reference")
        torch.testing.assert_close(loss, whole)
        assert loss.isfinite().all() == (expected == "finite")
    for broken in (slice(0, first), slice(2, 3)):
        masked = bias.clone()
        masked[broken] = float("nan")
        arguments = input, weight[rows], labels
        assert vocab_parallel_linear_cross_entropy(*arguments, linear_bias=masked[rows]).isnan()
    everything = torch.full_like(bias, float("-inf"))
    assert vocab_parallel_linear_cross_entropy(input, weight[rows], labels, linear_bias=everything[rows]).isnan()


def the_workspace_changes_nothing():
    losses = [
        split_results(tensors(), {"reduction": "none", "label_smoothing": 0.1, **more}, torch.float32)[0]
        for more in ({}, SEVERAL_CHUNKS, {"max_workspace_mb": 0.6})
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=1e-6)


def ranks_exchange_little():
    """One collective a chunk, one for the input's gradient, none for what nobody asks; one more for plain shards."""
    input, weight, labels, _ = tensors()
    head = leaf(input, torch.float32), leaf(weight[own(the_sizes())], torch.float32)
    with counted() as calls, torch.no_grad():
        vocab_parallel_linear_cross_entropy(*head, labels, **SEVERAL_CHUNKS)
    assert calls == {"all_gather": 1 + 3}, calls  # 83 rows of 100, at most 32 at a time
    with counted() as calls:
        loss = vocab_parallel_linear_cross_entropy(*head, labels, **SEVERAL_CHUNKS)
    assert calls == {"all_gather": 1 + 3, "all_reduce": 1}, calls
    with counted() as calls:
        loss.backward()
    assert calls == {}, calls
    mesh = a_mesh()
    with counted() as calls:
        shard = distribute_tensor(weight.float(), mesh, [Shard(0)]).requires_grad_()
        calls.clear()
        vocab_parallel_linear_cross_entropy(input.float(), shard, labels, **SEVERAL_CHUNKS)
    assert calls == {"all_gather": 3}, calls


class counted:
    """Counts the collectives that are called inside."""

    def __enter__(self):
        self.calls, self.originals = {}, {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}
        for name, original in self.originals.items():
            setattr(dist, name, self._counting(name, original))
        return self.calls

    def _counting(self, name, original):
        def call(*arguments, **options):
            self.calls[name] = self.calls.get(name, 0) + 1
            return original(*arguments, **options)

        return call

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(dist, name, original)


def a_group_of_some_ranks():
    world = dist.get_world_size()
    groups = [dist.new_group([rank, rank + 1]) for rank in range(0, world, 2)]
    group, place = groups[dist.get_rank() // 2], dist.get_rank() % 2
    input, weight, labels, _ = tensors()
    input = input + dist.get_rank() // 2  # groups are replicas with data of their own
    head = leaf(input, torch.float64), leaf((weight[:20], weight[20:])[place], torch.float64)
    loss = vocab_parallel_linear_cross_entropy(*head, labels, group=group)
    loss.backward()
    whole = leaf(input, torch.float64), leaf(weight, torch.float64)
    expected = linear_cross_entropy(*whole, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(head[0].grad, whole[0].grad)
    torch.testing.assert_close(head[1].grad, (whole[1].grad[:20], whole[1].grad[20:])[place])
    if world > 2:
        with pytest.raises(ValueError, match="not in group"):
            vocab_parallel_linear_cross_entropy(*head, labels, group=groups[1 - dist.get_rank() // 2])


def a_mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def dtensors():
    """Uneven, with a replicated input; down to fewer classes than ranks."""
    mesh = a_mesh()
    for classes in (CLASSES, 5, 3):
        input, weight, labels, bias = tensors(classes=classes)
        head = [
            distribute_tensor(t, mesh, [placement]).requires_grad_()
            for t, placement in ((input, Replicate()), (weight, Shard(0)), (bias, Shard(0)))
        ]
        labels_everywhere = distribute_tensor(labels, mesh, [Replicate()])
        loss = vocab_parallel_linear_cross_entropy(*head[:2], labels_everywhere, linear_bias=head[2])
        loss.backward(torch.tensor(0.5, dtype=torch.float64))
        expected = local_results((input, weight, labels, bias), {}, torch.float64)
        torch.testing.assert_close(loss, expected[0])
        for tensor, gradient in zip(head, expected[1:]):
            assert isinstance(tensor.grad, DTensor) and tensor.grad.placements == tensor.placements
            torch.testing.assert_close(tensor.grad.full_tensor(), gradient)


def a_module_with_a_sharded_parameter_trains():
    mesh = a_mesh()
    input, weight, labels, _ = tensors()
    parameter = torch.nn.Parameter(distribute_tensor(weight.float(), mesh, [Shard(0)]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    losses = []
    for _ in range(3):
        loss = vocab_parallel_linear_cross_entropy(input.float(), parameter, labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


def autocast():
    input, weight, labels, _ = tensors()
    head = leaf(input, torch.float32), leaf(weight[own(the_sizes())], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = vocab_parallel_linear_cross_entropy(*head, labels)
    loss.backward()
    assert loss.dtype is torch.float32 and head[0].grad.dtype is torch.float32
    torch.testing.assert_close(loss, linear_cross_entropy(input, weight, labels).float(), rtol=2e-2, atol=2e-2)


def compiled():
    torch._dynamo.reset()
    input, weight, labels, bias = tensors()
    rows = own(the_sizes())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss_of(input, weight, bias):
        return vocab_parallel_linear_cross_entropy(input, weight, labels, linear_bias=bias, label_smoothing=0.1)

    head = [leaf(t, torch.float32) for t in (input, weight[rows], bias[rows])]
    loss_of(*head).backward()
    eager = split_results((input, weight, labels, bias), {"label_smoothing": 0.1}, torch.float32)
    for tensor, gradient in zip(head, eager[1:]):
        torch.testing.assert_close(tensor.grad, 2.0 * gradient)


def operators():
    input, weight, labels, bias = (t.float() if t.is_floating_point() else t for t in tensors())
    rows = own(the_sizes())
    options = (list(the_sizes()), dist.group.WORLD.group_name, -100, 0.1, 0.0, 0.0, 1.0, None, torch.float32, "cpp")
    head = input, weight[rows], bias[rows], labels, None, None
    calls, needs = torch.ops.fused_losses, [True, True, True]
    torch.library.opcheck(calls.vocab_parallel_forward, (*head, *options, needs))
    losses, stats, *_ = calls.vocab_parallel_forward(*head, *options, [False, False, False])
    torch.library.opcheck(calls.vocab_parallel_backward, (losses, *head, stats, *options, needs))


def errors():
    """Each is raised on every rank, so that none is left waiting for another."""
    input, weight, labels, bias = tensors()
    rows, mesh, rank = own(the_sizes()), a_mesh(), dist.get_rank()
    call, shard = vocab_parallel_linear_cross_entropy, weight[rows]

    def raises(kind, match):
        return pytest.raises(kind, match=match)

    with raises(IndexError, f"Target {CLASSES} is out of bounds for {CLASSES} classes"):
        call(input, shard, labels.clone().fill_(CLASSES))
    with raises(RuntimeError, "one value for each of the 53 classes of all ranks"):
        call(input, shard, labels, weight=PER_CLASS[rows])
    with raises(RuntimeError, "every rank must be given the same target"):
        call(input, shard, labels + (labels >= 0) * (rank == 1) * (labels < 2))
    with raises(RuntimeError, r"the same rows of input, got \[100, 99"):
        keep = slice(0, 99) if rank > 0 else slice(0, 100)
        call(input[keep], shard, labels[keep])
    with raises(RuntimeError, r"the same features .*got \[16, 15"):
        width = 16 if rank == 0 else 15
        call(input[:, :width], shard[:, :width], labels)
    with raises(ValueError, "target must have the input's leading dimensions"):
        call(input, shard, labels[:5])
    with raises(RuntimeError, "target must be class indices.*gather the weight"):
        call(input, shard, torch.rand(ROWS, CLASSES))
    with raises(RuntimeError, r"int32: target.long\(\)"):
        call(input, shard, labels.int())
    with raises(RuntimeError, "linear_bias must have the shape"):
        call(input, shard, labels, linear_bias=torch.cat([bias, bias]))
    with raises(RuntimeError, r"placed \(Shard\(dim=0\),\).*got \(Shard\(dim=1\),\).*redistribute"):
        call(input, distribute_tensor(weight, mesh, [Shard(1)]), labels)
    with raises(RuntimeError, r"every rank has all of it.*linear_cross_entropy"):
        call(input, distribute_tensor(weight, mesh, [Replicate()]), labels)
    with raises(RuntimeError, "input must be the same on all ranks.*redistribute"):
        call(distribute_tensor(input, mesh, [Shard(0)]), shard, labels)
    square = init_device_mesh("cpu", (dist.get_world_size() // 2, 2))
    with raises(RuntimeError, "on a mesh of 2 dimensions"):
        call(input, distribute_tensor(weight, square, [Shard(0), Shard(0)]), labels)
    with raises(ValueError, "a DTensor brings its own"):
        call(input, distribute_tensor(weight, mesh, [Shard(0)]), labels, group=dist.new_group())
    with raises(ValueError, "max_workspace_mb must be above 0"):
        call(input, shard, labels, max_workspace_mb=0.0)
    with raises(ValueError, "normalizer divides a mean"):
        call(input, shard, labels, reduction="sum", normalizer=2.0)
    with raises(ValueError, "sample_weight must"):
        call(input, shard, labels, sample_weight=PER_ROW[:3])
    with raises(RuntimeError, "weight must have the logits' dtype"):
        call(input, shard, labels, weight=PER_CLASS.float())
    with raises(RuntimeError, "vocab_parallel_linear_cross_entropy"):
        linear_cross_entropy(input, distribute_tensor(weight, mesh, [Shard(0)]), labels)


CASES = [
    every_option,
    many_rows_and_classes_keep_their_digits,
    the_input_gradient_loses_nothing_to_the_sum_over_ranks,
    the_reference_backend,
    learnt_sample_weights,
    leading_dimensions_and_one_row,
    no_rows,
    all_ignored,
    ignored_rows_of_nan,
    labels_of_one_rank_only,
    frozen_tensors,
    without_gradients,
    a_second_backward,
    upstream_may_be_vectorised,
    the_gradient_of_the_gradient_raises,
    transforms_raise,
    peaked_rows,
    large_offsets,
    infinities_and_nan,
    the_workspace_changes_nothing,
    ranks_exchange_little,
    a_group_of_some_ranks,
    dtensors,
    a_module_with_a_sharded_parameter_trains,
    autocast,
    compiled,
    operators,
    errors,
]


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_case(world_size):
    run_cases(CASES, world_size)


def test_without_a_process_group():
    input, weight, labels, _ = tensors()
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised.*init_process_group"):
        vocab_parallel_linear_cross_entropy(input, weight, labels)
