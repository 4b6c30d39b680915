"""One HTML page in one file: templates filled in, figures as SVG inside."""

import io
import re
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from sliderquant._version import __version__

__all__ = ["COLORS", "render", "spaced_ticks", "svg"]

# Of Okabe and Ito, which differ for the color-blind too.
COLORS = {"shallow": "#0072B2", "middle": "#009E73", "deep": "#D55E00"}

_GROUP_NAME = re.compile(r' id="[A-Za-z0-9.]+_\d+"')
_MOST_LABELS = 24
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def svg(figure: Figure, description: str) -> Markup:
    """The figure as an SVG element for a page; the same bytes for the same figure.

    Args:
        description: what it shows, for those who do not see it; different for every figure of a page.
    """
    buffer = io.StringIO()
    # Text stays text: it can be searched and selected, and takes a tenth of the room of its outlines. The ids of what
    # is referred to are hashes of it and of the salt.
    with matplotlib.rc_context({"svg.hashsalt": description, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    text = buffer.getvalue()
    # matplotlib numbers its groups from 1 in every figure, and nothing refers to them: a page has each id once.
    drawn = _GROUP_NAME.sub("", text[text.index("<svg") :])
    return Markup(drawn.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(description)}"', 1))


def spaced_ticks(labels: list[str]) -> tuple[list[int], list[str]]:
    """Places and labels of an axis: every label, or, of too many, every second, third, ..."""
    step = -(-len(labels) // _MOST_LABELS)
    return list(range(0, len(labels), step)), labels[::step]


def render(template: str, **values: Any) -> str:
    """The page that the template `NAME.html.jinja` makes of the values."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sliderquant.reports"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(f"{template}.html.jinja").render(version=__version__, **values)
