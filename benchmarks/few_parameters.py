"""What a step costs that trains few parameters, beside one that trains all: FLOPs, seconds and memory.

    python -m benchmarks.few_parameters --csv benchmarks/results/few_parameters.csv

Rows are an encoder and what trains in its last layer groups, above activations that are kept, and low-rank updates of
every layer, above none. FLOPs are the plan's, memory is XLA's of the compiled step, and seconds are measured.
The steps of an encoder take turns; shares are of the step that trains everything, round by round, so that what else
the machine does counts for all.
"""

import dataclasses

from benchmarks import common, our_step
from dapt_jax.data import sources
from dapt_jax.models import registry
from dapt_jax.runtime import allocator
from dapt_jax.settings import default, resolve
from dapt_jax.study import runs, strategies
from dapt_jax.training import accounting
from dapt_jax.training.steps import PhaseProgram
from dapt_jax.weights.paths import flatten


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder and how much of it trains.

    Attributes:
        size: Side of the images in pixels.
        batch: Images of a step.
        last: Number of its last layer groups that a partial strategy trains.
    """

    size: int
    batch: int
    last: int


ENCODERS = {
    "efficientnet_lite0": Encoder(96, 32, 6),
    "resnet50": Encoder(96, 16, 3),
    "vit_small_dinov2": Encoder(112, 16, 5),
}
"""Small enough for two cores; the last groups are the last stages, or four blocks and the norm above them."""

FULL = "full"
LAST = ("partial", "bitfit", "norm_tuning", "attention_output", "apla", "lora")
"""Strategies in the last layer groups."""


def program(model: str, strategy: str, last: int) -> PhaseProgram:
    """Return the program of the last phase of a strategy.

    Args:
        model: Name of the encoder.
        strategy: Name of the strategy.
        last: Number of the last layer groups in which it trains; 0 means all.
    """
    config = default()
    config.model.name, config.weights = model, "random"
    config.model.image_size = ENCODERS[model].size
    config.adapt.partial_groups = last or len(registry.build(model).groups)
    config.adapt.peft_groups = last
    settings = resolve(config)
    corpus = sources.load(
        {"kind": "phantoms", "name": "corpus", "n": 24}, data_dir=None, image_size=ENCODERS[model].size
    )
    arm = strategies.resolve(strategy, registry.build(model), settings)
    return runs.adaptation_run(settings, arm, 0, corpus).programs[-1]


def measure(model: str, rounds: int) -> list[common.Row]:
    """Return the rows of an encoder."""
    about = ENCODERS[model]
    has_attention = bool(registry.build(model).token_patch)
    chosen = [(FULL, 0), *((name, about.last) for name in LAST), ("lora", 0)]
    if not has_attention:
        chosen = [each for each in chosen if each[0] not in ("attention_output", "apla")]
    rows, steps = [], []
    for strategy, last in chosen:
        made = program(model, strategy, last)
        is_cached = made.mask.boundary > 0
        steps.append(our_step.Step(made, about.size, about.batch, "cached" if is_cached else "whole"))
        leaves = flatten(made.model.abstract()[0]).items()
        trainable = sum(leaf.size for path, leaf in leaves if path in made.mask.trainable)
        rows.append(
            {
                "model": model,
                "size": about.size,
                "batch": about.batch,
                "strategy": strategy,
                "groups": last or "all",
                "trainable": trainable,
                "MFLOP": accounting.image_cost(made, about.size).suffix.model / 1e6,
                "MiB": steps[-1].memory_bytes() / 2**20,
            }
        )
    found: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for times, step in zip(found, steps, strict=True):
            times.append(step.seconds(3))
    for row, times in zip(rows, found, strict=True):
        shares = [mine / whole for mine, whole in zip(times, found[0], strict=True)]
        row["ms"] = 1000 * common.middle(times)
        row["of full FLOPs"] = row["MFLOP"] / rows[0]["MFLOP"]
        row["of full seconds"] = common.middle(shares)
        row["low"], row["high"] = min(shares), max(shares)
        row["of full memory"] = row["MiB"] / rows[0]["MiB"] if rows[0]["MiB"] else None
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measures every row and prints the table."""
    parser = common.parser(__doc__, rounds=5)
    parser.add_argument("--models", default=",".join(ENCODERS))
    options = parser.parse_args(arguments)
    rows = [row for model in common.words(options.models) for row in measure(model, options.rounds)]
    common.report(options, f"steps of few-parameter strategies; medians of {options.rounds} rounds", rows)


if __name__ == "__main__":
    allocator.restart_with_settings()
    main()
