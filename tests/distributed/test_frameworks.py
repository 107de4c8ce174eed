"""Models that Trainer trains, and that DeepSpeed and Accelerate shard, get the gradients of one process."""

import os
import tempfile
import warnings
from contextlib import contextmanager, redirect_stdout
from io import StringIO

import pytest
import torch
import torch.distributed as dist
from ranks import run_cases
from tiny import CLASSES, WIDTH, batch, check, counted, expected, llama, loss_of_rank, own_rows, tiny

import fused_losses
from fused_losses.functional import linear_cross_entropy

pytestmark = pytest.mark.frameworks
PATIENCE = 300  # seconds; every rank imports all of the frameworks


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


def trainer_gradients(model, accumulation, **options):
    """The gradients that Trainer's optimizer sees after one step over the whole batch."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": tokens, "labels": labels} for tokens, labels in zip(*batch())]
    arguments = {
        "per_device_train_batch_size": len(rows) // accumulation // dist.get_world_size(),
        "gradient_accumulation_steps": accumulation,
    }
    smoothing = options.pop("label_smoothing_factor", 0.0)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=1,
            max_grad_norm=0.0,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            label_smoothing_factor=smoothing,
            **arguments,
        )
        assert settings.world_size == dist.get_world_size()
        optimizer = RememberingSGD(model.parameters(), lr=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        trainer = Trainer(model, settings, train_dataset=rows, optimizers=(optimizer, schedule), **options)
        with redirect_stdout(StringIO()):  # the log of its step
            trainer.train()
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, optimizer.gradients))


class RememberingSGD(torch.optim.SGD):
    def step(self, closure=None):
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def trainer():
    from fused_losses.integrations.trainer import CausalLMLoss

    truth = expected(llama(fused=False), *batch())
    for accumulation in (1, 4):
        check(trainer_gradients(llama(fused=False), accumulation), truth)
        check(trainer_gradients(llama(), accumulation), truth)
        check(trainer_gradients(llama(fused=False), accumulation, compute_loss_func=CausalLMLoss()), truth)
        model = llama(fused=False)
        model.loss_function = CausalLMLoss()
        check(trainer_gradients(model, accumulation), truth)


def trainer_ignores_its_label_smoothing():
    from fused_losses.integrations.trainer import CausalLMLoss

    smoothed = trainer_gradients(llama(fused=False), 4, label_smoothing_factor=0.1)
    with pytest.warns(UserWarning, match=r"ignores label_smoothing_factor=0.1.*CausalLMLoss\(label_smoothing=0.1\)"):
        plain = trainer_gradients(llama(fused=False), 4, label_smoothing_factor=0.1, compute_loss_func=CausalLMLoss())
    check(plain, expected(llama(fused=False), *batch()))
    same = {"compute_loss_func": CausalLMLoss(label_smoothing=0.1), "label_smoothing_factor": 0.1}
    check(trainer_gradients(llama(fused=False), 4, **same), smoothed, 2e-6)
    check(trainer_gradients(fused_losses.fuse_lm_head(llama(fused=False), label_smoothing=0.1), 4), smoothed, 2e-6)
    # Trainer then smooths by itself, from logits that a fused model makes for it.
    check(trainer_gradients(llama(), 4, label_smoothing_factor=0.1), smoothed, 2e-6)


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


TRAINER = [trainer, trainer_ignores_its_label_smoothing]


def test_on_one_rank():
    run_cases(TRAINER, 1, timeout=PATIENCE)


def test_on_two_ranks():
    run_cases([*TRAINER, accelerate_fsdp2, zero_2, zero_3, zero_3_leaves_empty_weights], 2, timeout=PATIENCE)
