"""The causal-LM loss for Trainer, called as Trainer and models call it."""

import copy
import pickle

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from fused_losses import fuse_lm_head
from fused_losses.integrations.trainer import CausalLMLoss

CLASSES = 50


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, CLASSES, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(CLASSES, (3, 9), generator=generator)
    labels[0, :4] = -100
    return logits, labels


def both(logits, labels, **options):
    """Loss and gradient, of ours and of transformers'."""
    results = []
    for loss_function in (CausalLMLoss(), ForCausalLMLoss):
        loss = loss_function(logits=logits, labels=labels, vocab_size=CLASSES, **options)
        results.append((loss, *torch.autograd.grad(loss, logits)))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [None, 17, torch.tensor(17), torch.tensor(17.0)])
def test_is_the_loss_of_transformers(dtype, count):
    ours, theirs = both(*batch(dtype), num_items_in_batch=count)
    torch.testing.assert_close(ours, theirs, check_dtype=False)  # theirs is fp32 for fp64, too
    assert ours[0].dtype is torch.promote_types(dtype, torch.float32)


def test_takes_shifted_labels_and_what_models_pass_on():
    logits, labels = batch()
    ours, theirs = both(logits, labels, shift_labels=labels.roll(2, dims=1), cache_position=None)
    torch.testing.assert_close(ours, theirs)
    (shifted, _), (unshifted, _) = both(logits, labels.roll(2, dims=1))[0], ours
    assert shifted != unshifted


@pytest.mark.parametrize("wrapped", [lambda x: x, lambda x: {"logits": x}, lambda x: (x, None)])
def test_takes_outputs_of_models(wrapped):
    logits, labels = batch()
    loss = CausalLMLoss(z_loss=1e-2)
    torch.testing.assert_close(loss(wrapped(logits), labels), loss(logits, labels, shift_labels=None))


def test_may_be_changed_in_place():
    for count in (None, 17):
        logits, labels = batch()
        loss = CausalLMLoss()(logits, labels, num_items_in_batch=count)
        expected = torch.autograd.grad(loss * 2 / 5, logits, retain_graph=True)[0]
        loss *= 2
        loss /= 5
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


def test_labels_are_needed():
    with pytest.raises(ValueError, match="needs labels or shift_labels"):
        CausalLMLoss()(batch()[0], None, num_items_in_batch=3)


def test_copies_and_pickles():
    loss = CausalLMLoss(label_smoothing=0.1, softcap=3.0)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(other(*batch()), loss(*batch()))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": CLASSES, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))


def test_is_a_models_loss_function():
    model = llama()
    tokens = torch.randint(CLASSES, (2, 7))
    expected = model(input_ids=tokens, labels=tokens, num_items_in_batch=5).loss
    model.loss_function = CausalLMLoss()
    torch.testing.assert_close(model(input_ids=tokens, labels=tokens, num_items_in_batch=5).loss, expected)


@pytest.mark.frameworks
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_fused_model_is_evaluated(tmp_path):
    """Trainer gathers tensors only, so predictions are made of the logits before."""
    from transformers import Trainer, TrainingArguments

    class Evaluating(Trainer):
        def prediction_step(self, *arguments, **options):
            loss, logits, labels = super().prediction_step(*arguments, **options)
            return loss, None if logits is None else logits.argmax(dim=-1), labels

    def accuracy(results):
        return {"accuracy": (results.predictions[:, :-1] == results.label_ids[:, 1:]).mean().item()}

    rows = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(CLASSES, (6, 9))]
    settings = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, report_to=[])
    for metrics in (None, accuracy):
        kinds = fuse_lm_head(llama()), llama()
        ours, theirs = (
            Evaluating(model, settings, eval_dataset=rows, compute_metrics=metrics).evaluate() for model in kinds
        )
        for name in ("eval_loss", "eval_accuracy")[: 1 if metrics is None else 2]:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
