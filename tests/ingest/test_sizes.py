"""Impossible sizes are refused with spacing, size and unit, before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from scan_files import target_for

from pcrl_nnunet.ingest import sizes
from pcrl_nnunet.ingest.scans import Target, Unusable
from pcrl_nnunet.ingest.sizes import check_size, check_spacing


def planned(**more: Any) -> Target:
    target = target_for()
    configuration = {
        "spacing": [2.0, 1.0, 1.0], "patch_size": [16, 32, 32],
        "architecture": {"arch_kwargs": {"strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}}, **more,
    }  # fmt: skip
    plan = {"transpose_forward": [0, 1, 2], "original_median_spacing_after_transp": [2.0, 1.0, 1.0]}
    target.plans.update(plan, configurations={"3d_fullres": configuration})
    return target


def refusal(shape: tuple[int, ...], spacing: tuple[float, ...], target: Target, file: str = "a.mha") -> str:
    with pytest.raises(Unusable) as caught:
        check_size(shape, spacing, [file], target)
    return str(caught.value)


def test_cases_smaller_than_the_total_stride_are_refused() -> None:
    check_size((2, 4, 4), (2.0, 1.0, 1.0), ["a.mha"], planned())
    assert "a case of 2 x 4 x 3 voxels" in refusal((2, 4, 3), (2.0, 1.0, 1.0), planned())
    assert "needs 2 x 4 x 4 voxels at least" in refusal((1, 4, 4), (2.0, 1.0, 1.0), planned())


def test_sizes_are_checked_in_the_plans_axis_order() -> None:
    target = planned()
    target.plans["transpose_forward"] = [2, 0, 1]
    check_size((4, 4, 2), (1.0, 1.0, 2.0), ["a.mha"], target)
    assert "2 x 1 x 1 mm" in refusal((3, 4, 2), (1.0, 1.0, 2.0), target)


def test_slices_keep_their_distance_in_2d() -> None:
    target = planned(
        spacing=[1.0, 1.0], patch_size=[32, 32], architecture={"arch_kwargs": {"strides": [[1, 1], [2, 2]]}}
    )
    check_size((1, 2, 2), (2.0, 1.0, 1.0), ["a.mha"], target)
    assert "needs 2 x 2 voxels at least" in refusal((9, 2, 1), (2.0, 1.0, 1.0), target)


def test_the_refusal_names_the_spacing_and_its_assumed_unit(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((40, 40, 40), np.int16), np.eye(4))
    for unit, said in (("unknown", "mm was assumed"), ("micron", "its header says micron")):
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / "a.nii")
        message = refusal((40, 40, 40), (0.02, 0.02, 0.02), planned(), str(tmp_path / "a.nii"))
        assert f"voxels of 0.02 x 0.02 x 0.02 mm ({said}) make a case of 0 x 1 x 1 voxels" in message


def test_a_case_larger_than_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "memory", lambda: 2.0**30)
    check_size((100, 200, 200), (2.0, 1.0, 1.0), ["a.mha"], planned())
    assert "which takes 60 GB of memory to make; this machine has 1 GB" in refusal(
        (100, 200, 200), (20.0, 10.0, 10.0), planned()
    )


def test_the_memory_of_this_machine_is_known() -> None:
    assert 2**28 < sizes.memory() < 2**50


@pytest.mark.parametrize("factor", [0.1, 10.0, 1000.0])
def test_centimetres_or_micrometres_for_millimetres_are_refused(factor: float) -> None:
    with pytest.raises(Unusable, match=r"implausible beside the 2 x 1 x 1 mm of most images; check the unit"):
        check_spacing([2 * factor, factor, factor], [2.0, 1.0, 1.0], "most images")


@pytest.mark.parametrize("spacing", [[500.0, 1.0, 1.0], [0.02, 10.0, 10.0], [100.0, 0.5, 0.5]])
def test_one_absurd_axis_is_refused(spacing: list[float]) -> None:
    with pytest.raises(Unusable, match="are implausible beside"):
        check_spacing(spacing, [2.0, 1.0, 1.0], "most images")


def test_thick_slices_beside_thin_ones_are_not_absurd() -> None:
    check_spacing([10.0, 0.5, 0.5], [0.7, 0.7, 0.7], "most images")
    check_spacing([0.7, 0.7, 0.7], [10.0, 3.0, 3.0], "most images")
