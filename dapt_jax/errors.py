"""Errors that a user can mend: one clear line, exit code 2."""

import difflib
from collections.abc import Iterable

EXIT_CODE = 2


class UserError(ValueError):
    """Something in the user's input is wrong; a `ValueError`, so that library users catch it as usual.

    The message is one line that names the file, row or path, what was expected, and the nearest valid choice.
    `dapt_jax.main` prints it without a traceback and exits with code 2.
    """


def nearest(name: str, choices: Iterable[str], most: int = 3) -> str:
    """Returns the valid choices closest to `name`, as the end of an error line.

    Args:
        name: what the user wrote.
        choices: what would have been valid.
        most: how many near matches to name at most.

    Returns:
        `"did you mean 'full'?"` when something is close, else `"valid: 'none', 'full', ..."`.
    """
    valid = [str(choice) for choice in choices]
    close = difflib.get_close_matches(name, valid, n=most, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(choice) for choice in close) + "?"
    shown = ", ".join(repr(choice) for choice in valid[:12])
    return f"valid: {shown}" + (f", ... ({len(valid)} in all)" if len(valid) > 12 else "")
