"""Subclasses of nnUNetTrainer. `pcrl_nnunet_register` lets nnU-Net's commands find them by name."""

import re

from pcrl_nnunet.output_folder import METHOD
from pcrl_nnunet.trainers.classify import PCRLClassificationScratchTrainer, PCRLClassificationTrainer
from pcrl_nnunet.trainers.finetune import PCRLFinetuneTrainer
from pcrl_nnunet.trainers.pretrain import PCRLPretrainTrainer
from pcrl_nnunet.trainers.scratch import PCRLScratchTrainer
from pcrl_nnunet.trainers.semi import PCRLSemiSupervisedScratchTrainer, PCRLSemiSupervisedTrainer

__all__ = [
    "PCRLClassificationScratchTrainer",
    "PCRLClassificationTrainer",
    "PCRLFinetuneTrainer",
    "PCRLPretrainTrainer",
    "PCRLScratchTrainer",
    "PCRLSemiSupervisedScratchTrainer",
    "PCRLSemiSupervisedTrainer",
]


def __getattr__(name: str) -> type[PCRLFinetuneTrainer]:
    """Make a trainer that uses a method's pretraining, such as PCRLFinetuneTrainer_mae (PEP 562).

    nnU-Net names the results folder by the class. The class stays in this module, so that it can be pickled.
    """
    for trainer in (PCRLFinetuneTrainer, PCRLSemiSupervisedTrainer, PCRLClassificationTrainer):
        if match := re.fullmatch(f"{trainer.__name__}_({METHOD})", name):
            method = match[1]
            made = {"method": method, "for_classification": f"{trainer.for_classification}_{method}"}
            return globals().setdefault(name, type(name, (trainer,), {"__module__": __name__, **made}))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
