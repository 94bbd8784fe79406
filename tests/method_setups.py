"""Small plans of many kinds, with a method's network and batch for each: the contract tests run on them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.loading.samples import Sample, Views
from pcrl_nnunet.methods import Method, PlanFacts, Preparation, method_class
from pcrl_nnunet.pretraining.preparation import make_anew, prepares

CASE = Case("case", "nowhere.b2nd")
SETUPS: dict[str, dict[str, Any]] = {
    "3D": {"patch": (24, 24, 24), "strides": [(1, 1, 1), (2, 2, 2), (2, 2, 2)]},
    "2D": {"patch": (32, 32), "strides": [(1, 1), (2, 2), (2, 2)]},
    "four channels, anisotropic": {"patch": (8, 32, 24), "strides": [(1, 1, 1), (1, 2, 2), (2, 2, 2)], "channels": 4},
    "residual encoder": {"patch": (24, 24, 24), "strides": [(1, 1, 1), (2, 2, 2), (2, 2, 2)], "residual": True},
}
# Forms of methods that keep the contract, too: the name of the method, and settings.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {"pcrlv2 with points": ("pcrlv2", {"comparison": "dense"})}


class Setup:
    """A plan, and a method's settings and network on it. A test of a plan that the method refuses is skipped.

    Args:
        method: name, or one of `FORMS`.
        name: of `SETUPS`.
    """

    def __init__(self, method: str, name: str) -> None:
        given = SETUPS[name]
        method, settings = FORMS.get(method, (method, {}))
        self.method: type[Method] = method_class(method)
        if len(given["patch"]) not in self.method.dimensions:
            pytest.skip(f"{method} is not for {len(given['patch'])}D plans")
        self.channels: int = given.get("channels", 1)
        patch, strides = given["patch"], given["strides"]
        self.plan = PlanFacts(
            "3d_fullres", patch, 2, tuple(strides), tuple(p * 1.2 for p in patch), (1.0,) * len(patch)
        )
        self.settings, self.batch_size = self.method.configure(self.plan, settings)
        self.residual: bool = given.get("residual", False)

    def network(self) -> torch.nn.Module:
        """Build the plan's network from a fixed seed."""
        torch.manual_seed(0)
        dim, n = len(self.plan.patch_size), len(self.plan.strides)
        blocks = "n_blocks_per_stage" if self.residual else "n_conv_per_stage"
        kind = "ResidualEncoderUNet" if self.residual else "PlainConvUNet"
        return get_network_from_plans(
            f"dynamic_network_architectures.architectures.unet.{kind}",
            {
                "n_stages": n,
                "features_per_stage": [4, 8, 8],
                "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
                "kernel_sizes": [[3] * dim] * n,
                "strides": self.plan.strides,
                blocks: [1] * n,
                "n_conv_per_stage_decoder": [1] * (n - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            ["conv_op", "norm_op", "dropout_op", "nonlin"],
            self.channels,
            3,
            allow_init=True,
            deep_supervision=True,
        )

    def trained(self) -> Method:
        """Build the method on the plan's network."""
        return self.method(self.network(), self.channels, self.settings)

    def views(self) -> Views:
        """Return the views that make samples."""
        return self.method.views(self.settings, self.plan, self.channels, self.prepared())

    def prepared(self) -> dict[str, Any]:
        """Return the method's preparation for the case of the samples."""
        if not prepares(self.method):
            return {}
        with TemporaryDirectory() as folder:
            case = Case(CASE.name, os.path.join(folder, "case.npy"))
            np.save(case.path, self.volume())
            given = Preparation([case], self.network(), self.channels, self.settings, 0, torch.device("cpu"))
            return make_anew(self.method, given)

    def volume(self, constant: bool = False) -> np.ndarray:
        """Return an image with structures, or a constant one; in 2D a volume of slices."""
        shape = [round(size * 1.2) for size in self.plan.patch_size]
        shape = [5, *shape] if len(shape) == 2 else shape
        rng = np.random.default_rng(0)
        image = rng.normal(size=(self.channels, *shape)).astype(np.float32)
        image[:, :, : shape[1] // 2] += 2
        return np.zeros_like(image) if constant else image

    def sample(self, seed: int = 0, constant: bool = False) -> Sample:
        """Make a sample."""
        return self.views()(CASE, self.volume(constant), np.random.default_rng(seed))

    def batch(self, number: int, constant: bool = False) -> Mapping[str, torch.Tensor]:
        """Make a batch of samples."""
        samples = [self.sample(seed, constant) for seed in range(number)]
        return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}


def gradients(method: Method, batch: Mapping[str, torch.Tensor], drawn: Any) -> dict[str, torch.Tensor]:
    """Return the gradient of one step by the parameter's name; parameters without one are absent."""
    method.zero_grad(set_to_none=True)
    method(batch, drawn).loss.backward()
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
