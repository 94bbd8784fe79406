"""Facts about classes from their labels."""

from typing import Any

import numpy as np
import pytest

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.semi_supervised.label_facts import MOST_CASES, LabelFacts, share_of_largest_piece


def two_cases() -> dict[str, np.ndarray]:
    """Organ (1) in one piece; lesions (2) in pieces of 8 and 4 voxels in the first case and 4 in the second."""
    first, second = np.zeros((2, 1, 10, 10, 10), np.int16)
    first[0, 0:5, 0:5, 0:4] = 1  # 100
    first[0, 7:9, 7:9, 7:9] = 2  # 8
    first[0, 0:4, 9, 9] = 2  # 4
    second[0, 2:7, 2:6, 2:4] = 1  # 40
    second[0, 9, 6:10, 9] = 2  # 4
    return {"first": first, "second": second}


def with_places(labels: np.ndarray, *classes: Any) -> tuple[np.ndarray, dict[Any, np.ndarray]]:
    """Labels, and all places of the classes in the form of nnU-Net's preprocessing."""
    return labels, {values: np.argwhere(np.isin(labels, values)) for values in classes}


def facts_of(cases: dict[str, np.ndarray], classes: dict[str, Any], patch: tuple[int, ...], **given: Any) -> LabelFacts:
    def read(name: str) -> tuple[np.ndarray, dict[Any, np.ndarray]]:
        return with_places(cases[name], *classes.values())

    return LabelFacts.of_cases(list(cases), read, classes, patch, **given)


def test_shares_and_pieces_agree_with_counts_by_hand() -> None:
    facts = facts_of(two_cases(), {"organ": 1, "lesion": 2}, (10, 10, 10))
    assert facts.names == ["organ", "lesion"]
    assert facts.shares == pytest.approx([140 / 2000, 16 / 2000])
    assert facts.in_largest_piece == pytest.approx([1, (8 / 12 + 1) / 2])  # as many crops of each case
    assert facts.in_one_piece == [0]
    assert str(facts) == (
        "organ 7.00% of the voxels, 100% of it in its largest piece, "
        "lesion 0.80% of the voxels, 83% of it in its largest piece"
    )


def test_an_organ_that_a_patch_cuts_in_two_is_not_in_one_piece() -> None:
    arch = np.zeros((1, 1, 20, 21), np.int16)
    arch[0, 0, 2:20, [2, 18]] = arch[0, 0, 2, 2:19] = 1  # one piece; its legs are two in a patch without the top
    whole, in_patches = (facts_of({"a": arch}, {"aorta": 1}, patch) for patch in ((20, 21), (8, 21)))
    assert whole.in_one_piece == [0]
    assert in_patches.in_one_piece == []
    assert in_patches.shares == whole.shares


def test_a_network_of_slices_has_the_pieces_of_slices() -> None:
    labels = np.zeros((1, 2, 6, 6), np.int16)
    labels[0, 0, 0:2, 0:2] = labels[0, 0, 4:6, 4:6] = 1  # connected in the next slice alone
    labels[0, 1, 0:6, 0:6] = 1
    in_slices, in_volume = (facts_of({"a": labels}, {"vessel": 1}, patch) for patch in ((6, 6), (2, 6, 6)))
    assert set(np.unique(in_slices.in_largest_piece)) <= {0.5, 0.625, 0.75, 0.875, 1.0}  # of four slices
    assert in_volume.in_largest_piece == [1]
    assert in_slices.shares == in_volume.shares == pytest.approx([44 / 72])


def test_regions_are_of_all_their_labels() -> None:
    facts = facts_of({"a": two_cases()["first"]}, {"whole": (1, 2), "core": (2,)}, (10, 10, 10))
    assert facts.shares == pytest.approx([112 / 1000, 12 / 1000])
    assert facts.in_largest_piece == pytest.approx([100 / 112, 8 / 12])


def test_ignored_voxels_do_not_count() -> None:
    labels = two_cases()["first"]
    labels[0, 5:7] = 3  # 200 of 1000
    facts = facts_of({"a": labels}, {"organ": 1, "lesion": 2}, (10, 10, 10), ignored=3)
    assert facts.shares == pytest.approx([100 / 800, 12 / 800])


def test_a_class_that_the_chosen_cases_lack_is_searched_in_the_others() -> None:
    common, rare = np.zeros((1, 1, 4, 4), np.int16), np.zeros((1, 1, 4, 4), np.int16)
    common[0, 0, :2] = 1
    rare[0, 0, 0] = 2
    chosen = np.linspace(0, MOST_CASES + 2, MOST_CASES).round()
    left_out = min({*range(MOST_CASES + 3)} - {*chosen})
    cases = {f"case_{number}": common for number in range(MOST_CASES + 3)} | {f"case_{left_out}": rare}
    facts = facts_of(cases, {"organ": 1, "lesion": 2}, (4, 4))
    assert facts.shares == pytest.approx([MOST_CASES * 8 / (16 * (MOST_CASES + 1)), 4 / (16 * (MOST_CASES + 1))])
    assert facts.in_largest_piece == [1, 1]


def test_a_class_that_no_case_shows_has_no_share_and_is_not_cleaned() -> None:
    facts = facts_of({"a": np.zeros((1, 4, 4, 4), np.int16)}, {"organ": 1}, (4, 4, 4))
    assert (facts.shares, facts.in_largest_piece, facts.in_one_piece) == ([0], [0], [])


def test_a_spread_sample_of_many_cases_is_read_once() -> None:
    names = [f"case_{i:03d}" for i in range(500)]
    read: list[str] = []

    def labels_of(name: str) -> tuple[np.ndarray, dict[Any, np.ndarray]]:
        read.append(name)
        return with_places(np.ones((1, 2, 2, 2), np.int16), 1)

    LabelFacts.of_cases(names, labels_of, {"organ": 1}, (2, 2, 2))
    assert len(read) == len(set(read)) == MOST_CASES
    assert {names[0], names[-1]} <= set(read)
    read.clear()
    LabelFacts.of_cases(names[:3], labels_of, {"organ": 1}, (2, 2, 2))
    assert read == names[:3]


@pytest.mark.parametrize("dim", [2, 3])
def test_pieces_are_connected_by_corners(dim: int) -> None:
    mask = np.zeros([5] * dim, bool)
    mask[(0,) * dim] = mask[(1,) * dim] = True
    assert share_of_largest_piece(mask) == 1
    mask[(3,) * dim] = True
    assert share_of_largest_piece(mask) == pytest.approx(2 / 3)


def test_a_class_that_no_labelled_case_shows_is_named() -> None:
    assert (
        "no labelled case shows b, c;"
        in LabelFacts(["a", "b", "c"], [0.1, 0.0, 0.0], [1.0, 0.0, 0.0]).warning_of_missing()
    )
    assert not LabelFacts(["a"], [0.1], [1.0]).warning_of_missing()


def test_labelled_cases_without_any_class_are_refused() -> None:
    LabelFacts(["a", "b"], [0.1, 0.0], [1.0, 0.0]).refuse_without_classes()
    with pytest.raises(UserError, match=r"^no labelled case of this fold shows a or b, [^\n]*$"):
        LabelFacts(["a", "b"], [0.0, 0.0], [0.0, 0.0]).refuse_without_classes()
