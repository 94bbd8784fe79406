"""Self-supervised pretraining of nnU-Net v2 networks: PCRLv2, and other methods on the same engine.

The library handles tensors, boxes and files. nnU-Net sees only the trainers in `pcrl_nnunet.trainers` and the planners
in `pcrl_nnunet.planners`, which `pcrl_nnunet_register` registers with nnU-Net's commands.
"""

__version__ = "0.2.0.dev0"
