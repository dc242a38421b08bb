"""Speed of this machine at training, measured once and kept: with it, a plan turns FLOPs into minutes."""

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dapt_jax.cost import flops, hardware
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.models.registry import configured
from dapt_jax.parameters import Kind
from dapt_jax.runtime import atomic_files, user_cache

NETWORKS = {"dense": ("resnet18", "stage2/block1"), "depthwise": ("efficientnet_lite0", "stage3/block1")}
"""Network, cut after a group, that stands for those of its kind: depthwise convolutions reach a fraction of the
FLOP/s of others."""

FACTOR = 2.5
"""Factor by which studies deviate from the estimate, either way. Measured on two cores, as FLOP/s of the training
step of a whole network over those of `NETWORKS`: 1.2 for ResNet-50 and 2.0 for EfficientNet-Lite0."""

BUSY_LOAD = 0.75
"""Load average per core from which a machine counts as busy: a benchmark is then too slow by an unknown factor."""

_IMAGES, _SIDE = 16, 64
_BUDGET_S = 0.5


@dataclasses.dataclass(frozen=True)
class Speed:
    """Training speed of one device.

    Attributes:
        flops_per_s: Model FLOP/s of a training step.
        time: When it was measured, in seconds of the wall clock.
        busy: Whether other work kept the machine busy then, so that the speed is too low.
    """

    flops_per_s: float
    time: float
    busy: bool = False


def of_machine(encoder: Encoder, dtype: str) -> Speed:
    """Return the stored speed for encoders of this kind, or measure now, in a few seconds, and store it.

    Where the result cannot be stored, it is measured again next time; one of a busy machine is replaced as soon
    as the machine is not.

    Args:
        encoder: The encoder that is to train.
        dtype: Dtype of activations.
    """
    kind = "depthwise" if Kind.DEPTHWISE_KERNEL in encoder.kinds.values() else "dense"
    key = f"{name()}, {kind}, {dtype}, jax {jax.__version__}"
    held = _held()
    busy = is_busy()
    with contextlib.suppress(KeyError, TypeError, ValueError):
        entry = held[key]
        stored = Speed(float(entry["flops_per_s"]), float(entry["time"]), bool(entry.get("busy")))
        if busy or not stored.busy:
            return stored
    found = Speed(measure(*NETWORKS[kind], dtype), time.time(), busy)
    with contextlib.suppress(OSError):
        text = json.dumps({**held, key: dataclasses.asdict(found)}, indent=1)
        atomic_files.write_text(file(), text + "\n")
    return found


def is_busy() -> bool:
    """Return whether other work has kept the cores of this machine busy over the last minute."""
    try:
        return os.getloadavg()[0] > BUSY_LOAD * (os.cpu_count() or 1)
    except (AttributeError, OSError):  # no load average on this system
        return False


def name() -> str:
    """Return the device, in words."""
    here = hardware.describe()
    return f"{here.kind}, {here.cores} cores" if here.platform == "cpu" else here.kind


def file() -> Path:
    """Return the file of the machines that share this user's cache."""
    return user_cache.folder("speed.json")


def _held() -> dict[str, dict[str, float]]:
    try:
        found = json.loads(file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def measure(network: str, after: str, dtype: str) -> float:
    """Return the model FLOP/s of a training step on one device: the best of half a second, compiled before.

    The best, since other work on the machine only ever slows a step down.

    Args:
        network: Name of a model.
        after: Its last layer group.
        dtype: Dtype of activations.
    """
    model = Classifier(configured(network, 0.0, 0.0, ()).truncate(after), 8, dtype)
    params, batch_stats = jax.tree.map(jnp.asarray, model.init(0))
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (_IMAGES, _SIDE, _SIDE, 3), np.uint8))

    def loss(params: Tree) -> jax.Array:
        x = model.prefix(params, batch_stats, images, 0)
        logits, _ = model.suffix(params, batch_stats, x, 0, "train")
        return jax.nn.logsumexp(logits, -1).mean()

    work = flops.count(jax.grad(loss), params).model
    step = jax.jit(jax.grad(loss))
    jax.block_until_ready(step(params))
    seconds, end = list[float](), time.perf_counter() + _BUDGET_S
    while not seconds or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(step(params))
        seconds.append(time.perf_counter() - start)
    return work / min(seconds)


def at_once() -> int:
    """Return how many devices compute at the speed of one; 1 on a CPU, whose devices share its cores."""
    return 1 if jax.default_backend() == "cpu" else jax.device_count()


def line(work: float, encoder: Encoder, dtype: str, now: float) -> str:
    """Return in words how long so much work takes on this machine.

    Args:
        work: Model FLOPs.
        encoder: The encoder that is to train.
        dtype: Dtype of activations.
        now: Seconds of the wall clock.
    """
    speed, devices = of_machine(encoder, dtype), jax.device_count()
    seconds = work / (speed.flops_per_s * at_once())
    low, high = span(seconds / FACTOR), span(seconds * FACTOR)
    several = f"{devices} x " if devices > 1 else ""
    days = (now - speed.time) / 86400
    age = (
        "just now" if days < 0.01 else f"{span(now - speed.time)} ago" if days < 2 else f"{days:.0f} days ago"
    )
    slowed = " while other work slowed it: plan again when the machine is idle" if speed.busy else ""
    return (
        f"time: about {span(seconds)} ({low} to {high}) on {several}{name()}, an estimate for what is left: "
        f"{speed.flops_per_s / 1e9:,.0f} GFLOP/s in a benchmark of this machine, measured {age}{slowed}; compiling, "
        "reading images and evaluating come on top"
    )


def span(seconds: float) -> str:
    """Return a duration in words.

    >>> span(50), span(400), span(9000)
    ('50 s', '7 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
