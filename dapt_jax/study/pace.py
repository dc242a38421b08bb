"""Hours of a plan at the pace of an earlier study of the same encoder."""

from dapt_jax.records.study_records import Records
from dapt_jax.runtime import home
from dapt_jax.study import speed


def line(named: str, encoder: str, work: float) -> str:
    """Return how long so much work took in an earlier study, in words; empty where it had another encoder.

    Everything that the study spent counts: compiling, reading images and evaluating too.

    Args:
        named: Folder of its records, the setting `plan.records`; empty for none.
        encoder: Name of the encoder that is planned.
        work: Model FLOPs that are planned.

    Raises:
        UserError: The folder holds no study.
    """
    if not named:
        return ""
    records = Records.read(home.expanded(named))
    flops, seconds = sum(row.model_flops for row in records.rows), sum(row.wall_s for row in records.rows)
    if records.model != encoder or not flops or not seconds:
        return ""
    devices = ", ".join(dict.fromkeys(row.device for row in records.rows if row.device)) or "its device"
    return (
        f"time at the pace of {named} ({devices}, {flops / seconds / 1e9:,.0f} GFLOP/s over all that it spent): "
        f"about {speed.span(work * seconds / flops)}"
    )
