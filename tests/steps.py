"""Steps of a training, in this process or in two: fine-tuning on known batches, classification, pretraining."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_dataset import DATASET_JSON, make_plan
from tiny_pretraining import make_trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

EPOCHS = 3


def random_batch(trainer: Any, seed: int) -> dict[str, Any]:
    """A training batch as nnU-Net's loaders give it, of the network's own precision."""
    generator = torch.Generator().manual_seed(seed)
    size = trainer.configuration_manager.patch_size
    dtype = next(trainer.network.parameters()).dtype
    data = torch.randn(2, 1, *size, generator=generator, dtype=dtype)
    target = torch.randint(0, 3, (2, 1, *size), generator=generator)
    if not trainer.enable_deep_supervision:
        return {"data": data, "target": target, "keys": ["a", "b"]}
    scales = [[round(1 / s) for s in scale] for scale in trainer._get_deep_supervision_scales()]
    targets = [target[(..., *(slice(None, None, step) for step in scale))] for scale in scales]
    return {"data": data, "target": targets, "keys": ["a", "b"]}


def train_epochs(trainer: Any, first: int, end: int, rank: int = 0) -> list[dict[str, Tensor]]:
    """Train from an epoch to before another, two steps each. Returns the parameters before them and after each."""
    result = [parameters_of(trainer.network)]
    for epoch in range(first, end):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        for step in range(2):
            trainer.train_step(random_batch(trainer, seed=100 * rank + 10 * epoch + step))
        result.append(parameters_of(trainer.network))
    return result


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters by their names in nnU-Net's network."""
    plain = getattr(network, "module", network)
    plain = getattr(plain, "_orig_mod", plain)
    return {name: value.detach().clone() for name, value in plain.named_parameters()}


def train_on_two_ranks(folder: Path, finetune: dict[str, Any]) -> None:
    """Train as `train_epochs` in two processes of DDP, forked from this one; each writes FOLDER/RANK.pt."""
    torch.set_num_threads(1)  # a process that has threads may not fork
    torch.multiprocessing.start_processes(_train_on_one, (folder, finetune), nprocs=2, start_method="fork")


