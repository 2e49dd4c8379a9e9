"""What all pages are made with: cells that can be sorted, and the templates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrun import __version__
from kdrun.errors import UserError
from kdrun.report.drawings import Drawing

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Cell:
    """One cell of a table that can be sorted.

    Attributes:
        text: what is shown; ``key``: what is sorted by, empty for nothing.
        style: a class of the style sheet.
    """

    text: str
    key: str | float = ""
    style: str = ""


@dataclass(frozen=True)
class Card:
    """One number that a page begins with: what it is, the number, and what is to be said of it."""

    label: str
    value: str
    note: str = ""


def places_of(value: float | None) -> int:
    """Decimals for a number of which nothing is known."""
    return 2 if value is None or abs(value) >= 10 else 4


def number(value: float | None, places: int) -> Cell:
    """A number, sorted by its value; empty for None."""
    return Cell("" if value is None else f"{value:.{places}f}", sort_key(value))


def sort_key(value: float | None) -> str | float:
    """What a number is sorted by; one that is not finite has no place in the order."""
    return "" if value is None or not math.isfinite(value) else value


def render(template: str, **values: Any) -> str:
    """A page: a template filled in, with the style sheet, the script and the drawings inside.

    All texts are escaped; only drawings, which escape their own, are taken as they are.

    Raises:
        UserError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise UserError("pages need jinja2: pip install 'kdrun[report]'") from None
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css, js = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    figures: dict[str, Sequence[Drawing]] = values.pop("drawings")
    shown = {
        name: [{"svg": Markup(drawing.svg), "caption": drawing.caption} for drawing in found]
        for name, found in figures.items()
    }
    return environment.get_template(template).render(
        css=Markup(css), js=Markup(js), version=__version__, drawings=shown, **values
    )
