"""Self-supervised pretraining of nnU-Net v2 networks: PCRLv2, and other methods on the same engine.

The library knows tensors, boxes and files. What nnU-Net sees of it are the trainers in `pcrl_nnunet.trainers` and the
planners in `pcrl_nnunet.planners`, which `pcrl_nnunet_register` makes known to nnU-Net's commands.
"""

__version__ = "0.2.0.dev0"
