"""nnUNetTrainer subclasses; `pcrl_nnunet_register` lets nnU-Net's commands find them by name."""

from pcrl_nnunet.trainers.classify import PCRLClassificationScratchTrainer, PCRLClassificationTrainer
from pcrl_nnunet.trainers.finetune import (
    PCRLFinetuneTrainer,
    PCRLFinetuneTrainer_50epochs,
    PCRLFinetuneTrainer_250epochs,
    PCRLScratchTrainer,
    PCRLScratchTrainer_50epochs,
    PCRLScratchTrainer_250epochs,
)
from pcrl_nnunet.trainers.pretrain import PCRLPretrainTrainer

__all__ = [
    "PCRLClassificationScratchTrainer",
    "PCRLClassificationTrainer",
    "PCRLFinetuneTrainer",
    "PCRLFinetuneTrainer_50epochs",
    "PCRLFinetuneTrainer_250epochs",
    "PCRLPretrainTrainer",
    "PCRLScratchTrainer",
    "PCRLScratchTrainer_50epochs",
    "PCRLScratchTrainer_250epochs",
]
