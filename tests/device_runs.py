"""Runs of the tiny network on meshes of this process' devices, or of several processes': a line of JSON for each.

    python -m tests.device_runs MESHES [COORDINATOR COUNT NUMBER]

MESHES: as `1,8,8/4:full+hybrid`: devices, behind a stroke those over which the state is spread, behind a
colon the runs (all of them if there is none). With several processes the devices of all of them are one mesh.
"""

import dataclasses
import json
import os
import sys

RUNS = (
    "head-cached",
    "full",
    "partial",
    "partial-cached",
    "hybrid",
    "hybrid-cached",
    "norm",
    "ghost",
    "accumulated",
    "uneven",
)
"""Strategies, from images and from cached activations, each over a mask switch where there is one."""

LABEL_FREE = ("reconstruct", "distil", "two_views", "reconstruct-images", "two_views-images", "mae", "dino")
"""Objectives without labels, above a cached prefix and from images."""


def runs(name):
    if name in LABEL_FREE:
        from tests.test_label_free_training import head_first, run_of

        objective, _, source = name.partition("-")
        kind = "vit" if objective == "mae" else "cnn"
        phases = head_first()[::2] if objective == "dino" else None
        return run_of(objective, kind, "off" if source else "on", phases)
    from dapt_jax.data.augment import Augment
    from dapt_jax.training.optim import Optimizer
    from dapt_jax.training.phases import Phase
    from tests import tiny

    head = Phase("head", 4, ("head",), 5e-3, augment=False)
    partial = Phase("partial", 13, ("stage3", "head"), 5e-3, augment=False)
    full = Phase(
        "full",
        13,
        ("*",),
        5e-3,
        batch_norm="train" if name in ("norm", "ghost") else "frozen",
        augment="cached" not in name,
    )
    phases = {
        "head": (dataclasses.replace(head, epochs=26),),
        "full": (full, dataclasses.replace(full, name="more")),
        "partial": (partial, dataclasses.replace(partial, name="more")),
    }.get(name.split("-")[0], (head, dataclasses.replace(partial, epochs=9), full))
    # 32 rows of 40 make 4 steps of 8: 26 epochs are 104 steps; "uneven" ends each epoch with a batch that is
    # filled up.
    data = tiny.dataset(40 if name != "uneven" else 37)
    is_twice = name in ("accumulated", "doubled")
    return tiny.make_run(
        phases, encoder=tiny.encoder(), data=data, cache="on" if "cached" in name else "off",
        augment=Augment("dihedral", 0.1), optimizer=Optimizer(clip=1.0, ema=0.9, eps=1e-4),
        grad_accum_steps=2 if name == "accumulated" else 1, batch_norm_groups=8 if name == "ghost" else 1,
        batch_size=16 if is_twice else 8,
    )  # fmt: skip


def train(name, mesh, fsdp):
    from dapt_jax.aot import collectives
    from dapt_jax.aot.hlo import Program
    from dapt_jax.runtime import sharding
    from dapt_jax.training import loop
    from dapt_jax.training.context import RunContext

    run, context = runs(name), RunContext(mesh=mesh)
    params, batch_stats = run.model.init(1)
    trained = loop.train(run, params, batch_stats, context)
    rows = trained.costs
    sent = [
        collectives.totals(collectives.of_program(Program.parse(each.as_text())))
        for each in context.executables.values()
    ]
    import jax
    import numpy as np

    watched = {
        key: [point[key] for row in rows for point in row.curve]
        for key in ("loss", "val_loss", *(("rankme",) if name in LABEL_FREE else ()))
    }
    total = [float(np.abs(leaf).sum()) for leaf in jax.tree.leaves((trained.params, trained.batch_stats))]
    spread = sharding.state_shardings(jax.eval_shape(lambda: params), mesh)
    split = sum(not each.is_fully_replicated for each in jax.tree.leaves(spread))
    return {
        "name": name, "devices": mesh.size, "fsdp": fsdp, "processes": jax.process_count(), "split": split, "total": total,
        "steps": sum(row.steps for row in rows), "images": sum(row.images for row in rows),
        "flops": sum(row.model_flops for row in rows), **watched,
        "sent": [{total.kind: total.bytes for total in of_one} for of_one in sent],
        "trained": list(dict.fromkeys(4 * row.trainable_params for row in rows)),
    }  # fmt: skip


def main(meshes, *group):
    import jax

    if group:
        jax.distributed.initialize(group[0], int(group[1]), int(group[2]))
    from dapt_jax.runtime import sharding

    sharding.MIN_SHARD_SIZE = 16  # the tiny network has no large leaf
    for each in meshes.split(","):
        shape, _, names = each.partition(":")
        devices, _, fsdp = shape.partition("/")
        mesh = sharding.make_mesh(jax.devices()[: int(devices)], int(fsdp or 1))
        for name in names.split("+") if names else RUNS:
            found = train(name, mesh, int(fsdp or 1))
            if jax.process_index() == 0:
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(*sys.argv[1:])
