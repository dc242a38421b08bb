"""Constants shared by the writers and readers of a workdir's files."""

SPLITS = ("development", "val", "test", "external")
"""Sets of a target task that are scored, in the order in which they are shown."""

OFFICIAL = ("train", "val")
"""Official splits of a target task that stand in for its development images."""

BASELINE = "baseline"
"""Stands in results where a strategy's name would."""

MARGIN = 0.01
"""Default of `report.margin`, in the unit of the metric."""

STAGES = ("dapt", "transfer", "score")
"""What a row of the ledger can be the cost of."""

SALIENCY = "saliency"
"""Phase `TASK/saliency` of the ledger: it explains results, and is no part of the cost of a strategy."""

CACHED = ("off", "filled", "reused")
"""What a row of the ledger did with cached activations."""

KINDS = ("compile", "train", "data", "eval", "checkpoint", "cache")
"""Kinds of seconds that a row of the ledger tells apart."""

CHECKPOINT_MARK = "@"
"""Between a strategy and an epoch, in the name of an arm that is one of its checkpoints."""
