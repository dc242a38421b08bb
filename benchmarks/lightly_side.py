"""SimCLR with PyTorch and the building blocks of lightly, as a good user of both would write it.

Channels-last, batch norm in evaluation mode, `requires_grad=False` for what is frozen, fused AdamW, views by
torchvision's transforms of version 2 on uint8 tensors, read ahead by worker processes. Imports no JAX.
"""

import os
from collections.abc import Collection

import numpy as np
import timm
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms.multi_view_transform import MultiViewTransform
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

MEAN, STD = 127.0, 128.0


class Views(Dataset):
    """Two views of every image, uint8."""

    def __init__(self, images: np.ndarray):
        """Keep the images as tensors; uint8 [n, h, w, 3]."""
        self._images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        side = images.shape[1]
        view = v2.Compose(
            [
                v2.RandomResizedCrop((side, side), scale=(0.5, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomVerticalFlip(),
                v2.ColorJitter(brightness=0.3, contrast=0.3),
            ]
        )
        self._views = MultiViewTransform([view, view])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> list[torch.Tensor]:
        return self._views(self._images[row])


class SimCLR:
    """EfficientNet-Lite0 with a projection head, and its optimizer."""

    def __init__(self, images: np.ndarray, trained: Collection[str], batch: int, workers: int):
        """Make network and reader.

        Args:
            images: uint8 [n, h, w, 3].
            trained: Names of the encoder's parameters that train.
            batch: Images per step; each gives two views.
            workers: Processes that read ahead.
        """
        torch.set_num_threads(os.cpu_count() or 1)
        encoder = timm.create_model("efficientnet_lite0", num_classes=0)
        self._encoder = encoder.to(memory_format=torch.channels_last).eval()
        names = {name for name, _ in encoder.named_parameters()}
        if unknown := set(trained) - names:
            raise ValueError(f"no parameters {sorted(unknown)}")
        for name, leaf in encoder.named_parameters():
            leaf.requires_grad_(name in trained)
        self._head = SimCLRProjectionHead(1280, 1280, 128)
        self._loss = NTXentLoss(temperature=0.2)
        leaves = [leaf for leaf in encoder.parameters() if leaf.requires_grad]
        self._optimizer = torch.optim.AdamW([*leaves, *self._head.parameters()], 1e-4, fused=True)
        self._batches = DataLoader(
            Views(images),
            batch,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            drop_last=True,
        )

    def epoch(self) -> float:
        """Train one epoch and return the last loss."""
        loss = torch.zeros(())
        for first, second in self._batches:
            x = torch.cat([first, second]).to(memory_format=torch.channels_last)
            x = (x.float() - MEAN) / STD
            one, other = self._head(self._encoder(x)).chunk(2)
            loss = self._loss(one, other)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
        return float(loss.detach())
