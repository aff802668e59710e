"""How a report writes numbers and names: one way each, for tables, sentences and plots."""

import html
import math
import re
from collections.abc import Iterable, Sequence

NOTHING = "–"
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
_SPECIAL = re.compile(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word is plain


def number(value: float | None, digits: int = 4) -> str:
    """A value to that many significant digits: `0.9871`, `12.35`, `1,235`."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    # What it is rounded to decides: 0.99999 is 1.000.
    magnitude = 0 if value == 0 else int(f"{abs(value):.{digits - 1}e}".rpartition("e")[2])
    return f"{value:,.{max(digits - 1 - magnitude, 0)}f}"


def fraction(share: float | None) -> str:
    """A number within [0, 1] with three decimals: `0.987`."""
    return NOTHING if share is None or not math.isfinite(share) else f"{share:.3f}"


def change(value: float) -> str:
    """A difference of fractions: `+0.012`, `−0.003`."""
    if not math.isfinite(value):
        return NOTHING
    rounded = round(value, 3)
    return f"{rounded:+.3f}".replace("-", "−") if rounded else "0.000"


def percent(share: float | None) -> str:
    """A share of 1 as `98.7 %`; small ones keep two digits."""
    if share is None or not math.isfinite(share):
        return NOTHING
    value = 100 * share
    return f"{number(value, 2) if 0 < abs(value) < 0.95 else f'{value:.1f}'} %"


def count(value: float | None) -> str:
    """A large number as `4.39 M`."""
    return _scaled(value, "")


def byte_size(value: float | None) -> str:
    """Bytes as `17.6 MB`, in powers of 1000."""
    return _scaled(value, "B")


def byte_unit(value: float) -> tuple[str, int]:
    """The unit that `byte_size` writes so many bytes in, and how many bytes it is."""
    scale = _scale(value)
    return f"{_PREFIXES[scale]}B", 1000**scale


def _scaled(value: float | None, unit: str) -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    scale = _scale(value)
    digits = number(value / 1000**scale, 3) if scale else f"{value:g}"
    return f"{digits} {_PREFIXES[scale]}{unit}".rstrip()


def _scale(value: float) -> int:
    """The power of 1000 that leaves three digits before the point, rounding included."""
    return next((power for power in range(len(_PREFIXES)) if abs(value) < 999.5 * 1000**power), len(_PREFIXES) - 1)


def times(factor: float | None) -> str:
    """A factor as `2.1x`."""
    return NOTHING if factor is None or not math.isfinite(factor) else f"{number(factor, 2)}x"


def shortened(name: str, length: int) -> str:
    """The name on one line, its middle left out where it is longer than that."""
    name = " ".join(name.split())
    if len(name) <= length:
        return name
    end = (length - 1) // 2
    return f"{name[: length - 1 - end]}…{name[len(name) - end :]}"


def escaped(text: object) -> str:
    """Text as Markdown shows it, in a table too."""
    return _SPECIAL.sub(r"\\\g<0>", html.escape(" ".join(str(text).split()), quote=False))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table without the columns that hold nothing; all but the first are aligned to the right.

    Args:
        header: of the columns, escaped.
        rows: as many cells as the header, escaped.
    """
    rows = list(rows)
    kept = [
        index for index in range(len(header)) if index == 0 or any(row[index] not in ("", NOTHING) for row in rows)
    ]
    lines = [header, ["---" if index == 0 else "---:" for index in range(len(header))], *rows]
    return "\n".join(f"| {' | '.join(line[index] for index in kept)} |" for line in lines)
