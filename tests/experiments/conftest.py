"""Comparisons of a tiny dataset."""

import blosc2
import numpy as np
import pytest

from pcrl_nnunet.experiments.arms import built_in_arms, choose_arms
from pcrl_nnunet.experiments.comparison import Comparison
from pcrl_nnunet.experiments.layout import Layout
from pcrl_nnunet.plans import PlanFacts, load_plan


@pytest.fixture
def layout(tiny, tmp_path):
    """Makes comparisons of ten cases, in one folder."""
    cases = [f"case_{i}" for i in range(10)]
    for number, name in enumerate(cases[4:]):
        for ending in ("_seg.b2nd", ".pkl"):
            (tiny.data / f"{name}{ending}").symlink_to(tiny.data / f"case_0{ending}")
        image = np.random.default_rng(10 + number).normal(size=(1, 14, 14, 14)).astype(np.float32)
        blosc2.asarray(image, urlpath=str(tiny.data / f"{name}.b2nd"))

    def make(protocol="all", settings=None, methods=("pcrlv2", "pseudo_labels"), own=(), patients=(), **given):
        plan = load_plan("Dataset999_Tiny", "nnUNetPlans", given.pop("configuration", "3d_fullres"))
        chosen = choose_arms(
            methods, dict(own), built_in_arms(PlanFacts.of(plan.configuration, plan.resolved), "pcrlv2", 8)
        )
        folder, scored = str(tmp_path / "out"), given.pop("scored", "test")
        found = Comparison.of_plan(plan, chosen, dict(patients), protocol, scored, settings or {}, **given)
        return Layout(found, folder)

    return make
