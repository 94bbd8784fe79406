import os

import pytest

from pcrl_nnunet import checkpoint
from pcrl_nnunet.transfer import find

PLAN = ("nnUNetPlans", "3d_fullres")


def write(results, fold, method, said=None, name=checkpoint.FINAL, plan=PLAN):
    path = find.place(str(results), *plan, fold, method)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    path = os.path.join(os.path.dirname(path), name)
    checkpoint.write(path, {"format": checkpoint.FORMAT, "method": said or method})
    return path


def found(results, fold=0, method=None):
    return find.pretrained(str(results), *PLAN, fold, method)


def test_a_folds_own_pretraining_precedes_fold_all_and_excludes_other_folds(tmp_path):
    write(tmp_path, 1, "mae")
    assert found(tmp_path) == {}
    of_all = write(tmp_path, "all", "mae")
    assert found(tmp_path) == {"mae": of_all}
    own = write(tmp_path, 0, "mae")
    assert found(tmp_path) == {"mae": own}
    assert found(tmp_path, "all") == {"mae": of_all}


def test_every_method_is_found_and_one_alone_if_asked_for(tmp_path):
    paths = {method: write(tmp_path, "all", method) for method in ("mae", "pcrlv2", "swin_2")}
    assert found(tmp_path) == paths
    assert found(tmp_path, method="swin_2") == {"swin_2": paths["swin_2"]}
    assert found(tmp_path, method="swin") == {}


def test_other_plans_and_configurations_are_not_taken(tmp_path):
    write(tmp_path, 0, "mae", plan=("nnUNetPlans_b", "3d_fullres"))
    write(tmp_path, 0, "mae", plan=("my__nnUNetPlans", "3d_fullres"))
    write(tmp_path, 0, "mae", plan=("nnUNetPlans", "2d"))
    assert found(tmp_path) == {}


@pytest.mark.parametrize("method", [None, "pcrlv2"])
def test_a_folder_of_version_0_1_0_takes_the_method_from_its_file(tmp_path, method):
    old = write(tmp_path, "all", None, said="pcrlv2")
    assert found(tmp_path, method=method) == {"pcrlv2": old}
    assert found(tmp_path, method="mae") == {}
    new = write(tmp_path, "all", "pcrlv2")
    assert found(tmp_path, method=method) == {"pcrlv2": new}


def test_an_old_file_of_the_fold_precedes_a_newer_one_of_all_cases(tmp_path):
    own = write(tmp_path, 0, None, said="pcrlv2")
    write(tmp_path, "all", "pcrlv2")
    assert found(tmp_path) == {"pcrlv2": own}
    assert found(tmp_path, method="pcrlv2") == {"pcrlv2": own}


def test_unfinished_pretrainings_are_found_for_all_methods(tmp_path):
    states = [write(tmp_path, fold, m, name=checkpoint.LATEST) for fold, m in ((0, None), ("all", "mae"), (1, "mae"))]
    assert find.unfinished(str(tmp_path), *PLAN, 0) == states[:2]
    assert find.unfinished(str(tmp_path), *PLAN, 0, "mae") == states[:2]
