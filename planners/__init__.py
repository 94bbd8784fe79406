"""Planners that nnU-Net finds through the bridge that `pcrl_nnunet_register` writes."""
