"""The files of a pretraining: only tensors and plain values, written completely or not at all.

Fine-tuning loads ``checkpoint_final.pth``. The file loads with ``torch.load(weights_only=True)`` and holds:

- ``network_weights``: the state dict of the plan's own network with the pretrained encoder, accepted by nnU-Net's
  ``-pretrained_weights``; ``random_keys`` names the tensors that are not pretrained;
- ``nnssl_adaptation_plan``, ``citations`` and ``architecture_kwargs``, for nnU-Net's loader of nnssl checkpoints;
- a description: method, settings, plan, cases, versions, epochs, loss.

During the training, ``checkpoint_latest.pth`` beside it is the training state. ``checkpoint_previous.pth`` is the state
before, in case a disk damages the latest.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shlex
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pcrl_nnunet.errors import UserError, exit_on_user_error
from pcrl_nnunet.files import whole
from pcrl_nnunet.plans import PlannedConfiguration
from pcrl_nnunet.settings import without_settings

EXPECTED = "checkpoint_final.pth of pcrl_nnunet_pretrain or of nnU-Net, or a model of nnssl"
FORMAT = "pcrl_nnunet/1"  # format of files for fine-tuning
STATE_FORMAT = "pcrl_nnunet/state/5"  # format of files for --c
FINAL = "checkpoint_final.pth"
LATEST = "checkpoint_latest.pth"
PREVIOUS = "checkpoint_previous.pth"
DAMAGED = "checkpoint_damaged.pth"  # a latest state that could not be read, kept until the training is done

# nnU-Net's own checkpoints also hold scores, as numpy's numbers. They are data.
_SCALAR = np.float32(0).__reduce__()[0]
_NUMPY: list[Any] = [
    *((_SCALAR, f"{package}.multiarray.scalar") for package in ("numpy._core", "numpy.core")),  # names in numpy 2 and 1
    *(np.dtype, *(type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool"))),
]


def write(path: str, content: Mapping[str, Any], previous: str | None = None, go_on: str = "continue with --c") -> None:
    """Write to a temporary name, flush to disk, and rename: the last good file survives any failure.

    Args:
        previous: new name for the existing file; None: the file is replaced.
        go_on: advice to the user for when the file can be written.
    """
    try:
        with whole(path) as draft:
            with open(draft, "wb") as file:
                torch.save(dict(content), file)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and os.path.isfile(path):
                os.replace(path, previous)
        _flush_names(os.path.dirname(path))
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"could not write {path} ({reason}); the file of that name, if any, is the last good one: "
            f"make room or the folder writable and {go_on}"
        ) from error


def _flush_names(folder: str) -> None:
    """Flush a folder to disk, so that renamed files keep their new names after a power cut."""
    with suppress(OSError):  # Windows and some network file systems cannot flush folders; the files are flushed anyway
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: str, expected_format: str = FORMAT) -> dict[str, Any]:
    """Read a file of `write`, on the CPU.

    Raises:
        UserError: the file is missing, truncated, not ours, or holds pickled code.
    """
    content = read_any(path)
    if content.get("format") == expected_format:
        return content
    raise UserError(
        other_format(path, content, expected_format)
        or f"checkpoint {path} is not one of pcrl_nnunet_pretrain's (format '{expected_format}' expected)"
    )


def other_format(path: str, content: Mapping[str, Any], expected_format: str) -> str | None:
    """Explain which other kind of our files this is; None if the file is not ours."""
    if content.get("format") == STATE_FORMAT:
        return f"checkpoint {path} is of an unfinished pretraining; finish it with --c, take {FINAL}"
    if str(content.get("format")).startswith(expected_format.rsplit("/", 1)[0]):
        return (
            f"checkpoint {path} was written by another version of pcrl_nnunet (format '{content['format']}', "
            f"'{expected_format}' expected); go on with that version, or pretrain again"
        )
    return None


def read_any(path: str) -> dict[str, Any]:
    """Read any file of tensors and plain values on the CPU. Raise `UserError` as `read`."""
    if not os.path.isfile(path):
        raise UserError(f"checkpoint {path} does not exist; run pcrl_nnunet_pretrain, or check the path")
    if _is_of_old_format(path):
        stem, ending = os.path.splitext(path)
        new = f"{stem}_zip{ending}"
        arguments = ", ".join(json.dumps(name, ensure_ascii=False) for name in (path, new))
        line = f"from pcrl_nnunet.checkpoint import save_as_zip; save_as_zip({arguments})"
        raise UserError(
            f"checkpoint {path} is in torch's old format, which has no checksums; expected the zip format of torch 1.6 "
            f"and later: save it anew and take {new}, with: {shlex.join(['python', '-c', line])}"
        )
    return _load(path, _check_zip)


def save_as_zip(old: str, new: str) -> None:
    """Convert a file from torch's old format to the present format. A failure ends the process with a sentence.

    No code in the file is run.
    """
    with exit_on_user_error():
        if os.path.exists(new):
            raise UserError(f"{new} exists; expected a new name: take that file, or give another name")
        write(new, _load(old), go_on="run this again")


def _is_of_old_format(path: str) -> bool:
    """Tell if a file begins like files of torch.save before torch 1.6."""
    begin = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
    with suppress(OSError), open(path, "rb") as file:  # `_load` reports files that cannot be opened
        return file.read(len(begin)) == begin
    return False


def _check_zip(path: str) -> None:
    """Raise an error if a file is truncated or a bit has changed: torch.load checks no checksum."""
    if not zipfile.is_zipfile(path):  # torch.save writes zip files, recognised by their last bytes
        raise ValueError("not a whole file of torch.save")
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise UserError(f"{path} is a TorchScript program and was not run; expected {EXPECTED}")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} has changed")


def _load(path: str, check: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Load tensors and plain values without running code, after the check, which raises errors."""
    try:
        check(path)
        with torch.serialization.safe_globals(_NUMPY):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"checkpoint {path} may not be read ({error.strerror}); correct its permissions") from error
    except pickle.UnpicklingError as error:
        refused = "".join(f" ({name})" for name in re.findall(r"GLOBAL ([\w.]+)", str(error))[:1])
        raise UserError(
            f"checkpoint {path} holds more than tensors and plain values{refused} and was not loaded, as it could run "
            f"code; expected {EXPECTED}"
        ) from error
    except Exception as error:  # a damaged header may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"checkpoint {path} cannot be read ({reason}): it is truncated or damaged; copy it again or pretrain again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} holds no block of names and values; expected {EXPECTED}")
    return content


