"""Models that DeepSpeed and Accelerate shard get the gradients of one process."""

import os
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from ranks import run_cases
from tiny import CLASSES, WIDTH, batch, check, counted, expected, llama, loss_of_rank, own_rows, tiny

from fused_losses.functional import linear_cross_entropy

pytestmark = pytest.mark.frameworks


@contextmanager  # also a decorator
def deepspeeds_own_warnings():
    """About torch's collectives, that it calls by their older names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        yield


def deepspeed_engine(model, stage):
    """The engine, that shards what is above 0 elements and keeps parameters as they are."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile for a minute; gloo will do
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    # Buckets of gigabytes are the default.
    small = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000, "stage3_prefetch_bucket_size": 10_000}
    settings = {
        "train_micro_batch_size_per_gpu": len(own_rows(batch()[0])),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False, **small},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


@deepspeeds_own_warnings()
def zero(model, stage):
    from deepspeed.utils import safe_get_full_grad

    tokens, labels = batch()
    truth = expected(model, tokens, labels)
    engine = deepspeed_engine(model, stage)
    engine.backward(loss_of_rank(engine, own_rows(tokens), own_rows(labels), counted(labels)))
    check({name: safe_get_full_grad(parameter) for name, parameter in model.named_parameters()}, truth)


def zero_2():
    for model in (tiny(), tiny(tied=True), llama()):
        zero(model, 2)


def zero_3():
    for model in (tiny(), tiny(tied=True), llama(), llama(tied=True)):
        zero(model, 3)


@deepspeeds_own_warnings()
def zero_3_leaves_empty_weights():
    model = tiny()
    deepspeed_engine(model, 3)
    hidden, labels = torch.zeros(4, WIDTH), torch.zeros(4).long()
    with pytest.raises(RuntimeError, match=rf"is empty.*\({CLASSES}, {WIDTH}\).*fused_losses.LinearCrossEntropyHead"):
        linear_cross_entropy(hidden, model.lm_head.weight, labels)


def accelerate_fsdp2():
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    for tied in (False, True):
        model, (tokens, labels) = llama(tied), batch()
        truth = expected(model, tokens, labels)
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == dist.get_world_size()
        # On a CPU Accelerator does not choose FSDP by itself.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        model = fsdp2_prepare_model(accelerator, model)
        loss_of_rank(model, own_rows(tokens), own_rows(labels), counted(labels)).backward()
        check({name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}, truth)


def test_on_two_ranks():
    run_cases([accelerate_fsdp2, zero_2, zero_3, zero_3_leaves_empty_weights], 2)
