"""How numbers are written, and how sure they are."""

import math

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


def plain(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, whole numbers in full, a true minus sign, thousands apart; an
    en dash for None."""
    if value is None:
        return "–"
    if value == round(value) and abs(value) < 1e9:
        return f"{value:,.0f}".replace(",", " ").replace("-", "−")
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 9:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}".replace(",", " ").replace("-", "−")


def fixed(value: float | None, decimals: int, *, sign: bool = False) -> str:
    """`decimals` places, for columns of numbers; an en dash for None."""
    if value is None:
        return "–"
    rounded = round(value, decimals) or 0.0  # no sign on a zero
    return f"{rounded:{'+' if sign and rounded else ''}.{decimals}f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: 12.3 s, 4 min 5 s, 2 h 10 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a proportion `share` seen in `n` independent trials.

    Wilson's score interval: unlike share ± z sqrt(share(1-share)/n) it does not shrink to
    nothing at 0 and 1. Source: Wilson 1927, JASA 22:209.
    """
    spread = Z95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))
