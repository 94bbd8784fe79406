"""Bridge from nnU-Net to pcrl_nnunet.

nnU-Net looks for trainers and planners in its own installed folders; `pcrl_nnunet_register` copies this file into two
of them and `pcrl_nnunet_register --undo` removes it. If nnU-Net's folder is read-only, set nnU-Net's environment
variable nnUNet_extTrainer to the folder of this file.

Stock look-ups cost nothing here: only names that start with PCRL are looked up, and only then is our package imported.
Without our package, nnU-Net behaves as without this file.
"""

import importlib
import importlib.util
from typing import Any

TARGET = "pcrl_nnunet.planners" if "experiment_planners" in __name__ else "pcrl_nnunet.trainers"


def __getattr__(name: str) -> Any:
    """Resolve a class of ours (PEP 562).

    Raises:
        AttributeError: no such class of ours, or our package is not installed: nnU-Net searches on.
        ImportError: our package is installed but broken, so the caller must see the error.
    """
    if name.startswith("PCRL"):
        package = importlib.util.find_spec("pcrl_nnunet")
        # A folder that merely has our name, such as a checkout in the working directory, has no origin.
        if package is not None and package.origin is not None:
            return getattr(importlib.import_module(TARGET), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
