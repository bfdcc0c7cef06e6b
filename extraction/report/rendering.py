"""Render pages from Jinja2 templates: one self-contained HTML file each, which runs its own script and nothing else.

Every value of a template is escaped (autoescape) and its control characters are made visible (`finalize`), so text of a
model stays text. Jinja2 is imported when a page is rendered, not with this module.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction.report import formatting

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

TEMPLATES = Path(__file__).with_name("templates")
STYLES = (TEMPLATES / "report.css",)
SCRIPTS = (TEMPLATES / "report.js",)
POLICY = (
    "default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
    "base-uri 'none'; form-action 'none'"
)

# control characters, marks that change the reading direction, and surrogates: a terminal or a browser would act on them
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
# inside a script block only `<` could end it; the others are for readers that take a page for XML
_IN_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def render_page(
    template: str,
    *,
    folders: Sequence[Path] = (),
    styles: Sequence[Path] = STYLES,
    scripts: Sequence[Path] = SCRIPTS,
    **values: Any,
) -> bytes:
    """Render a template that extends `base.html.j2` into a whole page.

    Args:
        template: File name, in `templates/` of this package or in one of `folders`.
        styles: CSS files, joined into the page's one style block.
        scripts: JavaScript files, joined into the page's one script block.
        values: Variables of the template; `title` is the page's title.
    """
    from markupsafe import Markup

    style, script = ("".join(path.read_text(encoding="utf-8") for path in paths) for paths in (styles, scripts))
    policy = POLICY.format(style=digest_of(style), script=digest_of(script))
    source = _environment(tuple(folders)).get_template(template)
    return source.render(policy=policy, style=Markup(style), script=Markup(script), **values).encode("utf-8")


@functools.cache
def _environment(folders: tuple[Path, ...]) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([TEMPLATES, *folders]),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(FILTERS)
    return environment


def _finalize(value: Any) -> Any:
    """Make the control characters of every printed value visible, also where it is markup of a macro."""
    from markupsafe import Markup

    assert value is not None, "a template printed None"
    return Markup(visible(value)) if isinstance(value, Markup) else visible(str(value))


def visible(text: str) -> str:
    """Replace control and invisible characters by visible ones: ESC by U+241B, others by their number."""
    return _INVISIBLE.sub(lambda match: _visible_character(ord(match[0])), text.replace("\r\n", "\n"))


def _visible_character(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\u27e8U+{code:04X}\u27e9"


def thousands(value: int) -> str:
    """Return an integer with thousands separators."""
    return f"{value:,}"


def png_uri(png: bytes) -> str:
    """Return a PNG image as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def data_block(name: str, value: Any) -> Markup:
    """Return a script block with JSON, which the browser never runs. Texts in `value` must be `visible` already."""
    from markupsafe import Markup

    body = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_IN_SCRIPT)
    return Markup('<script type="application/json" id="{}">{}</script>').format(name, Markup(body))


def digest_of(block: str) -> str:
    """Return the base64 sha256 by which a content security policy admits a style or script block."""
    return base64.b64encode(hashlib.sha256(block.encode("utf-8")).digest()).decode()


FILTERS = {
    "counted": formatting.counted,
    "layer_words": formatting.layer_words,
    "listed": formatting.listed,
    "png_uri": png_uri,
    "ranges": formatting.ranges,
    "thousands": thousands,
}
