"""One file a method: views + model + loss = one training step."""

from pcrl_nnunet.methods.pcrlv2 import PCRLv2, StepOutput

__all__ = ["PCRLv2", "StepOutput"]
