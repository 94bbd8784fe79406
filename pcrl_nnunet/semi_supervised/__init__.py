"""Semi-supervised training on labelled and unlabelled scans: mean teacher with bidirectional copy-paste.

Bai et al., "Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation", CVPR 2023 (arXiv 2305.00673),
with nnU-Net's data, augmentation, loss and optimiser. The teacher follows Tarvainen & Valpola (NeurIPS 2017).
"""
