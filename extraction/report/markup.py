"""HTML that can't be broken out of: every text is escaped, and a page may run its own script and nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

VOID = {"img", "input", "meta", "source", "br", "col"}
STYLE = Path(__file__).with_name("page.css")
SCRIPT = Path(__file__).with_name("page.js")
POLICY = (
    "default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
    "base-uri 'none'; form-action 'none'"
)
PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>$title</title>
<style>$style</style>
</head>
<body>
$body
<script>$script</script>
</body>
</html>
""")

# what a terminal or a reader's eye would obey: control characters, marks that turn the reading direction, surrogates
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
# inside a script block only `<` could end it; the others are for readers that take a page for XML
_IN_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


class Html(str):
    """Markup that is whole and safe: made by `tag`, never from anybody's text."""

    __slots__ = ()


def visible(text: str) -> str:
    """Text whose control characters are shown, not obeyed: ESC is U+241B, others are named by number."""
    return _UNSEEN.sub(lambda match: _picture(ord(match[0])), text.replace("\r\n", "\n"))


def _picture(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\u27e8U+{code:04X}\u27e9"


def text(value: Any) -> Html:
    """Anything as text."""
    return value if isinstance(value, Html) else Html(escape(visible(str(value)), quote=True))


def join(children: Iterable[Any]) -> Html:
    """Several pieces of markup and text, one after another; None is nothing."""
    parts = []
    for child in children:
        if child is None:
            continue
        nested = not isinstance(child, str) and isinstance(child, Iterable)
        parts.append(join(child) if nested else text(child))
    return Html("".join(parts))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element. `class_="a"` is class="a", `data_label` is data-label; True is a bare attribute, None is none."""
    said = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        attribute = key.rstrip("_").replace("_", "-")
        said.append(f" {attribute}" if value is True else f' {attribute}="{text(value)}"')
    opening = f"<{name}{''.join(said)}>"
    return Html(opening) if name in VOID else Html(f"{opening}{join(children)}</{name}>")


def table(heads: Iterable[Any], rows: Iterable[Iterable[Any]], *, caption: str, class_: str | None = None) -> Html:
    """A table whose first cell of each row is its heading; each cell knows its column, for narrow screens."""
    heads = list(heads)
    top = tag("tr", (tag("th", head, scope="col") for head in heads))
    body = [tag("tr", _cells(heads, list(row))) for row in rows]
    return tag("table", tag("caption", caption), tag("thead", top), tag("tbody", body), class_=class_)


def _cells(heads: list[Any], row: list[Any]) -> Iterable[Html]:
    yield tag("th", row[0], scope="row")
    for head, cell in zip(heads[1:], row[1:], strict=True):
        yield tag("td", tag("span", cell), data_label=head)


def image(png: bytes) -> str:
    """A picture as the address of itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def data_block(name: str, value: Any) -> Html:
    """A value for the page's script: JSON in a block that is never run."""
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_IN_SCRIPT)
    return Html(f'<script type="application/json" id="{text(name)}">{body}</script>')


def document(
    title: str, body: Html, *, styles: Sequence[Path] = (STYLE,), scripts: Sequence[Path] = (SCRIPT,)
) -> bytes:
    """A whole page: one file, no request. Its style is one block, of all `styles`, and so is its script."""
    style, script = ("".join(path.read_text(encoding="utf-8") for path in paths) for paths in (styles, scripts))
    policy = POLICY.format(style=digest_of(style), script=digest_of(script))
    page = PAGE.substitute(policy=policy, title=text(title), style=style, script=script, body=body)
    return page.encode("utf-8")


def digest_of(block: str) -> str:
    """The base64 sha256 by which a content security policy knows a block."""
    return base64.b64encode(hashlib.sha256(block.encode("utf-8")).digest()).decode()
