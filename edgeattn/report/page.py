"""The frame of a page that is one file: text, tables and SVG pictures, nothing that a browser would have to fetch."""

from __future__ import annotations

from html import escape

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
body { margin: 24px auto; padding: 0 16px; }
svg { max-width: 100%; height: auto; }
h1 { font-size: 22px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 32px 0 4px; }
h3 { font-size: 15px; margin: 20px 0 0; }
p { margin: 4px 0 12px; }
ul { margin: 4px 0 12px; padding-left: 20px; }
.note { background: #fff3cd; border: 1px solid #e0c060; padding: 8px 12px; }
.dim { color: #666; font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 16px 0; }
th, td { padding: 3px 18px 3px 0; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
"""


def page(title: str, body: list[str], *, width: int, style: str = "") -> str:
    """A whole HTML document.

    Args:
        title: plain text. body: its parts, as HTML.
        width: the most that the text takes, in px.
        style: CSS beside that of every page.
    """
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}body {{ max-width: {width}px; }}\n{style}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )
