"""Networks of the pretraining: the plan's encoder, a decoder without skip connections, the heads."""

from pcrl_nnunet.models.decoder import Decoder, encoder_of
from pcrl_nnunet.models.heads import ComparisonHead, RestorationHead

__all__ = ["ComparisonHead", "Decoder", "RestorationHead", "encoder_of"]