def encoder_hash(encoder: nn.Module | Mapping[str, Tensor]) -> str:
    """Return the sha256 of a state dict's names, shapes and values, for any device and order of keys."""
    state = encoder.state_dict() if isinstance(encoder, nn.Module) else encoder
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def plans_hash(plans: Mapping[str, Any]) -> str:
    """Return the sha256 of a plan without our settings, which affect neither data nor network."""
    return hashlib.sha256(json.dumps(without_settings(plans), sort_keys=True).encode()).hexdigest()


def architecture_plans(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan's architecture with nnssl's keys."""
    return {
        "arch_class_name": architecture["network_class_name"].rsplit(".", 1)[-1],
        "arch_kwargs": architecture["arch_kwargs"],
        "arch_kwargs_requiring_import": list(architecture["_kw_requires_import"]),
    }


def nnssl_adaptation_plan(
    plan: PlannedConfiguration, patch_size: Sequence[int], channels: int, network: Any
) -> dict[str, Any]:
    """Return the adaptation plan, with which nnU-Net's loader of nnssl checkpoints rebuilds and fills the encoder.

    Args:
        plan: plan of the network.
        patch_size: size of the pretraining's inputs, voxels.
        channels: input channels of the pretraining.
        network: the plan's own network.
    """
    resolved, architecture = plan.resolved, plan.resolved["architecture"]
    return {
        # nnU-Net's dynamic loader reads stages and kernels here or at the top of the file
        "architecture_kwargs": architecture["arch_kwargs"],
        "architecture_plans": architecture_plans(architecture),
        "pretrain_plan": {
            "dataset_name": plan.plans["dataset_name"],
            "plans_name": plan.plans["plans_name"],
            "configurations": {plan.configuration: {"spacing": resolved["spacing"], "patch_size": list(patch_size)}},
        },
        "pretrain_num_input_channels": channels,
        "recommended_downstream_patchsize": list(resolved["patch_size"]),
        "key_to_encoder": network.key_to_encoder,
        "key_to_stem": network.key_to_stem,
        "keys_to_in_proj": list(network.keys_to_in_proj),
        "key_to_lpe": None,
    }


def random_states(device: torch.device) -> dict[str, torch.Tensor | None]:
    """Return the states of torch's random numbers, on the CPU and on a GPU, for a training state."""
    of_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"torch_rng": torch.get_rng_state(), "device_rng": of_gpu}


def restore_random_states(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore the `random_states` in a training state."""
    torch.set_rng_state(state["torch_rng"])
    if device.type == "cuda" and state["device_rng"] is not None:
        torch.cuda.set_rng_state(state["device_rng"], device)
