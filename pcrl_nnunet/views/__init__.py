"""PCRLv2's views as batchgenerators transforms: sub-crop, spatial, pixel, in this order.

Each transform takes and returns a `data_dict` of one sample, and draws from the `np.random.Generator` under its key
``rng``. Other transforms fit in between. Before the spatial transform, ``data`` is one image (C, *spatial). After it,
batchgenerators' transforms with ``data_key="input"`` or ``"local"`` see the views as a batch (views, C, *size). Compose
of batchgenerators and of batchgeneratorsv2 both accept the transforms.
"""

from pcrl_nnunet.views.pixel import PixelTransform
from pcrl_nnunet.views.spatial import SpatialViewTransform
from pcrl_nnunet.views.sub_crop import SubCropTransform

__all__ = ["PixelTransform", "SpatialViewTransform", "SubCropTransform"]
