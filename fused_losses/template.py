"""What ``python -m fused_losses new`` writes: a loss in plain torch, to be fused, and its test."""

from __future__ import annotations

from pathlib import Path

LOSS = '''"""{title}: say here what it measures. It is trained with as ``fused_losses.fuse({title}())``."""

from torch import Tensor, nn


class {title}(nn.Module):
    """One line on the loss; its formula; where it is from.

    Args:
        scale: what the squared error is multiplied by; may be changed between two calls.
        reduction: "mean", "sum" or "none".
    """

    def __init__(self, scale: float = 1.0, reduction: str = "mean"):
        super().__init__()
        self.scale, self.reduction = scale, reduction

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        values = self.scale * (predictions - targets).square()
        if self.reduction == "none":
            return values
        return values.sum() if self.reduction == "sum" else values.mean()
'''
TEST = '''"""{title}: fused as it is written, and right as it is written."""

import pytest
import torch
from {name} import {title}

from fused_losses import fuse
from fused_losses.testing import check_loss

SAMPLES = [tuple(torch.randn(2, *shape)) for shape in ((5, 3), (2, 3, 4))]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_fused_equals_plain(reduction):
    plain = {title}(reduction=reduction)
    loss = fuse({title}(reduction=reduction), strict=True)  # strict: raises where it cannot be fused, and says why
    check_loss(loss, plain, SAMPLES, dtypes=(torch.float32,), checks=["value", "gradient", "double_backward"])


def test_a_known_value():
    value = {title}(scale=2.0)(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(value, torch.tensor(4.0))
'''


def write(name: str, folder: Path) -> tuple[Path, Path]:
    """Writes ``<name>.py`` and ``test_<name>.py``.

    Raises:
        ValueError: if the name is no lower-case identifier.
        FileExistsError: if one of the files is there.
    """
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"a loss is named like a module, as in my_loss; got {name!r}")
    title = "".join(part.capitalize() for part in name.split("_"))
    contents = {folder / f"{name}.py": LOSS, folder / f"test_{name}.py": TEST}
    if there := [str(path) for path in contents if path.exists()]:
        raise FileExistsError(f"{' and '.join(there)} would be overwritten; choose another name or --folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in contents.items():
        path.write_text(text.format(name=name, title=title))
    loss, test = contents
    return loss, test
