"""The specs that tests loop over."""

import pytest

from fused_losses.specs import SPECS

# Losses of a prediction and a target alone, of any shape; the others take a head or a second model, too.
PAIRS = [spec for spec in SPECS if spec.family in ("pointwise", "softmax")]
DROP_INS = [spec for spec in PAIRS if spec.original]


def each(specs):
    return pytest.mark.parametrize("spec", specs, ids=lambda spec: spec.name)


each_spec, each_pair, each_drop_in = each(SPECS), each(PAIRS), each(DROP_INS)
