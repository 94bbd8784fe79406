"""Networks around the plan's encoder: the pretraining's decoder without skip connections and heads, the classifier."""

from pcrl_nnunet.models.classifier import Classifier, accept_any_size
from pcrl_nnunet.models.decoder import Decoder, encoder_of
from pcrl_nnunet.models.heads import ComparisonHead, RestorationHead

__all__ = ["Classifier", "ComparisonHead", "Decoder", "RestorationHead", "accept_any_size", "encoder_of"]
