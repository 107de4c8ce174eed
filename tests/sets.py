"""The specs that tests loop over."""

import pytest
import torch

from fused_losses.specs import SPECS

# Losses of a prediction and a target alone, of any shape; the others take a head or a second model, too.
PAIRS = [spec for spec in SPECS if spec.family in ("pointwise", "softmax")]
DROP_INS = [spec for spec in PAIRS if spec.original]


def each(specs):
    return pytest.mark.parametrize("spec", specs, ids=lambda spec: spec.name)


each_spec, each_pair, each_drop_in = each(SPECS), each(PAIRS), each(DROP_INS)


def dtypes_in_turn(samples):
    """Each sample with two dtypes, fp32 and one of the others: for kernels that run as slowly as emulation does."""
    others = (torch.bfloat16, torch.float64, torch.float16)
    return [(sample, (torch.float32, others[k % 3])) for k, sample in enumerate(samples)]
