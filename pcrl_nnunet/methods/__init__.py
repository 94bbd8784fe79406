"""The methods, one in a file, their contract (`base`), and their import by name (`registry`)."""

from pcrl_nnunet.loading.samples import ArraySpec, Sample, ShownSample, ShownView, Views
from pcrl_nnunet.method_names import DEFAULT, names
from pcrl_nnunet.methods.base import Method, ParameterGroup, Picture, Preparation, StepOutput
from pcrl_nnunet.methods.quantities import Quantity
from pcrl_nnunet.methods.registry import method_class
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