def _train_on_one(rank: int, folder: Path, finetune: dict[str, Any]) -> None:
    from pcrl_nnunet.trainers.finetune import PCRLFinetuneTrainer

    os.environ["nnUNet_results"] = str(folder / f"results_{rank}")
    plan = {**make_plan(finetune=finetune), "continue_training": False}
    trainer: Any = PCRLFinetuneTrainer(plan, "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))
    trainer.initialize()
    torch.manual_seed(rank)
    for parameter in trainer.network.parameters():
        parameter.data.normal_()  # DDP copies rank 0's weights
    # nnU-Net does the same, but only on the device cuda:RANK.
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    trainer.network = DistributedDataParallel(trainer.network)
    trainer.is_ddp = True
    trainer.loss = trainer._build_loss()
    torch.save(train_epochs(trainer, 0, EPOCHS, rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def classify_on_two_ranks(folder: Path, classify: dict[str, Any]) -> None:
    """Run a step, a validation and the final validation in two processes of DDP; each writes FOLDER/RANK.pt."""
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(_classify_on_one, (folder, classify), nprocs=2, start_method="fork")


def _classify_on_one(rank: int, folder: Path, classify: dict[str, Any]) -> None:
    from pcrl_nnunet.trainers.classify import PCRLClassificationScratchTrainer

    os.environ |= {"nnUNet_results": str(folder / f"results_{rank}"), "nnUNet_n_proc_DA": "0"}
    plan = {**make_plan(classify=classify), "continue_training": False}
    trainer: Any = PCRLClassificationScratchTrainer(plan, "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))
    trainer.initialize()
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    trainer.network = DistributedDataParallel(trainer.network)
    trainer.is_ddp, trainer.local_rank = True, rank
    train, validation = trainer.get_dataloaders()
    batch = next(train)
    trainer.train_step(batch)
    with torch.no_grad():  # as in nnU-Net's loop
        of_rank = trainer.validation_step(next(validation))
    trainer.on_validation_epoch_end([of_rank])
    trainer.perform_actual_validation()
    found = {
        "batch": len(batch["data"]),
        "split": trainer.do_split(),
        "parameters": parameters_of(trainer.network),
        "logits": torch.from_numpy(of_rank["logits"]),
        "auroc": float(trainer.logger.get_value("mean_fg_dice", None)[-1]),
        "validated": os.path.isfile(os.path.join(trainer.output_folder, "validation", "auroc.json")),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def pretrain_on_ranks(folder: Path, steps: int) -> None:
    """Steps of a pretraining in one process, and in two that share its batches; FOLDER/RANK-OF-SIZE.pt of each.

    Then one more, in which a case of the second process is not finite.
    """
    torch.set_num_threads(1)
    for size in (1, 2):
        torch.multiprocessing.start_processes(_pretrain_on_one, (size, folder, steps), size, start_method="fork")


def _pretrain_on_one(rank: int, size: int, folder: Path, steps: int) -> None:
    from pcrl_nnunet.errors import UserError

    name = f"{rank}-of-{size}"
    os.environ |= {"nnUNet_results": str(folder / name), "LOCAL_RANK": str(rank)}
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    trainer = make_trainer(batch_size=5, epochs=1, iters_per_epoch=steps + 1)
    torch.manual_seed(rank)
    trainer.initialize()
    if rank > 0:
        for parameter in trainer.network.parameters():
            parameter.data.normal_()  # rank 0's weights replace them
    trainer.on_train_start()
    found: dict[str, Any] = {"losses": [], "gradients": [], "weights": [], "cases": []}
    for step in range(steps):
        batch = next(trainer.dataloader_train)
        found["cases"].append(batch["cases"])
        found["losses"].append(trainer.train_step(batch, step))
        named = trainer.network.named_parameters()
        found["gradients"].append({n: p.grad.clone() for n, p in named if p.grad is not None})
        found["weights"].append({n: t.clone() for n, t in trainer.network.state_dict().items()})
    batch = next(trainer.dataloader_train)
    if rank == size - 1:
        batch["input"][-1] = float("nan")
    try:
        trainer.train_step(batch, steps)
    except UserError as error:
        found["error"] = str(error)
    found["cases"].append(batch["cases"])
    found["parameters"] = parameters_of(trainer.network)
    torch.save(found, folder / f"{name}.pt")
    if size > 1:
        dist.destroy_process_group()


def semi_on_two_ranks(folder: Path, plan: dict[str, Any]) -> None:
    """A semi-supervised training without validation in two processes of DDP; each writes FOLDER/RANK.pt."""
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(_semi_on_one, (folder, plan), nprocs=2, start_method="fork")


def _semi_on_one(rank: int, folder: Path, plan: dict[str, Any]) -> None:
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module

    from pcrl_nnunet.trainers.semi import PCRLSemiSupervisedScratchTrainer

    os.environ |= {"nnUNet_results": str(folder / f"results_{rank}"), "nnUNet_n_proc_DA": "0"}
    plans = {**plan, "continue_training": False}
    trainer: Any = PCRLSemiSupervisedScratchTrainer(plans, "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    trainer.is_ddp, trainer.local_rank = True, rank
    vars(module)["DDP"] = lambda network, device_ids: DistributedDataParallel(network)  # nnU-Net's DDP needs a GPU
    torch.manual_seed(rank)  # DDP copies rank 0's weights
    trainer.initialize()
    trainer.dataloader_train, _ = trainer.get_dataloaders()
    trainer._not_finite = set()
    found: dict[str, Any] = {"counts": [], "voxels": [], "data": []}
    for epoch in range(trainer.num_epochs):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        outputs = []
        for _ in range(trainer.num_iterations_per_epoch):
            batch = next(trainer.dataloader_train)
            found["data"].append(batch["data"].clone())
            outputs.append(trainer.train_step(batch))
        found["counts"].append(trainer._watch.counts.clone())
        found["voxels"].append(trainer._watch.voxels)
        trainer.on_train_epoch_end(outputs)
    found |= {
        "student": parameters_of(trainer.network),
        "teacher": trainer._teacher.state_dict(),
        "history": [vars(epoch) for epoch in trainer._history],
        "picture": os.path.isfile(os.path.join(trainer.output_folder, "pseudo_labels.png")),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def semi_until_sigterm(plan: dict[str, Any], epoch: int) -> None:
    """Train semi-supervised with a checkpoint after each epoch. SIGTERM comes in the first step of an epoch."""
    from pcrl_nnunet.trainers import semi

    torch.set_num_threads(1)
    vars(semi)["draw_pseudo_labels"] = lambda *args: None
    plans = {**plan, "continue_training": False}
    trainer: Any = semi.PCRLSemiSupervisedScratchTrainer(plans, "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))
    trainer.save_every = 1
    trainer.plot_network_architecture = lambda: None
    trainer.logger.plot_progress_png = lambda folder: None
    step = trainer.train_step

    def stopped_step(batch: dict[str, Any]) -> Any:
        if trainer.current_epoch == epoch:
            os.kill(os.getpid(), signal.SIGTERM)
            print("after SIGTERM")  # noqa: T201  (the test looks for it)
        return step(batch)

    trainer.train_step = stopped_step
    trainer.run_training()
