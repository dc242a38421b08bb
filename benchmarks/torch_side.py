"""The PyTorch side, as a good PyTorch user would write it.

Channels-last, uint8 images normalised in the step, `requires_grad=False` for what is frozen (autograd then
builds nothing below the first trained layer), batch norm in evaluation mode, fused Adam, inference mode where
nothing trains. Imports no
JAX: its memory is its own.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import timm
import torch
import torchvision

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def network(model: str, outputs: int, keep: int = 0, size: int = 224) -> torch.nn.Module:
    """A network by the name that dapt_jax has for it.

    Args:
        model: `resnet18`, `resnet34`, `resnet50` (torchvision), `efficientnet_lite0`, `vit_small` or `vit_base`
            (timm).
        outputs: logits.
        keep: of a residual network, stages to keep; 0 for all.
        size: side of a transformer's images in pixels.
    """
    if model.startswith("vit"):
        return timm.create_model(f"{model}_patch16_224", num_classes=outputs, img_size=size)
    if not model.startswith("resnet"):
        return timm.create_model(model, num_classes=outputs)
    made = torchvision.models.get_model(model, num_classes=outputs)
    if keep:
        for number in range(keep + 1, 5):
            setattr(made, f"layer{number}", torch.nn.Identity())
        last = getattr(made, f"layer{keep}")[-1]
        features = (last.conv3 if hasattr(last, "conv3") else last.conv2).out_channels
        made.fc = torch.nn.Linear(features, outputs)
    return made


def fill(made: torch.nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Gives a network weights by their names in it; all of them."""
    tensors = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in arrays.items()}
    result = made.load_state_dict(tensors, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or result.unexpected_keys:
        raise ValueError(f"missing {missing}, unexpected {result.unexpected_keys}")


class Trainer:
    """A network and its optimizer; what trains may grow from phase to phase, moments are kept."""

    def __init__(
        self, made: torch.nn.Module, dtype: str = "float32", device: str = "cpu", compiled: bool = False
    ):
        """Freeze everything at first.

        Args:
            made: The network.
            dtype: Dtype of activations; parameters stay in float32.
            device: `cpu` or `cuda`.
            compiled: Whether `torch.compile` compiles the forward and backward pass.
        """
        torch.set_num_threads(os.cpu_count() or 1)
        self.network = made.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self._forward = torch.compile(self.network) if compiled else self.network
        self._device = torch.device(device)
        self._mean, self._std = (torch.tensor(each, device=device).view(1, 3, 1, 1) for each in (MEAN, STD))
        self._bfloat16 = dtype == "bfloat16"
        self._optimizer: torch.optim.Optimizer | None = None
        self._trained: set[str] = set()

    def train_only(self, names: Iterable[str], lr: float) -> None:
        """Begins a phase in which the named parameters train."""
        names = set(names)
        for name, leaf in self.network.named_parameters():
            leaf.requires_grad_(name in names)
        new = [leaf for name, leaf in self.network.named_parameters() if name in names - self._trained]
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam(new, lr, eps=1e-7, fused=True)
        elif new:
            self._optimizer.add_param_group({"params": new})
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._trained |= names

    def logits(self, images: np.ndarray) -> torch.Tensor:
        """uint8 [b, h, w, 3] to float32 [b, outputs]."""
        x = torch.from_numpy(images).to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        x = (x.float() - self._mean) / self._std
        half = (
            torch.autocast(self._device.type, torch.bfloat16) if self._bfloat16 else contextlib.nullcontext()
        )
        with half:
            return self._forward(x).float()

    def wait(self) -> None:
        """Wait for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def step(self, images: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> None:
        """One step of the optimizer on a batch; the loss is the weighted mean of the cross-entropy."""
        assert self._optimizer is not None
        self._optimizer.zero_grad(set_to_none=True)
        truth = torch.from_numpy(labels).long().to(self._device)
        weight = torch.from_numpy(weights).to(self._device)
        each = torch.nn.functional.cross_entropy(self.logits(images), truth, reduction="none")
        ((each * weight).sum() / weight.sum()).backward()
        self._optimizer.step()

    @torch.inference_mode()
    def forward(self, images: np.ndarray) -> np.ndarray:
        """Logits with nothing kept for a gradient."""
        return self.logits(images).cpu().numpy()


class Step:
    """One step with a batch of random images, as `our_step.Step` is."""

    def __init__(self, options: dict[str, Any]):
        """Runs it once.

        Args:
            options: `model`, `outputs`, `dtype`, `names` (parameters that train; none for a forward pass),
                `size`, `batch`, and where it runs: `device` (the CPU by default), `compile`.
        """
        made = network(options["model"], options["outputs"], size=options["size"])
        device, compiled = options.get("device", "cpu"), options.get("compile", False)
        self._trainer = Trainer(made, options["dtype"], device, compiled)
        batch, size = options["batch"], options["size"]
        self._images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3)).astype(np.uint8)
        self._labels, self._weights = np.arange(batch) % options["outputs"], np.ones(batch, np.float32)
        self._trains = bool(options["names"])
        if self._trains:
            self._trainer.train_only(options["names"], 1e-4)
        self()

    def __call__(self) -> None:
        """Runs the step to its end."""
        if self._trains:
            self._trainer.step(self._images, self._labels, self._weights)
        else:
            self._trainer.forward(self._images)
        self._trainer.wait()

    def seconds(self, steps: int) -> float:
        """Median time of some steps."""
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            self()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
