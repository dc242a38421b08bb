"""A made-up study of five strategies and three seeds, as a workdir, for the tests of the report."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from dapt_jax.records.ledger import Row
from dapt_jax.runtime import atomic_files

# name: development AUC, external AUC, phases as (name, epochs, TFLOP per epoch, trained parameters)
STRATEGIES = {
    "none": (0.941, 0.812, []),
    "full": (0.974, 0.858, [("head", 4, 40, 2_049), ("body", 12, 420, 23_455_000)]),
    "partial": (0.966, 0.842, [("head", 4, 40, 2_049), ("last block", 12, 60, 4_461_569)]),
    "hybrid": (
        0.975,
        0.863,
        [("head", 4, 40, 2_049), ("last block", 8, 60, 4_461_569), ("body", 4, 420, 23_455_000)],
    ),
    "simplified": (0.921, 0.871, [("head", 4, 12, 257), ("body", 12, 110, 224_129)]),
}
CLASSES = ["glioma", "meningioma", "pituitary"]


def write(
    workdir: Path, seeds=(0, 1, 2), splits=("development", "external"), strategies=tuple(STRATEGIES)
) -> Path:
    """Writes config.json, results.jsonl and ledger.jsonl."""
    random = np.random.default_rng(7)
    config = {
        "title": "Brain tumours: adapting ResNet-50 from natural images",
        "note": "Source: slices of BraTS. Target: CE-MRI; external: other scanners.",
        "synthetic": True,
        "data_note": "Made by the phantom generator.",
        "model": "resnet50",
        "strategies": list(strategies),
        "seeds": list(seeds),
        "report": {"metric": "auc", "protocol": "linear"},
    }
    results, rows = [], []
    for name in strategies:
        for seed in seeds:
            results += _results(random, name, seed, splits)
            rows += _rows(random, name, seed)
    for split in splits:
        baseline = {"strategy": "baseline", "seed": 0, "task": "tumour type", "split": split}
        value = {"development": 0.71, "test": 0.70, "external": 0.66}[split]
        results.append(
            {**baseline, "protocol": "mean_gradient", "metric": "auc", "value": value, "n": 460, "classes": 3}
        )
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(config))
    atomic_files.write(workdir / "results.jsonl", results)
    atomic_files.write(workdir / "ledger.jsonl", (dataclasses.asdict(row) for row in rows))
    return workdir


def _results(random, name, seed, splits):
    development, external, _ = STRATEGIES[name]
    luck = random.normal(0, 0.006)
    for split in splits:
        level = {"development": development, "test": development - 0.004, "external": external}[split]
        for protocol, gain in (("linear", 0.0), ("mlp_small", 0.006)):
            auc = level + gain + luck + random.normal(0, 0.004 if split == "development" else 0.009)
            metrics = {"auc": auc, "balanced_accuracy": auc - 0.12, "ece": 0.3 * (1 - auc) + 0.01}
            metrics |= {
                f"auc/{label}": auc + shift for label, shift in zip(CLASSES, (0.01, -0.02, 0.01), strict=True)
            }
            for metric, value in metrics.items():
                yield {
                    "strategy": name,
                    "seed": seed,
                    "init": "imagenet",
                    "model": "resnet50",
                    "task": "tumour type",
                    "split": split,
                    "protocol": protocol,
                    "metric": metric,
                    "value": round(float(value), 6),
                    "n": 612 if split == "development" else 460,
                    "classes": CLASSES,
                }


def _rows(random, name, seed):
    machine = {
        "device": "NVIDIA A100-SXM4-40GB",
        "devices": 1,
        "energy_source": "nvml",
        "total_params": 23_508_032,
    }
    loss = 0.69
    for phase, epochs, teraflops, trained in STRATEGIES[name][2]:
        flops = int(epochs * teraflops * 1e12)
        train_s = flops / 6e12 * random.uniform(0.95, 1.05)
        reused = phase == "head" and name != "full" and name != "simplified"
        curve = []
        for epoch in range(epochs):
            loss *= (0.97 if phase == "head" else 0.9) + random.normal(0, 0.01)
            curve.append(
                {
                    "epoch": epoch,
                    "loss": loss,
                    "val_loss": loss * 1.1 + 0.02 + random.normal(0, 0.006),
                    "lr": 1e-4,
                }
            )
        spent = 0.1 * train_s if reused else train_s
        parts = {
            "train_s": spent,
            "compile_s": 21.0,
            "data_s": 0.06 * spent,
            "eval_s": 9.0,
            "checkpoint_s": 4.0,
        }
        parts["cache_s"] = 11.0 if phase == "head" else 0.0
        wall = math.fsum(parts.values()) + 3.0
        yield Row(
            name,
            seed,
            "dapt",
            phase,
            steps=epochs * 500,
            images=epochs * 8000,
            model_flops=flops // 10 if reused else flops,
            hardware_flops=flops // 10 if reused else flops,
            **parts,
            wall_s=wall,
            peak_bytes=9 * 2**30,
            energy_kwh=wall * 0.35 / 3600,
            trainable_params=trained,
            cached="reused" if reused else "filled" if phase == "head" else "off",
            reused_flops=flops - flops // 10 if reused else 0,
            reused_s=0.9 * train_s if reused else 0.0,
            curve=curve,
            **machine,
        )
    yield Row(
        name,
        seed,
        "transfer",
        "tumour type/linear",
        model_flops=int(31e12 if name != "simplified" else 9e12),
        hardware_flops=int(31e12 if name != "simplified" else 9e12),
        train_s=12.0,
        compile_s=8.0,
        eval_s=6.0,
        cache_s=14.0,
        wall_s=42.0,
        energy_kwh=0.004,
        trainable_params=6_147,
        **machine,
    )
