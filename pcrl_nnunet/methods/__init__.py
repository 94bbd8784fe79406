"""One file a method, the contract that they keep (`base`), and how they are found by name (`registry`)."""

from pcrl_nnunet.loading.samples import ArraySpec, Sample, ShownSample, ShownView, Views
from pcrl_nnunet.methods.base import Method, ParameterGroup, Picture, Preparation, StepOutput
from pcrl_nnunet.methods.quantities import Quantity
from pcrl_nnunet.methods.registry import DEFAULT, method_class, names
from pcrl_nnunet.plans import PlanFacts

__all__ = [
    "DEFAULT",
    "ArraySpec",
    "Method",
    "ParameterGroup",
    "Picture",
    "PlanFacts",
    "Preparation",
    "Quantity",
    "Sample",
    "ShownSample",
    "ShownView",
    "StepOutput",
    "Views",
    "method_class",
    "names",
]
