"""What the settings that save work by an approximation cost in scores, on brain tumours.

    python -m benchmarks.less_work --data=../shared/data --csv=benchmarks/results/less_work.csv
    python -m benchmarks.less_work --encoders vit_small_dinov2 --data=../shared/data

A third of the corpus of configs/brain_mri.py adapts an encoder, its development slices train linear heads, and the
slices of other patients are scored. An arm is compared with the one named in `against`, which differs in nothing
but the setting, seed by seed: first adaptations compile and are left out of the seconds.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence

import numpy as np

import dapt_jax as dj
from benchmarks import common
from dapt_jax.data.augment import Augment
from dapt_jax.models import registry
from dapt_jax.statistics import mean_interval
from dapt_jax.training.cache.policy import Caching
from dapt_jax.training.context import Executables, RunContext

CLASSES = ("glioma", "meningioma", "pituitary")
HEAD = dj.Phase("head", 5, ("head",), 1e-3, augment=False)


ENCODERS = LITE, VIT = "efficientnet_lite0", "vit_small_dinov2"


@dataclasses.dataclass(frozen=True)
class Arm:
    """An adaptation.

    Attributes:
        name: Name for people.
        against: Name of the arm without the setting; empty for that arm itself.
        phases: Phases after that of the head.
        dtype: Dtype of cached activations.
        options: Options of the encoder that differ from those of its weights.
    """

    name: str
    against: str
    phases: tuple[dj.Phase, ...]
    dtype: str = ""
    options: dict[str, float] = dataclasses.field(default_factory=dict)


def arms(encoder: dj.PretrainedEncoder) -> tuple[Arm, ...]:
    """Return the arms of an encoder; those of images of another size and of caches are of a convolutional one."""
    whole = dj.Phase("all", 3, ("*",), 1e-4)
    small = dj.Phase("small", 2, ("*",), 1e-4, image_size=48)
    groups = encoder.encoder.groups
    plain = Arm("all layers", "", (whole,))
    depth = Arm("drop_path .3", "", (whole,), options={"drop_path": 0.3})
    subset = Arm(
        "drop_path_subset", depth.name, (whole,), options={**depth.options, "drop_path_subset": True}
    )
    if encoder.encoder.token_patch:
        patches = Arm("patch_dropout .5", plain.name, (whole,), options={"patch_dropout": 0.5})
        return plain, patches, depth, subset
    partial = dj.Phase("partial", 3, (*groups[-3:], "head"), 1e-4, views=2)
    return (
        plain,
        Arm("2 of 3 epochs at 48 px", plain.name, (small, dataclasses.replace(whole, epochs=1))),
        Arm("last 3 groups, cached", "", (partial,)),
        Arm("cache.dtype bfloat16", "last 3 groups, cached", (partial,), "bfloat16"),
        Arm("cache.dtype int8", "last 3 groups, cached", (partial,), "int8"),
        depth,
        subset,
    )


def load(data: str, split: str, size: int, every: int = 1) -> dj.Dataset:
    """Return slices of a part of the set."""
    path = f"{data}/brain_mri/manifest.csv"
    found = dj.load_dataset("manifest", path, image_size=size, classes=CLASSES, where=f"split={split}")
    return found.take(np.arange(0, len(found), every))


def measure(
    arm: Arm, encoder: dj.PretrainedEncoder, sets: tuple[dj.Dataset, ...], seeds: int
) -> tuple[common.Row, dict[str, list[float]]]:
    """Adapt with every seed; return the costs, and the AUC by split and seed.

    Raises:
        RuntimeError: The ledger's FLOPs are not the plan's.
    """
    corpus, development, test = sets
    if arm.options:
        options = dataclasses.replace(encoder.encoder.options, **arm.options)
        trunk = registry.build(encoder.encoder.name, options)
        encoder = dataclasses.replace(encoder, encoder=trunk)
    seconds, found = [], dict[str, list[float]](development=[], test=[])
    executables = Executables()
    for seed in range(seeds):
        run = dj.adaptation_run(
            encoder,
            corpus,
            [HEAD, *arm.phases],
            val_fraction=0,
            seed=seed,
            augment=Augment("horizontal", 0.05),
            caching=Caching(dtype=arm.dtype),
        )
        start = time.process_time()
        trained = dj.train(run, encoder, RunContext(executables=executables))
        seconds.append(time.process_time() - start)
        if (spent := sum(row.model_flops for row in trained.costs)) != run.flops():
            raise RuntimeError(f"{arm.name}: {spent} FLOPs in the ledger; expected {run.flops()}, as planned")
        rows = dj.evaluate(trained.encoder, development, test, seed=0)
        auc = {row["split"]: float(row["value"]) for row in rows if row["metric"] == "auc"}
        found["development"].append(auc["development"])
        found["test"].append(auc["external"])
    cached = run.cache_decision(run.programs[-1])
    costs = {
        "TFLOP": run.flops() / 1e12,
        "CPU s": common.middle(seconds[1:] or seconds),
        "cached MiB": cached.bytes / 2**20 if cached.cached else None,
        "approximations": "; ".join(row.approximations for row in trained.costs if row.approximations),
    }
    return costs, found


def table(
    name: str, weights: str, size: int, data: str, seeds: int, only: Sequence[str] | None
) -> list[common.Row]:
    """Return a row for each arm of an encoder, or each of `only` and what it is compared with."""
    encoder = dj.load_encoder(name, weights)
    sets = load(data, "corpus", size, 3), load(data, "dev", size), load(data, "test", size)
    rows, of_arm = [], {}
    every = arms(encoder)
    wanted = {arm.name for arm in every} if only is None else set(only)
    wanted |= {arm.against for arm in every if arm.name in wanted}
    for arm in (each for each in every if each.name in wanted):
        costs, found = measure(arm, encoder, sets, seeds)
        of_arm[arm.name] = costs, found
        row: common.Row = {"model": name, "px": size, "arm": arm.name, "against": arm.against, "seeds": seeds}
        row |= {"corpus": len(sets[0]), **costs}
        other_costs, other = of_arm[arm.against or arm.name]
        row["of its FLOPs"] = costs["TFLOP"] / other_costs["TFLOP"]
        for split, values in found.items():
            interval = mean_interval(values)
            row[f"{split} AUC"] = interval.mean if interval else None
            change = mean_interval([a - b for a, b in zip(values, other[split], strict=True)])
            is_compared = bool(arm.against) and change is not None
            row[f"{split} change"] = change.mean if is_compared and change else None
            row[f"{split} low"] = change.low if is_compared and change else None
            row[f"{split} high"] = change.high if is_compared and change else None
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Measure the arms of both encoders, or of the one that is named."""
    options: argparse.ArgumentParser = common.parser(__doc__)
    options.add_argument(
        "--encoders", nargs="+", choices=ENCODERS, default=ENCODERS, help="Encoders that are measured."
    )
    options.add_argument(
        "--vit",
        default="package:dinov2_vits14",
        help="Weights of vit_small_dinov2 (docs/weights.md).",
    )
    options.add_argument("--arms", nargs="+", help="Arms that are measured; all by default.")
    options.add_argument("--seeds", type=int, default=5, help="Seeds of each arm of efficientnet_lite0.")
    options.add_argument("--vit_seeds", type=int, default=3, help="Seeds of each arm of vit_small_dinov2.")
    chosen = options.parse_args()
    rows = []
    if LITE in chosen.encoders:
        rows += table(LITE, "imagenet", 64, chosen.data, chosen.seeds, chosen.arms)
    if VIT in chosen.encoders:
        rows += table(VIT, chosen.vit, 70, chosen.data, chosen.vit_seeds, chosen.arms)
    common.report(chosen, "Less work for the same result", rows)


if __name__ == "__main__":
    main()
