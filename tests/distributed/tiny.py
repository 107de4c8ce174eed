"""Small language models that fuse their loss, a batch of uneven labels, and the gradients one process gets of it."""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fused_losses

CLASSES, WIDTH, ROWS, LENGTH = 101, 32, 8, 12
IGNORED = -100
CLOSE = 1e-6  # the largest relative error of a gradient, in fp32 against one process in fp64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden):
        return hidden + self.down(torch.tanh(self.up(hidden)))


class TinyModel(nn.Module):
    """Called as a model of transformers is; its head makes logits, or the loss without them."""

    def __init__(self, tied=False, head=fused_losses.LinearCrossEntropyHead):
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = head(WIDTH, CLASSES, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, input_ids, labels=None, shift_labels=None, num_items_in_batch=None):
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        if labels is None:
            return {"logits": self.lm_head(hidden)}
        shift_labels = shifted(labels) if shift_labels is None else shift_labels
        return {"loss": self.lm_head(hidden, shift_labels, normalizer=num_items_in_batch)}


def tiny(tied=False):
    torch.manual_seed(0)
    return TinyModel(tied)


def llama(tied=False, layers=1, fused=True):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": CLASSES, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, num_attention_heads=2, use_cache=False, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config)
    return fused_losses.fuse_lm_head(model) if fused else model


def shifted(labels):
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def batch(left_out=0):
    """Tokens and labels of all ranks; rows have 0, 1, 2, ... labels less, and the first ``left_out`` none."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, CLASSES, (ROWS, LENGTH), generator=generator)
    labels = tokens.clone()
    for row in range(ROWS):
        labels[row, :row] = IGNORED
    labels[:left_out] = IGNORED
    return tokens, labels


def counted(labels):
    return int((labels[:, 1:] != IGNORED).sum())


def own_rows(tensor):
    """This rank's rows."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of_rank(model, tokens, labels, total):
    """The loss whose average over ranks is the mean over all ranks' labels."""
    return model(input_ids=tokens, labels=labels, num_items_in_batch=total / dist.get_world_size())["loss"]


def expected(model, tokens, labels):
    """The gradients that one process gets from all rows with torch's loss, in fp64.

    ``model`` is not sharded yet; it keeps its own parameters.
    """
    model = copy.deepcopy(model).double()
    logits = model(input_ids=tokens)["logits"]
    F.cross_entropy(logits.flatten(0, 1), shifted(labels).flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check(gradients, truth, tolerance=CLOSE):
    """That every gradient is there and close, on every rank."""
    wrong = [f"gradients of {sorted(gradients)} instead of {sorted(truth)}"] if gradients.keys() != truth.keys() else []
    for name in gradients.keys() & truth.keys():
        error = relative_error(gradients[name], truth[name])
        wrong += [] if error <= tolerance else [f"{name}: relative error {error:.1e}"]
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, wrong)
    assert not any(of_ranks), of_ranks  # on all ranks, so that none waits for another


def relative_error(gradient, truth):
    if gradient is None or gradient.shape != truth.shape:
        return float("inf")
    return ((gradient.double() - truth).norm() / truth.norm()).item()
