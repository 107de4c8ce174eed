"""Lightning trains with our losses as with torch's: automatic and manual optimisation, accumulation, bf16."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from fused_losses import CrossEntropyLoss, LinearCrossEntropyHead

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's use of torch's trees
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # Lightning's advice
]
ROWS, WIDTH, CLASSES = 16, 6, 5


def rows():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, WIDTH, generator=generator)
    return list(zip(inputs, torch.randint(CLASSES, (ROWS,), generator=generator)))


class HeadWithLogits(nn.Linear):
    def forward(self, input, labels):
        return F.cross_entropy(super().forward(input), labels)


def module(head, loss):
    """A classifier whose head gives the loss, or, with a loss, the logits for it."""
    import pytorch_lightning as lightning

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head, self.loss = nn.Linear(WIDTH, 8), head(8, CLASSES), loss

        def training_step(self, batch, index):
            inputs, labels = batch
            hidden = torch.tanh(self.body(inputs))
            loss = self.head(hidden, labels) if self.loss is None else self.loss(self.head(hidden), labels)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Classifier()


def trained(head, loss, folder, **options):
    import pytorch_lightning as lightning

    model = module(head, loss)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "default_root_dir": folder}
    trainer = lightning.Trainer(max_epochs=2, **quiet, **options)
    trainer.fit(model, DataLoader(rows(), batch_size=4))
    return list(model.parameters()), trainer.callback_metrics["loss"]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_trains_as_with_torch(options, tmp_path):
    tolerance = 1e-2 if "precision" in options else 1e-6
    theirs = trained(HeadWithLogits, None, tmp_path, **options)
    losses = (LinearCrossEntropyHead, None), (nn.Linear, CrossEntropyLoss(backend="cpp"))
    for head, loss in losses:
        ours = trained(head, loss, tmp_path, **options)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
