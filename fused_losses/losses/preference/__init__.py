"""The preference family: losses of sequences' log-probabilities, given or made from hidden states."""

from .cpo import CPOLoss, LinearCPOLoss, LinearORPOLoss, LinearSimPOLoss, ORPOLoss, SimPOLoss
from .dpo import DPOLoss, LinearDPOLoss
from .grpo import GRPOLoss, LinearGRPOLoss
from .kto import KTOLoss, LinearKTOLoss

__all__ = [
    "CPOLoss",
    "DPOLoss",
    "GRPOLoss",
    "KTOLoss",
    "LinearCPOLoss",
    "LinearDPOLoss",
    "LinearGRPOLoss",
    "LinearKTOLoss",
    "LinearORPOLoss",
    "LinearSimPOLoss",
    "ORPOLoss",
    "SimPOLoss",
]
