"""Published losses as people write them in plain torch: what `fuse` is tested and measured on."""

from . import (
    classification,
    counts,
    generative,
    guidance,
    image,
    imbalance,
    ordinal,
    physics,
    probabilistic,
    quantile,
    regression,
    robust,
    segmentation,
    similarity,
    survival,
    waveform,
)
from .entry import Entry

GROUPS = (
    regression,
    robust,
    quantile,
    probabilistic,
    counts,
    classification,
    imbalance,
    ordinal,
    segmentation,
    image,
    physics,
    generative,
    survival,
    waveform,
    similarity,
    guidance,
)
CORPUS: tuple[Entry, ...] = tuple(entry for group in GROUPS for entry in group.LOSSES)

__all__ = ["CORPUS", "GROUPS", "Entry"]
