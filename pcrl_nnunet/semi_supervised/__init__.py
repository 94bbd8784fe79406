"""Unlabelled scans beside the labelled ones: mean teacher with bidirectional copy-paste.

Bai et al., "Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation", CVPR 2023 (arXiv 2305.00673), on
nnU-Net's data, augmentation, loss and optimiser. The teacher is Tarvainen & Valpola's (NeurIPS 2017).
"""
