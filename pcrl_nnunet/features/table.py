"""The file of a dataset's vectors, and its map.

N: cases, D: length of a vector.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from pcrl_nnunet import figure_style
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import whole, writing

FORMAT = "pcrl_nnunet/embeddings/1"
FEWEST = 3  # cases of a map


@dataclass(frozen=True)
class Embeddings:
    """The vectors of the cases of a dataset.

    Attributes:
        names: (N,), names of the cases.
        vectors: (N, D) float32.
        labelled: (N,) of bool, whether the case lies in the dataset's own folder, where cases have labels.
        stages, poolings: (D,), see `embedding.columns`.
        title: dataset, configuration and checkpoint in words.
    """

    names: Sequence[str]
    vectors: np.ndarray
    labelled: np.ndarray
    stages: np.ndarray
    poolings: np.ndarray
    title: str = field(default="")

    def write(self, path: str) -> None:
        """Write a compressed .npz, whole or not at all.

        Raises:
            UserError: the file cannot be written.
        """
        with writing(f"{path} cannot be written", "choose another file with -o"), whole(path) as draft:
            np.savez_compressed(
                draft,
                format=np.array(FORMAT),
                title=np.array(self.title),
                names=np.array(self.names, dtype=np.str_),
                embeddings=self.vectors.astype(np.float32),
                labelled=self.labelled,
                stages=self.stages,
                poolings=self.poolings,
            )

    def map(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the first two principal components (N, 2) of the standardised vectors, and their shares of variance.

        Raises:
            UserError: there are fewer than three cases.
        """
        if len(self.vectors) < FEWEST:
            raise UserError(f"{len(self.vectors)} cases make no map; expected {FEWEST} or more")
        pca = PCA(2, random_state=0)
        places = pca.fit_transform(StandardScaler().fit_transform(self.vectors))
        return places, pca.explained_variance_ratio_

    def draw(self, path: str) -> None:
        """Draw the map: a point for each case, labelled cases in another colour and form."""
        places, shares = self.map()
        with figure_style.own_style():
            figure = Figure(figsize=(figure_style.WIDTH, 5.2), dpi=figure_style.DPI, layout="constrained")
            axis = figure.add_subplot()
            kinds = (("unlabelled", ~self.labelled, "o", "#7f7f7f"), ("labelled", self.labelled, "^", "#d95f02"))
            for name, chosen, marker, colour in kinds:
                if chosen.any():
                    label = f"{name} ({int(chosen.sum())})"
                    x, y = places[chosen].T
                    axis.scatter(x, y, s=22, marker=marker, c=colour, alpha=0.8, label=label)
            axis.set_xlabel(f"principal component 1 ({shares[0]:.0%} of the variance)")
            axis.set_ylabel(f"principal component 2 ({shares[1]:.0%} of the variance)")
            axis.legend(loc="best")
            figure_style.heading(figure, f"Cases by their features\n{self.title}")
            with whole(path) as draft:
                figure.savefig(draft)


def picture_beside(path: str) -> str:
    """Return the path of the map beside a file of vectors."""
    return f"{os.path.splitext(path)[0]}.png"
