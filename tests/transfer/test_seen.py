from pathlib import Path

import numpy as np

from pcrl_nnunet.loading.cases import Case, fingerprint
from pcrl_nnunet.transfer.seen import cases_seen


def test_cases_are_recognised_by_name_and_by_voxels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cases = []
    for name in ("a", "b", "c"):
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(1, 4, 5, 6)).astype(np.float32))
        cases.append(Case(name, str(tmp_path / f"{name}.npy")))
    checkpoint = {
        "cases": [
            {"name": "a", "path": "Dataset001_X/folder/a.b2nd", "sha256": "of another plan's voxels"},
            {"name": "copy", "path": "Dataset002_Y/folder/copy.b2nd", "sha256": fingerprint(cases[1])},
            {"name": "c", "path": "Dataset002_Y/folder/c.b2nd", "sha256": "of another image"},
        ]
    }
    assert cases_seen(checkpoint, "Dataset001_X", cases) == ["a", "b (as copy)"]
