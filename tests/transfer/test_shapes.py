import json
from pathlib import Path
from typing import Any

import pytest
import torch
from unets import PLAIN, RESENC, build, content_of, plan_with

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.transfer.shapes import check_architecture


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (RESENC, {}, r"of a ResidualEncoderUNet in 3D with 4, 8, 8 features, 3d_fullres of P of a PlainConvUNet in 3D"),
        (
            PLAIN,
            {"dim": 2},
            r"of a PlainConvUNet in 2D with 4, 8, 8 features, 3d_fullres of P of a PlainConvUNet in 3D",
        ),
        (PLAIN, {"features": (4, 8, 16)}, r"with 4, 8, 16 features, 3d_fullres of P of .* with 4, 8, 8 features"),
    ],
)
def test_an_unsuitable_checkpoint_is_refused_and_a_fitting_plan_is_named(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    content, plan = content_of(build(name, **changes), name=name, **changes), plan_with()
    for file, other in (("P", plan), ("Q", plan_with(name, "Q", **changes))):
        (tmp_path / f"{file}.json").write_text(json.dumps(other))
    (tmp_path / "dataset.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    for file, key in (("A", "pcrl_fitted"), ("B", "pcrl_target")):  # plans made by transfers are not suggested
        (tmp_path / f"{file}.json").write_text(json.dumps({**plan_with(name, file, **changes), key: "something"}))
    configuration = "2d" if changes.get("dim") == 2 else "3d_fullres"
    with pytest.raises(UserError, match=rf"{message}.*it fits -c {configuration} -p Q$"):
        check_architecture(content, plan, "3d_fullres", str(tmp_path))
    (tmp_path / "Q.json").unlink()
    with pytest.raises(UserError, match=rf"{message}.*none of the dataset's plans fits: it needs a "):
        check_architecture(content, plan, "3d_fullres", str(tmp_path))


def test_more_and_fewer_stages_can_load(tmp_path: Path) -> None:
    for features in ((4, 8), (4, 8, 8), (4, 8, 8, 16)):
        content = content_of(build(features=features), features=features)
        check_architecture(content, plan_with(), "3d_fullres", str(tmp_path))


def test_a_checkpoint_without_stages_is_refused(tmp_path: Path) -> None:
    content = {"network_weights": {"eva.blocks.0.weight": torch.zeros(2, 2)}}
    with pytest.raises(UserError, match="has no encoder with stages"):
        check_architecture(content, plan_with(), "3d_fullres", str(tmp_path))
