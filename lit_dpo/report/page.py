"""What a report says ──► one HTML page that needs no other file: charts, styles and scripts are inside."""

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from lit_dpo.files.atomic import finite
from lit_dpo.report.tokens import TokenView
from lit_dpo.training.environment import releases

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("d3.min.js", "plot.umd.min.js", "report.js")


def as_page(content: dict[str, Any]) -> str:
    """The page of a report.

    Texts of the data are escaped. Scripts of others cannot run: the page's policy allows those inside it alone, by
    their digests, and nothing from the network.

    Args:
        content: What ``report_content`` gives.
    """
    return _rendered("report.html.jinja", content)


def token_page(view: TokenView) -> str:
    """The page of one pair, token by token."""
    view = view.without_folders()
    title = view.name
    content = finite({"title": title, "charts": [], "runs": [{"name": title, "tokens": [view.to_dict()]}]})
    return _rendered("tokens.html.jinja", content)


def review_page(content: dict[str, Any]) -> str:
    """The page on which suspicious pairs are kept, flipped or dropped.

    Args:
        content: What ``save_suspects`` gives.
    """
    return _rendered("suspects.html.jinja", content, (*SCRIPTS, "suspects.js"))


def _rendered(template: str, content: dict[str, Any], names: tuple[str, ...] = SCRIPTS) -> str:
    scripts = [asset(name) for name in names]
    return (
        templates()
        .get_template(template)
        .render(
            content=content,
            version=releases().get("lit_dpo", ""),
            css=asset("page.css"),
            scripts=scripts,
            hashes=" ".join(map(script_hash, scripts)),
            data=embedded_json(content),
            zip=zip,
            strongest=strongest,
            shade=shade,
            shown=shown,
            signed=signed,
        )
    )


@cache
def templates() -> jinja2.Environment:
    """The templates in the package; what they print is escaped."""
    return jinja2.Environment(loader=jinja2.FileSystemLoader(ASSETS), autoescape=True)


@cache
def asset(name: str) -> str:
    """The text of a file in the package."""
    return (ASSETS / name).read_text(encoding="utf-8")


def script_hash(script: str) -> str:
    """What a page's policy must say for a script inside it to run."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def embedded_json(content: Any) -> str:
    """JSON that can stand inside an HTML ``script`` element, whatever texts it holds."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def strongest(view: dict[str, Any]) -> float:
    """The share of the reward, in absolute value, that 97 % of a pair's tokens do not exceed; 0 without tokens."""
    shares = sorted(abs(one) for side in ("chosen", "rejected") for one in view[side]["rewards"] if one is not None)
    return float(shares[int(0.97 * (len(shares) - 1))]) if shares else 0.0


def shade(value: float, most: float) -> int:
    """How strong the colour of a token is, in percent of the full one: 60 for a share of ``most`` and above."""
    return round(60 * min(1.0, abs(value) / most)) if most else 0


def signed(value: float | None) -> str:
    """A number with its sign; a dash if it is not known or not finite."""
    return "–" if value is None else f"{value:+.3f}"  # noqa: RUF001


def shown(token: str) -> Markup:
    """The text of a token, with a sign for each line break."""
    return escape(token).replace("\n", Markup("<i>⏎</i>\n"))
