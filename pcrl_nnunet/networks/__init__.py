"""Networks around the plan's encoder: the decoder without skip connections, the heads, the classifier."""

from pcrl_nnunet.networks.attention import ChannelAttention, OuterProductAttention
from pcrl_nnunet.networks.autoencoder import Autoencoder
from pcrl_nnunet.networks.classifier import Classifier, accept_any_size, mean_and_maximum
from pcrl_nnunet.networks.decoder import Decoder, encoder_of, seg_layers_of
from pcrl_nnunet.networks.discriminator import Discriminator
from pcrl_nnunet.networks.gather import gathered, of_next_sample
from pcrl_nnunet.networks.heads import ComparisonHead, RestorationHead
from pcrl_nnunet.networks.momentum import KeyQueue, MomentumCopy
from pcrl_nnunet.networks.points import at_points
from pcrl_nnunet.networks.unet import RestoringUNet, UNet

__all__ = [
    "Autoencoder",
    "ChannelAttention",
    "Classifier",
    "ComparisonHead",
    "Decoder",
    "Discriminator",
    "KeyQueue",
    "MomentumCopy",
    "OuterProductAttention",
    "RestorationHead",
    "RestoringUNet",
    "UNet",
    "accept_any_size",
    "at_points",
    "encoder_of",
    "gathered",
    "mean_and_maximum",
    "of_next_sample",
    "seg_layers_of",
]
