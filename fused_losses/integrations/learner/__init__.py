"""A compact Learner whose callbacks also work in fast.ai's miniai; Accelerate, progress and metrics as callbacks."""

from .core import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    DataLoaders,
    Learner,
)
from .lr_finder import LRFinderCB
from .metrics import MetricsCB
from .progress import ProgressCB
from .training import AccelerateCB, AccelerateCustomCB, DeviceCB, TrainCB

__all__ = [
    "AccelerateCB",
    "AccelerateCustomCB",
    "Callback",
    "CancelBatchException",
    "CancelEpochException",
    "CancelFitException",
    "DataLoaders",
    "DeviceCB",
    "LRFinderCB",
    "Learner",
    "MetricsCB",
    "ProgressCB",
    "TrainCB",
]
