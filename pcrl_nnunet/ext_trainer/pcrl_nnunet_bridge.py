"""Bridge from nnU-Net to pcrl_nnunet.

nnU-Net looks for trainers and planners in its own installed folders; `pcrl_nnunet_register` copies this file into two
of them and `pcrl_nnunet_register --undo` removes it. The folder it is copied from serves nnU-Net's environment
variable nnUNet_extTrainer, where nnU-Net cannot be written to.

Stock look-ups cost nothing here: only names that start with PCRL are looked up, and only then is our package imported.
Where it is not installed the answer is the same as without this file.
"""

import importlib
import importlib.util
from typing import Any

TARGET = "pcrl_nnunet.planners" if "experiment_planners" in __name__ else "pcrl_nnunet.trainers"


def __getattr__(name: str) -> Any:
    """Resolve a class of ours (PEP 562).

    Raises:
        AttributeError: no such class of ours, or our package is not installed: nnU-Net searches on.
        ImportError: our package is installed but broken, which whoever asks for its classes has to know.
    """
    if name.startswith("PCRL"):
        package = importlib.util.find_spec("pcrl_nnunet")
        # A folder that merely has our name, such as a checkout in the working directory, has no origin.
        if package is not None and package.origin is not None:
            return getattr(importlib.import_module(TARGET), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
