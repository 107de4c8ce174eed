"""The causal-LM loss for Trainer, called as Trainer and models call it."""

import copy
import pickle

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

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


def test_is_a_models_loss_function():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": CLASSES, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
    tokens = torch.randint(CLASSES, (2, 7))
    expected = model(input_ids=tokens, labels=tokens, num_items_in_batch=5).loss
    model.loss_function = CausalLMLoss()
    torch.testing.assert_close(model(input_ids=tokens, labels=tokens, num_items_in_batch=5).loss, expected)
