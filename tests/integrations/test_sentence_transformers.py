"""A loss of ours as sentence-transformers calls one: loss(features, labels), with the model inside of it."""

import copy

import pytest
import torch
from torch import nn

from fused_losses import CrossEntropyLoss

pytestmark = [pytest.mark.frameworks, pytest.mark.usefixtures("fresh_accelerate")]
WIDTH, CLASSES = 8, 3


class PairLoss(nn.Module):
    """Classifies pairs of sentences by their embeddings and the difference of those."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss, self.classifier = model, loss, nn.Linear(3 * WIDTH, CLASSES)

    def forward(self, features, labels):
        first, second = (self.model(feature)["sentence_embedding"] for feature in features)
        return self.loss(self.classifier(torch.cat([first, second, (first - second).abs()], dim=1)), labels)


def trained(loss, folder):
    """The parameters of model and classifier after three steps of sentence-transformers' trainer."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate("abcdefgh")}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=WIDTH)], device="cpu")
    pairs = PairLoss(model, loss)
    before = copy.deepcopy(pairs.state_dict())
    sentences = ["a b c", "d e", "f g h", "b d f", "a h", "c", "e g", "h f d"]
    rows = {"first": sentences, "second": sentences[::-1], "label": [i % CLASSES for i in range(len(sentences))]}
    settings = SentenceTransformerTrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2, optim="sgd",
        learning_rate=0.5, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    SentenceTransformerTrainer(model, settings, train_dataset=Dataset.from_dict(rows), loss=pairs).train()
    assert not any(tensor.equal(before[name]) for name, tensor in pairs.state_dict().items())
    return dict(pairs.named_parameters())


def test_trains_as_with_torch(tmp_path):
    theirs, ours = (trained(loss, tmp_path) for loss in (nn.CrossEntropyLoss(), CrossEntropyLoss(backend="cpp")))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
