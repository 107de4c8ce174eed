"""Models in parallel get the gradients of one process: DDP, FSDP of both kinds, tensor and context parallel."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_cases
from tiny import (
    CLASSES,
    WIDTH,
    Block,
    TinyModel,
    batch,
    check,
    counted,
    expected,
    llama,
    loss_of_rank,
    own_rows,
    relative_error,
    shifted,
    tiny,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fused_losses import LinearCrossEntropyHead
from fused_losses.functional import linear_cross_entropy, vocab_parallel_linear_cross_entropy

WAY_OUT = "replace the head with fused_losses.LinearCrossEntropyHead"


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# Replicated: DDP


def ddp(model, left_out=0, steps=1, **options):
    tokens, labels = batch(left_out)
    truth = expected(model, tokens, labels)
    wrapped = DistributedDataParallel(model, **options)
    for _ in range(steps):
        wrapped.zero_grad()
        loss_of_rank(wrapped, own_rows(tokens), own_rows(labels), counted(labels)).backward()
    check(gradients(model), truth)


def ddp_plain():
    ddp(tiny())
    ddp(tiny(tied=True))


def ddp_static_graph():
    ddp(tiny(tied=True), steps=3, static_graph=True)


def ddp_finds_unused_parameters():
    model = tiny()
    ddp(model, steps=2, find_unused_parameters=True)
    assert all(parameter.grad is not None for parameter in model.parameters())


def ddp_with_a_rank_whose_labels_are_all_ignored():
    rows = len(own_rows(batch()[0]))
    ddp(tiny(), left_out=rows)
    ddp(tiny(tied=True), left_out=rows, find_unused_parameters=True)


def ddp_accumulates():
    for model in (tiny(), tiny(tied=True)):
        tokens, labels = batch()
        truth = expected(model, tokens, labels)
        wrapped = DistributedDataParallel(model)
        first, second = zip(own_rows(tokens).chunk(2), own_rows(labels).chunk(2))
        with wrapped.no_sync():
            loss_of_rank(wrapped, *first, counted(labels)).backward()
        loss_of_rank(wrapped, *second, counted(labels)).backward()
        check(gradients(model), truth)


def ddp_transformers():
    ddp(llama())
    ddp(llama(tied=True), steps=2, static_graph=True)
    ddp(llama(), find_unused_parameters=True)


# Sharded: FSDP


def fsdp1(model, *units):
    tokens, labels = batch()
    truth = expected(model, tokens, labels)
    policy = ModuleWrapPolicy(set(units))
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    loss_of_rank(wrapped, own_rows(tokens), own_rows(labels), counted(labels)).backward()
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        named = ((name.replace("_fsdp_wrapped_module.", ""), p.grad) for name, p in wrapped.named_parameters())
        check({name: gradient.clone() for name, gradient in named}, truth)
    return wrapped


def fsdp1_root_unit():
    fsdp1(tiny(), Block)
    fsdp1(tiny(tied=True), Block)


def fsdp1_own_unit():
    fsdp1(tiny(), Block, LinearCrossEntropyHead)


def fsdp1_transformers():
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    fsdp1(llama(), LlamaDecoderLayer)
    fsdp1(llama(tied=True), LlamaDecoderLayer)
    fsdp1(llama(), LlamaDecoderLayer, LinearCrossEntropyHead)


def fsdp2(model, *units, **policy):
    tokens, labels = batch()
    truth = expected(model, tokens, labels)
    for unit in (*units, model):
        fully_shard(unit, **policy)
    loss_of_rank(model, own_rows(tokens), own_rows(labels), counted(labels)).backward()
    found = {name: None if g is None else g.full_tensor() for name, g in gradients(model).items()}
    return found, truth


def fsdp2_own_unit():
    model = tiny()
    check(*fsdp2(model, *model.blocks, model.lm_head))


def fsdp2_root_unit():
    model = tiny()
    check(*fsdp2(model, *model.blocks))


def fsdp2_tied():
    model = tiny(tied=True)
    check(*fsdp2(model, *model.blocks))
    model = tiny(tied=True)
    check(*fsdp2(model, *model.blocks, [model.embedding, model.lm_head]))


def fsdp2_in_bf16_is_as_exact_as_torch():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = tiny()
    ours, truth = fsdp2(model, *model.blocks, model.lm_head, mp_policy=policy)
    model = TinyModel(head=HeadWithLogits)
    model.load_state_dict(tiny().state_dict())
    theirs, _ = fsdp2(model, *model.blocks, model.lm_head, mp_policy=policy)
    for name in truth:
        assert relative_error(ours[name], truth[name]) <= 1.5 * relative_error(theirs[name], truth[name]), name


class HeadWithLogits(nn.Linear):
    """The loss as it is without us."""

    def forward(self, input, labels=None, normalizer=None):
        logits = super().forward(input)
        if labels is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") / normalizer


def fsdp2_transformers():
    model = llama()
    check(*fsdp2(model, *model.model.layers, model.lm_head))
    model = llama(tied=True)
    check(*fsdp2(model, *model.model.layers))


# Split: tensor and context parallel


class SplitHead(LinearCrossEntropyHead):
    def forward(self, input, labels=None, **options):
        if labels is None:
            return super().forward(input)
        return vocab_parallel_linear_cross_entropy(input, self.weight, labels, **options)


def tensor_parallel():
    torch.manual_seed(0)
    model, (tokens, labels) = TinyModel(head=SplitHead), batch()
    truth = expected(model, tokens, labels)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
    model(input_ids=tokens, labels=labels, num_items_in_batch=counted(labels))["loss"].backward()
    found = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients(model).items()}
    check(found, truth)


def context_parallel_with(model):
    tokens, labels = batch()
    truth, mesh = expected(model, tokens, labels), init_device_mesh("cpu", (dist.get_world_size(),))
    wrapped = DistributedDataParallel(model)
    total, shift_labels = counted(labels), shifted(labels)
    with context_parallel(mesh, buffers=[tokens, labels, shift_labels], buffer_seq_dims=[1, 1, 1]):
        options = {"shift_labels": shift_labels, "num_items_in_batch": total / dist.get_world_size()}
        wrapped(input_ids=tokens, labels=labels, **options)["loss"].backward()
    check(gradients(model), truth)


def context_parallel_shifted_labels():
    context_parallel_with(tiny())


def context_parallel_transformers():
    context_parallel_with(llama(layers=0))  # attention over ranks needs a GPU


# What cannot work says so


def sharded_weights_outside_of_their_module():
    hidden, labels = torch.zeros(4, WIDTH), torch.zeros(4).long()
    model = tiny()
    for unit in (*model.blocks, model):
        fully_shard(unit)
    with pytest.raises(RuntimeError, match=f"is a DTensor.*{WAY_OUT}"):
        linear_cross_entropy(hidden, model.lm_head.weight, labels)
    with pytest.raises(RuntimeError, match=f"is a DTensor.*{WAY_OUT}"):
        model.lm_head(hidden, labels)  # the unit of its weight is the model
    model = FullyShardedDataParallel(tiny(), use_orig_params=True, device_id=torch.device("cpu"))
    weight = model.module.lm_head.weight
    assert weight.shape != (CLASSES, WIDTH)
    with pytest.raises(RuntimeError, match=WAY_OUT):
        linear_cross_entropy(hidden, weight, labels)


CASES = [
    ddp_plain,
    ddp_static_graph,
    ddp_finds_unused_parameters,
    ddp_with_a_rank_whose_labels_are_all_ignored,
    ddp_accumulates,
    fsdp1_root_unit,
    fsdp1_own_unit,
    fsdp2_own_unit,
    fsdp2_root_unit,
    fsdp2_tied,
    fsdp2_in_bf16_is_as_exact_as_torch,
    tensor_parallel,
    context_parallel_shifted_labels,
    sharded_weights_outside_of_their_module,
]
TRANSFORMERS = [ddp_transformers, fsdp1_transformers, fsdp2_transformers, context_parallel_transformers]


def test_on_two_ranks():
    run_cases(CASES + TRANSFORMERS, 2)


def test_on_four_ranks():
    run_cases(CASES, 4)
