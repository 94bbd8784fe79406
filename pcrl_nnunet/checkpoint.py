"""Files of a pretraining: tensors and plain values only, written whole or not at all.

``checkpoint_final.pth`` is what fine-tuning takes; it loads with ``torch.load(weights_only=True)``, and

- ``network_weights`` is the state dict of the plan's own network with the pretrained encoder in it, so that nnU-Net's
  ``-pretrained_weights`` takes it; ``random_keys`` names what in it is not pretrained;
- ``nnssl_adaptation_plan``, ``citations`` and ``architecture_kwargs`` are what nnU-Net's loader of nnssl checkpoints
  reads;
- the rest says what it is: method, settings, plan, cases, versions, epochs, loss.

``checkpoint_latest.pth`` beside it is the training state, there until the training is finished, and
``checkpoint_previous.pth`` the one before, for the case that a disk has damaged the latest.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from pcrl_nnunet.config import without_settings
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import whole

FORMAT = "pcrl_nnunet/1"  # of what fine-tuning takes
STATE_FORMAT = "pcrl_nnunet/state/4"  # of what --c takes
FINAL = "checkpoint_final.pth"
LATEST = "checkpoint_latest.pth"
PREVIOUS = "checkpoint_previous.pth"
DAMAGED = "checkpoint_damaged.pth"  # a latest one that could not be read, until the training is done

# What nnU-Net's own checkpoints hold besides tensors and plain values: scores, as numpy's numbers. They are data.
_SCALAR = np.float32(0).__reduce__()[0]
_NUMPY: list[Any] = [
    *((_SCALAR, f"{package}.multiarray.scalar") for package in ("numpy._core", "numpy.core")),  # as numpy 2 and 1 say
    *(np.dtype, *(type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool"))),
]


def write(path: str, content: Mapping[str, Any], previous: str | None = None) -> None:
    """Write to a temporary name, flush to disk, rename: the last good file survives whatever happens meanwhile.

    Args:
        previous: what the file that is there becomes; None: it goes.
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
    except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of a disk that is full
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"could not write {path} ({reason}); the file of that name, if any, is the last good one: "
            f"make room or the folder writable and continue with --c"
        ) from error


def _flush_names(folder: str) -> None:
    """To the disk: after a power cut, files that have been renamed are found under their new names."""
    with suppress(OSError):  # Windows and some network file systems do not offer it for folders; the files are there
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: str, expected_format: str = FORMAT) -> dict[str, Any]:
    """A file that `write` wrote, on the CPU.

    Raises:
        UserError: missing, truncated, not of ours, or holding pickled code.
    """
    content = read_any(path)
    if content.get("format") == expected_format:
        return content
    raise UserError(
        _other_format(path, content, expected_format)
        or f"checkpoint {path} is not one of pcrl_nnunet_pretrain's (format '{expected_format}' expected)"
    )


