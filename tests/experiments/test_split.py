"""The split by patient, and draws of labelled cases."""

import numpy as np
import pytest

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments.split import draw_by_patient, number_labelled, split_cases

CASES = [f"case_{i:03}" for i in range(200)]
PATIENTS = {case: f"patient_{i // 3}" for i, case in enumerate(CASES)}


@pytest.mark.parametrize("patients", [{}, PATIENTS])
def test_the_split_is_70_10_20_and_keeps_patients_together(patients):
    split = split_cases(CASES, patients)
    assert sorted([*split.train, *split.val, *split.test]) == CASES
    assert [len(split.train), len(split.val), len(split.test)] == pytest.approx([140, 20, 40], abs=3 if patients else 0)
    parts = [{patients.get(c, c) for c in part} for part in (split.train, split.val, split.test)]
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_too_few_cases_for_a_split_are_refused():
    with pytest.raises(UserError, match="2 cases of 2 patients are too few for a split"):
        split_cases(CASES[:2], {})


def test_draws_differ_by_seed_and_not_by_the_order_of_the_cases():
    assert draw_by_patient(CASES, {}, 1) == draw_by_patient(CASES[::-1], {}, 1)
    assert draw_by_patient(CASES, {}, 1)[:10] != draw_by_patient(CASES, {}, 2)[:10]


def test_numbers_and_shares_of_labelled_cases():
    assert [number_labelled(text, 140) for text in ("5", "10%", "12.5%", "all", "0.1%")] == [5, 14, 18, 140, 1]
    for wrong in ("0", "141", "ten", "1.5", "200%"):
        with pytest.raises(UserError, match=f"-labelled has '{wrong}'"):
            number_labelled(wrong, 140)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.3, 0.4, 0.5])
def test_a_share_of_the_images_is_drawn_from_the_same_share_of_the_patients(share):
    counts = np.random.default_rng(0).geometric(0.27, 1000)  # 3.7 images each, as in NIH ChestX-ray14
    patients = {f"{i:04d}_{k:03d}": str(i) for i, count in enumerate(counts) for k in range(count)}
    for seed in range(5):
        drawn = draw_by_patient(patients, patients, seed)
        number = number_labelled(f"{100 * share:g}%", len(drawn))
        labelled, rest = drawn[:number], drawn[number:]
        of_labelled, of_rest = ({patients[name] for name in names} for names in (labelled, rest))
        assert len(of_labelled & of_rest) <= 1  # the last patient may be cut
        assert len(of_labelled) / 1000 == pytest.approx(share, abs=0.04)
