"""Planners that nnU-Net finds through the bridge of `pcrl_nnunet_register`."""

from pcrl_nnunet.planners.pcrl import PCRLPlanner, PCRLPlannerResEncL, PCRLPlannerResEncM, PCRLPlannerResEncXL

__all__ = ["PCRLPlanner", "PCRLPlannerResEncL", "PCRLPlannerResEncM", "PCRLPlannerResEncXL"]
