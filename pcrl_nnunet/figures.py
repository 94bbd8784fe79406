"""Every picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

_PANELS = (  # title, lower limit, named curves: (key of the log, label)
    ("losses", None, (("restoration", "restoration"), ("comparison_global", "global"), ("comparison_local", "local"))),
    ("restoration error / variance of the images (1: nothing restored)", 0, (("restoration_ratio", "mean"),)),
    ("cosine of matched less shuffled samples (0: not told apart)", None, (("matched_minus_shuffled", "mean"),)),
    ("features: spread / even spread, effective rank / 10", 0, (("sd_ratio", "spread"), ("effective_rank", "rank"))),
    ("learning rate", 0, (("lrs", "rate"),)),
)


def pretraining_progress(log: Mapping[str, Sequence[float]], path: str) -> None:
    """The pretraining's own curves, an epoch a point, as a PNG."""
    figure = Figure(figsize=(11, 3 * len(_PANELS)), layout="constrained")
    for axis, (title, lower, curves) in zip(figure.subplots(len(_PANELS), 1), _PANELS, strict=True):
        for key, label in curves:
            values = [v / 10 if key == "effective_rank" else v for v in log[key]]
            axis.plot(range(len(values)), values, marker="." if len(values) < 50 else None, label=label)
        axis.set_title(title)
        axis.set_ylim(bottom=lower)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper right")
    axis.set_xlabel("epoch")
    figure.savefig(path, dpi=100)
