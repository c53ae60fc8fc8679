"""`report.html`: all pages in one file that needs nothing else, no network and no script."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from html import escape

from minisgl.types import MinisglError

_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d9dee3; --soft: #f4f6f8; --link: #0b5cad }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e6ea; --paper: #15181c; --line: #363c44; --soft: #1e2228; --link: #7db4ee } }
* { box-sizing: border-box }
body { margin: 0; font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
nav { position: sticky; top: 0; background: var(--paper); border-bottom: 1px solid var(--line); padding: .5rem 1rem;
  display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; z-index: 1 }
main { max-width: 76rem; margin: 0 auto; padding: 0 1rem 4rem }
a { color: var(--link); text-decoration-thickness: 1px }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 2.5rem 0 1rem; scroll-margin-top: 5rem }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line) }
p, li { max-width: 50rem; overflow-wrap: break-word }
code { font-size: .9em; background: var(--soft); padding: .05em .3em; border-radius: 3px; overflow-wrap: anywhere }
pre { overflow-x: auto; font-size: .8rem } pre code { background: none; overflow-wrap: normal }
.wide { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { background: var(--soft); white-space: nowrap }
td { min-width: 4.5rem }
td code { white-space: nowrap }
@media (max-width: 40rem) { nav { position: static } table { font-size: .8125rem } ul { padding-left: 1.3rem } }
img { display: block; width: 100%; max-width: 44rem; height: auto; background: #fff; border-radius: 4px;
  margin: .8rem 0 }
"""


def page(title: str, pages: Mapping[str, str], plots: Mapping[str, str]) -> str:
    """One document of all pages.

    Args:
        pages: Markdown by file name; links between them become links within. plots: SVG by file name.

    Raises:
        MinisglError: the Markdown renderer isn't installed.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        raise MinisglError("reports are rendered with markdown-it-py: pip install 'minisgl[profile]'") from None
    renderer = MarkdownIt("commonmark").enable("table")
    sections = []
    for name, text in pages.items():
        body = _embed(renderer.render(text), plots)
        sections.append(f'<section id="{_anchor(name)}">\n{body}</section>')
    links = "\n".join(f'<a href="#{_anchor(name)}">{escape(_title(text))}</a>' for name, text in pages.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<nav>\n{links}\n</nav>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _anchor(name: str) -> str:
    return name.removesuffix(".md").lower()


def _title(markdown: str) -> str:
    return markdown.partition("\n")[0].lstrip("# ")


def _embed(html: str, plots: Mapping[str, str]) -> str:
    """Pictures become part of the file, tables scroll by themselves, links to pages stay within."""

    def picture(match: re.Match[str]) -> str:
        data = base64.b64encode(plots[match[1]].encode()).decode()
        return f'src="data:image/svg+xml;base64,{data}"'

    html = re.sub(r'src="plots/([^"]+)"', picture, html)
    html = re.sub(r'href="([\w-]+)\.md"', lambda match: f'href="#{match[1].lower()}"', html)
    return html.replace("<table>", '<div class="wide" tabindex="0"><table>').replace("</table>", "</table></div>")
