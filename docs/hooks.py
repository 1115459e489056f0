"""What mkdocs does not do by itself: formulas without scripts, links out of docs/ as names."""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
TAG = re.compile(r"\\tag\{(.*?)\}")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Files of the repository that are no pages: their names, not links that lead nowhere."""
    return OUTSIDE.sub(r"\1", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """LaTeX to MathML, which browsers draw themselves."""
    return FORMULA.sub(_mathml, html)


def _mathml(match: re.Match[str]) -> str:
    latex = unescape(match[3])
    number = TAG.search(latex)
    if match[2] == "(":
        return convert(latex)
    formula = convert(TAG.sub("", latex), display="block")
    return f'<div class="formula">{formula}<span>{f"({number[1]})" if number else ""}</span></div>'
