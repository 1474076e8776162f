"""One self-contained page from a template: loads nothing, escapes every name."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from rlsparse.report import formats


def render(template: str, content: Mapping[str, Any]) -> str:
    """Fill in ``template``, a file of this package, with ``content``, style sheet and script.

    Values may hold ``Markup`` (figures); all else is escaped. Equal content gives equal text.
    """
    folder = files("rlsparse.report")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
    )
    environment.filters |= {
        each.__name__: each
        for each in (
            formats.definition,
            formats.duration,
            formats.listed,
            formats.measured,
            formats.null_name,
            formats.number,
            formats.p_value,
            formats.percent,
            formats.score,
        )
    }
    environment.globals["interval_texts"] = formats.interval_texts
    own = {
        name: Markup(folder.joinpath(file).read_text("utf-8"))
        for name, file in (("css", "style.css"), ("script", "script.js"))
    }
    return environment.get_template(template).render({**content, **own})
