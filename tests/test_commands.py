import shlex

import pytest

from pcrl_nnunet.commands import command, train_command


def test_a_shell_reads_the_words_that_were_given() -> None:
    path = "/my data/it's $HOME/checkpoint*.pth"
    line = command("pcrl_nnunet_transfer", "--c", i=path, d="Dataset004_A", c=None, f=0)
    assert shlex.split(line) == ["pcrl_nnunet_transfer", "--c", "-i", path, "-d", "Dataset004_A", "-f", "0"]


def test_simple_words_are_not_quoted() -> None:
    line = command("nnUNetv2_train", 4, "3d_fullres", 0, tr="PCRLFinetuneTrainer", p="nnUNetPlans")
    assert line == "nnUNetv2_train 4 3d_fullres 0 -tr PCRLFinetuneTrainer -p nnUNetPlans"


@pytest.mark.parametrize(("device", "value"), [("cuda", None), ("cpu", "cpu"), ("mps", "mps")])
def test_nnunets_default_device_is_left_out(device: str, value: str | None) -> None:
    words = train_command("Dataset004_A", "2d", 0, device, tr="T").split()
    assert words[:6] == ["nnUNetv2_train", "Dataset004_A", "2d", "0", "-tr", "T"]
    assert words[6:] == ([] if value is None else ["-device", value])
