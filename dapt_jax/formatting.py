"""Formatting of quantities in tables, plans, model cards and reports."""

NONE = "–"
"""Stands where there is no value."""


def number(value: float | None, digits: int = 3) -> str:
    """Return a quantity with `digits` significant digits and thousands separators.

        >>> number(23455000), number(0.12345), number(0), number(None)
        ('23,455,000', '0.123', '0', '–')

    Args:
        value: Quantity to format; None for `NONE`.
        digits: Number of significant digits; a whole number keeps all its digits.
    """
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def millions(value: float | None) -> str:
    """Return a parameter count such as 224 k or 23.5 M."""
    if value is None or value < 1000:
        return number(value)
    return f"{value / 1e3:.3g} k" if value < 999_500 else f"{value / 1e6:.3g} M"


def percent(share: float | None) -> str:
    """Return a fraction in percent, with two significant digits."""
    return NONE if share is None else f"{number(100 * share, 2)}%"


def p_value(p: float | None) -> str:
    """Return a p-value with three decimals."""
    if p is None:
        return NONE
    return "<0.001" if p < 0.001 else f"{p:.3f}"
