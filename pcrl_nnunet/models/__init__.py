"""Networks of the pretraining: the plan's encoder, a decoder without skip connections, the heads."""

from pcrl_nnunet.models.heads import ComparisonHead, RestorationHead
from pcrl_nnunet.models.nonskip import NonSkipDecoder, encoder_of

__all__ = ["ComparisonHead", "NonSkipDecoder", "RestorationHead", "encoder_of"]
