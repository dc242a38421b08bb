"""What makes a phase cheaper at the price of other numbers, in words, for plan and ledger.

What is computed once, or not at all because it is frozen, gives the same numbers and is not named here.
"""

from dapt_jax.models.tokens import visible_count
from dapt_jax.training.cache.prefix import Prefix
from dapt_jax.training.run import TrainingRun


def of_phase(run: TrainingRun, number: int, is_cached: bool, error: float | None = None) -> str:
    """Return what a phase computes otherwise than the plain one, joined by semicolons; empty for nothing.

    Args:
        run: The run.
        number: Index of the phase.
        is_cached: Whether it trains on cached activations.
        error: Relative error of these, by `RoundingError`, 0 where they are stored as computed; None before
            they are.
    """
    program, whole = run.programs[number], run.dataset.images.size
    found = []
    if size := program.phase.image_size:
        found.append(f"images of {size} px instead of {whole}")
    encoder = program.model.encoder
    if program.mask.boundary < len(encoder.groups) and (share := encoder.options.patch_dropout):
        patches = (program.side(whole) // encoder.token_patch) ** 2
        found.append(f"{visible_count(patches, share)} of {patches} patch tokens in each step")
    prefix, dtype = Prefix.of(program, 1), run.caching.dtype
    is_reduced = dtype != "float32" and prefix.shapes(whole, dtype) != prefix.shapes(whole)
    if is_cached and (is_reduced if error is None else error):
        by = f", off by {error:.2%} of their root mean square" if error else ""
        found.append(f"activations cached in {dtype}{by}")
    return "; ".join(found)
