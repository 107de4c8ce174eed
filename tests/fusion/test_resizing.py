"""Tensors resized to other tensors' sizes or by factors: read where they are, by a gradient that is torch's."""

import pytest
import torch
import torch.nn.functional as F
from test_lowering import check, externs, traced

from fused_losses import fuse

SHAPES = {
    "linear": (2, 3, 5),
    "nearest": (2, 3, 5),
    "nearest-exact": (2, 3, 5, 4),
    "bilinear": (2, 3, 5, 4),
    "bicubic": (2, 3, 5, 4),
    "trilinear": (2, 3, 3, 5, 4),
}
FACTORS = (2, 0.5, 1.5)


def resized(options):
    def loss(x, y):
        found = F.interpolate(x, **options)
        return (found.square() * y[tuple(map(slice, found.shape))]).mean()

    return loss


def pair(mode):
    shape = SHAPES[mode]
    generator = torch.Generator().manual_seed(len(shape))
    other = (*shape[:2], *(2 * n + 1 for n in shape[2:]))
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, other)]


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("mode", SHAPES)
def test_factors(mode, factor):
    for recompute in (False, True):
        options = {"scale_factor": factor, "mode": mode, "recompute_scale_factor": recompute}
        (name,) = externs(check(resized(options), *pair(mode)))
        assert name.endswith("_backward")


@pytest.mark.parametrize("corners", [None, True])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_corners_and_antialiasing(mode, antialias, corners):
    options = {"size": (7, 6), "mode": mode, "antialias": antialias, "align_corners": corners}
    check(resized(options), *pair(mode))


def test_the_mean_over_areas_is_left_as_it_is():
    check(resized({"size": (3, 2), "mode": "area"}), *pair("bilinear"))


def test_wrong_arguments_raise_torchs_error():
    for options in ({"size": 3, "scale_factor": 2}, {"size": 3, "mode": "nearest", "align_corners": True}, {}):
        with pytest.raises(ValueError):
            traced(resized(options), pair("bilinear"), (0,))


def test_kernels_serve_every_size():
    @fuse(strict=True)
    def supervised(outputs, masks):
        """Masks to the size of one output, the other output to that of the masks."""
        small, other = outputs
        fit = F.binary_cross_entropy_with_logits(small, F.interpolate(masks, size=small.shape[-2:]))
        grown = F.interpolate(other, size=masks.shape[2:], mode="bilinear")
        return fit + F.l1_loss(grown, masks) + F.l1_loss(F.interpolate(other, scale_factor=2.0), masks)

    for rows, columns in ((4, 6), (5, 7)):
        leaves = [torch.randn(3, 1, rows, columns, requires_grad=True) for _ in range(2)]
        masks = torch.rand(3, 1, 2 * rows, 2 * columns)
        results = [f(leaves, masks) for f in (supervised, supervised.__wrapped__)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*[torch.autograd.grad(result, leaves) for result in results])
    assert sum(map(len, supervised._fusion._patterns.values())) == 1
