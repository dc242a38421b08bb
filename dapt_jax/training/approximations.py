"""What makes a phase cheaper at the price of other numbers, in words, for plan and ledger.

What is computed once, or not at all because it is frozen, gives the same numbers and is not named here.
"""

from dapt_jax.models.tokens import visible_count
from dapt_jax.training.cache.prefix import Prefix
from dapt_jax.training.run import TrainingRun


def of_phase(
    run: TrainingRun,
    number: int,
    *,
    is_cached: bool,
    has_cached_targets: bool = False,
    error: float = 0.0,
    targets_error: float = 0.0,
) -> str:
    """Return what a phase computes otherwise than the plain one, joined by semicolons; empty for nothing.

    Args:
        run: The run.
        number: Index of the phase.
        is_cached: Whether it trains on cached activations.
        has_cached_targets: Whether it trains on a teacher's cached outputs.
        error: Relative error of the activations, by `RoundingError`; 0 where it is not known.
        targets_error: That of the targets.
    """
    program, whole = run.programs[number], run.dataset.images.size
    found = []
    if size := program.phase.image_size:
        found.append(f"images of {size} px instead of {whole}")
    encoder = program.model.encoder
    if program.mask.boundary < len(encoder.groups) and (share := encoder.options.patch_dropout):
        patches = (program.side(whole) // encoder.token_patch) ** 2
        found.append(f"{visible_count(patches, share)} of {patches} patch tokens in each step")
    runs_blocks = any(spec.is_stochastic for spec in encoder.specs[program.mask.boundary :])
    if runs_blocks and encoder.options.drop_path_subset and encoder.options.drop_path:
        found.append("residual branches for a share of the batch in each step")
    dtype = run.caching.dtype
    if is_cached:
        found.append(of_cache("activations", Prefix.of(program, 1), whole, dtype, error))
    if has_cached_targets and (wanted := run.targets_to_compute(number)):
        found.append(of_cache("targets", wanted[0], whole, dtype, targets_error))
    return "; ".join(filter(None, found))


def of_cache(what: str, prefix: Prefix, image_size: int, dtype: str, error: float = 0.0) -> str:
    """Return the dtype and the error of what is cached with less precision than it is computed with, else nothing.

    Args:
        what: What is cached, in the plural.
        prefix: Its computation.
        image_size: Side of the data set's images in pixels.
        dtype: Dtype of the cache.
        error: Relative error, by `RoundingError`; 0 where it is not known.
    """
    if not prefix.is_rounded(image_size, dtype):
        return ""
    by = f", off by {error:.2%} of their root mean square" if error else ""
    return f"{what} cached in {dtype}{by}"