def read_encoder(path: str) -> dict[str, Any]:
    """Any checkpoint that holds the encoder of a U-Net of nnU-Net's, in the form of ours, on the CPU.

    That is one of our own, one of nnssl (the OpenMind models), or one of a supervised training of nnU-Net. What the
    latter two do not tell is None or empty: ``plans`` (nnssl), ``cases``, ``epochs``.

    Raises:
        UserError: as `read`, or none of the three.
    """
    content = read_any(path)
    if content.get("format") == FORMAT:
        return content
    if isinstance(content.get("network_weights"), dict) and "format" not in content:
        for read_as in (_of_nnssl, _of_nnunet):
            try:
                found = read_as(content)
            except (LookupError, TypeError, AttributeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise UserError(
                    f"checkpoint {path} lacks what its kind should have ({reason}); get it again"
                ) from error
            if found is not None:
                return found
    raise UserError(
        _other_format(path, content, FORMAT)
        or f"checkpoint {path} holds no encoder that is known; expected checkpoint_final.pth of pcrl_nnunet_pretrain "
        f"or of nnU-Net, or a model of nnssl"
    )


def _other_format(path: str, content: Mapping[str, Any], expected_format: str) -> str | None:
    """What to say of a file of ours that is not of the expected kind."""
    if content.get("format") == STATE_FORMAT:
        return f"checkpoint {path} is of an unfinished pretraining; finish it with --c, take {FINAL}"
    if str(content.get("format")).startswith(expected_format.rsplit("/", 1)[0]):
        return (
            f"checkpoint {path} was written by another version of pcrl_nnunet (format '{content['format']}', "
            f"'{expected_format}' expected); go on with that version, or pretrain again"
        )
    return None


def _of_nnssl(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """A model of nnssl, which says under what names it keeps the encoder; None if it is none."""
    if "nnssl_adaptation_plan" not in content:
        return None
    plan = content["nnssl_adaptation_plan"]
    pretraining = plan.get("pretrain_plan") or {}
    # Only the encoder is taken, under nnU-Net's names. (PlainConvUNet's stem lies in the encoder's first stage.)
    weights = {}
    for name, tensor in content["network_weights"].items():
        for key, ours in (("key_to_encoder", "encoder.stages."), ("key_to_stem", "encoder.stem.")):
            if plan.get(key) and name.startswith(f"{plan[key]}."):
                weights[ours + name.removeprefix(f"{plan[key]}.")] = tensor
                break
    (configuration,) = list(pretraining.get("configurations") or {"unknown": None})[:1]
    return {
        **_from_elsewhere(weights),
        "nnssl_adaptation_plan": plan,
        "method": "nnssl",
        "citations": content.get("citations", []),
        "datasets": [pretraining.get("dataset_name") or "unknown"],
        "configuration": configuration,
        "plans": None,
    }


def _of_nnunet(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """A supervised training of nnU-Net; None if it is none."""
    if "init_args" not in content:
        return None
    plans, configuration = content["init_args"]["plans"], content["init_args"]["configuration"]
    weights, dataset_json = content["network_weights"], content["init_args"]["dataset_json"]
    names = dataset_json.get("channel_names") or dataset_json["modality"]  # "modality" as in nnU-Net v1
    this = PlansManager(dict(plans)).get_configuration(configuration).configuration
    return {
        **_from_elsewhere(weights),
        "num_input_channels": len(names),  # of images: a cascade's labels come after them
        "nnssl_adaptation_plan": {"architecture_plans": _architecture_plans(this["architecture"])},
        "method": f"supervised training ({content.get('trainer_name')})",
        "citations": [],
        "datasets": [plans["dataset_name"]],
        "configuration": configuration,
        "plans": plans,
        "fold": content["init_args"].get("fold"),
        "epochs": content.get("current_epoch"),
    }


def _from_elsewhere(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    convolutions = [tensor for tensor in weights.values() if tensor.ndim >= 4]
    return {
        "network_weights": dict(weights),
        "random_keys": [],
        "num_input_channels": int(convolutions[0].shape[1]) if convolutions else 0,  # of the first one
        "cases": [],
        "all_cases_known": False,
        "fold": None,
        "epochs": None,
    }


def read_any(path: str) -> dict[str, Any]:
    """A file of tensors and plain values, whatever it is, on the CPU; `UserError` as `read`."""
    if not os.path.isfile(path):
        raise UserError(f"checkpoint {path} does not exist; run pcrl_nnunet_pretrain, or check the path")
    try:
        if not zipfile.is_zipfile(path):  # what torch.save writes is one, from its last bytes on
            raise ValueError("not a whole file of torch.save")
        with zipfile.ZipFile(path) as archive:  # torch.load looks at no checksum
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is another")
        with torch.serialization.safe_globals(_NUMPY):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"checkpoint {path} may not be read ({error.strerror}); correct its permissions") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} holds more than tensors and plain values and was not loaded, as it could run code; "
            f"expected a file that pcrl_nnunet_pretrain wrote"
        ) from error
    except Exception as error:  # a damaged header may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"checkpoint {path} cannot be read ({reason}): it is truncated or damaged; copy it again or pretrain again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} holds no block of names and values; expected one of pcrl_nnunet_pretrain's")
    return content


def encoder_hash(encoder: nn.Module | Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and values of a state dict, independent of device and of the order of the keys."""
    state = encoder.state_dict() if isinstance(encoder, nn.Module) else encoder
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def plans_hash(plans: Mapping[str, Any]) -> str:
    """sha256 of a plan less our settings, which change without changing data or network."""
    return hashlib.sha256(json.dumps(without_settings(plans), sort_keys=True).encode()).hexdigest()


def nnssl_adaptation_plan(
    plans: Mapping[str, Any],
    name: str,
    configuration: Mapping[str, Any],
    patch_size: tuple[int, ...],
    channels: int,
    network: Any,
) -> dict[str, Any]:
    """What nnU-Net's loader of nnssl checkpoints needs to rebuild the encoder and to find it in `network_weights`.

    Args:
        plans: nnU-Net's plan.
        name, configuration: of the configuration, and what nnU-Net's `ConfigurationManager` holds for it.
        patch_size: the pretraining's global input size, voxels.
        channels: input channels of the pretraining.
        network: the plan's own network.
    """
    architecture = configuration["architecture"]
    return {
        # nnU-Net's dynamic loader looks for stages and kernels in here, or at the top of the file
        "architecture_kwargs": architecture["arch_kwargs"],
        "architecture_plans": _architecture_plans(architecture),
        "pretrain_plan": {
            "dataset_name": plans["dataset_name"],
            "plans_name": plans["plans_name"],
            "configurations": {name: {"spacing": configuration["spacing"], "patch_size": list(patch_size)}},
        },
        "pretrain_num_input_channels": channels,
        "recommended_downstream_patchsize": list(configuration["patch_size"]),
        "key_to_encoder": network.key_to_encoder,
        "key_to_stem": network.key_to_stem,
        "keys_to_in_proj": list(network.keys_to_in_proj),
        "key_to_lpe": None,
    }


def _architecture_plans(architecture: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "arch_class_name": architecture["network_class_name"].rsplit(".", 1)[-1],
        "arch_kwargs": architecture["arch_kwargs"],
        "arch_kwargs_requiring_import": list(architecture["_kw_requires_import"]),
    }
