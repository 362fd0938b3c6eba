"""Objectives on rewards and on preferences; an objective's fields are the config keys, the CLI flags and the node widgets."""

from .base import Loss, Objective, RunContext
from .policy_gradient.awm import AWM
from .policy_gradient.ddpo import DDPO
from .policy_gradient.flow_grpo import FlowGRPO
from .policy_gradient.g2rpo import G2RPO
from .policy_gradient.nft import DiffusionNFT
from .policy_gradient.pso import PSO
from .policy_gradient.spo import SPO
from .preference.chats import CHATS
from .preference.dmpo import DMPO
from .preference.dpo import DiffusionDPO, DiffusionNPO
from .preference.dro import DRO
from .preference.dspo import DSPO
from .preference.inversion import InPO, SmPO
from .preference.kto import DiffusionKTO
from .preference.mapo import MaPO
from .preference.self_npo import SelfNPO
from .preference.tpo import TPO
from .reward_gradient.black_box import BlackBoxSQDF
from .reward_gradient.direct_align import SRPO, DirectAlign
from .reward_gradient.draft import AlignProp, DRaFTK, DRaFTLV
from .reward_gradient.drtune import DRTune
from .reward_gradient.flowbp import FlowBPBridge, FlowBPSparse
from .reward_gradient.leapalign import FlowBPLagrange, LeapAlign
from .reward_gradient.refl import ImageReFL, ReFL
from .reward_gradient.sqdf import SQDF

OBJECTIVES: dict[str, type[Objective]] = {
    "refl": ReFL,
    "imagerefl": ImageReFL,
    "draft-k": DRaFTK,
    "draft-lv": DRaFTLV,
    "alignprop": AlignProp,
    "drtune": DRTune,
    "flowbp-sparse": FlowBPSparse,
    "flowbp-bridge": FlowBPBridge,
    "flowbp-lagrange": FlowBPLagrange,
    "leapalign": LeapAlign,
    "direct-align": DirectAlign,
    "srpo": SRPO,
    "sqdf": SQDF,
    "sqdf-black-box": BlackBoxSQDF,
    "diffusion-dpo": DiffusionDPO,
    "diffusion-kto": DiffusionKTO,
    "mapo": MaPO,
    "dspo": DSPO,
    "dmpo": DMPO,
    "inpo": InPO,
    "smpo": SmPO,
    "diffusion-npo": DiffusionNPO,
    "self-npo": SelfNPO,
    "chats": CHATS,
    "dro": DRO,
    "tpo": TPO,
    "ddpo": DDPO,
    "flow-grpo": FlowGRPO,
    "g2rpo": G2RPO,
    "awm": AWM,
    "diffusion-nft": DiffusionNFT,
    "spo": SPO,
    "pso": PSO,
}
"""Every objective by the name that configs use."""

__all__ = [
    "AWM",
    "CHATS",
    "DDPO",
    "DMPO",
    "DRO",
    "DSPO",
    "G2RPO",
    "OBJECTIVES",
    "PSO",
    "SPO",
    "SQDF",
    "SRPO",
    "TPO",
    "AlignProp",
    "BlackBoxSQDF",
    "DRTune",
    "DRaFTK",
    "DRaFTLV",
    "DiffusionDPO",
    "DiffusionKTO",
    "DiffusionNFT",
    "DiffusionNPO",
    "DirectAlign",
    "FlowBPBridge",
    "FlowBPLagrange",
    "FlowBPSparse",
    "FlowGRPO",
    "ImageReFL",
    "InPO",
    "LeapAlign",
    "Loss",
    "MaPO",
    "Objective",
    "ReFL",
    "RunContext",
    "SelfNPO",
    "SmPO",
]
