"""Planners that nnU-Net finds through the bridge that `pcrl_nnunet_register` writes."""

from pcrl_nnunet.planners.pcrl import PCRLPlanner, PCRLPlannerResEncL, PCRLPlannerResEncM, PCRLPlannerResEncXL

__all__ = ["PCRLPlanner", "PCRLPlannerResEncL", "PCRLPlannerResEncM", "PCRLPlannerResEncXL"]
