"""One file a method: views + model + loss = one training step."""

from pcrl_nnunet.methods.pcrlv2 import Levels, PCRLv2, StepOutput

__all__ = ["Levels", "PCRLv2", "StepOutput"]
