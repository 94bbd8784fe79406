"""The views of PCRLv2 as batchgenerators transforms: sub-crop, spatial, pixel, in this order.

Each takes and returns a `data_dict` of one sample and draws from the `np.random.Generator` under its key ``rng``.
Others fit in between: before the spatial one those that know ``data`` as one image (C, *spatial), after it those of
batchgenerators with ``data_key="input"`` or ``"local"``, for which the views are a batch (views, C, *size). The
Compose of batchgenerators takes them and that of batchgeneratorsv2.
"""

from pcrl_nnunet.views.pixel import PixelTransform
from pcrl_nnunet.views.spatial import SpatialViewTransform
from pcrl_nnunet.views.sub_crop import SubCropTransform

__all__ = ["PixelTransform", "SpatialViewTransform", "SubCropTransform"]
