"""Data as scripts: a page opened from a folder may load a script, but may not fetch a file.

The HTML, style and programs are the same bytes for every dictionary. What comes from outside, labels, tokens, texts,
stands in data files alone, each one call of a function with JSON; the programs put it into the page as text.
"""

import json
import math
from typing import Any

_ESCAPES = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029", "\u007f": "\\u007f"}
)
_DIGITS = 4


def json_text(value: Any) -> str:
    """JSON that is also a JavaScript literal and cannot end a script element, wherever it is put.

    Numbers keep four significant digits; NaN and infinities become null; a lone surrogate becomes U+FFFD.
    """
    return exact_json(short(value))


def exact_json(value: Any) -> str:
    """`json_text` of a value whose numbers are short already. Raises: ValueError if one is not finite."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace").decode().translate(_ESCAPES)


def call(function: str, *arguments: str) -> bytes:
    """A script that calls `function` with arguments that are JSON already."""
    return f"{function}({','.join(arguments)});\n".encode()


def short(value: Any) -> Any:
    """Floats at four significant digits, at every depth; what is not finite is null."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): short(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [short(inner) for inner in value]
    return value if isinstance(value, str | int | bool | None) else str(value)
