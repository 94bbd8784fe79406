from collections import Counter

import numpy as np
import pytest

from pcrl_nnunet.classification.drawing import Drawing
from pcrl_nnunet.classification.label_table import read_labels


@pytest.mark.parametrize("values", [[1, *[0] * 199], [2, *[0] * 100, *[1] * 99]])
def test_balanced_drawing_shows_the_rare_class_as_often_as_the_others(tmp_path, values):
    lines = "".join(f"c{i},{value}\n" for i, value in enumerate(values))
    (tmp_path / "classes.csv").write_text(f"case,a\n{lines}")
    table, samples, rng = read_labels(str(tmp_path)), np.arange(200), np.random.default_rng(0)
    drawn = Counter(values[i] for i in Drawing(table, samples, balanced=True)(rng, 6000))
    expected = 6000 / len(set(values))
    assert all(abs(number - expected) < 5 * np.sqrt(expected) for number in drawn.values())
    natural = Counter(values[i] for i in Drawing(table, samples, balanced=False)(rng, 6000))
    assert natural[values[0]] < 100
