"""Words that stand in the files of a workdir, shared by those who write them and those who read them."""

SPLITS = ("development", "test", "external")
"""Sets of a target task, in the order in which they are shown."""

BASELINE = "baseline"
"""In results, stands where a strategy's name would."""

MARGIN = 0.01
"""Default of `report.margin`."""
