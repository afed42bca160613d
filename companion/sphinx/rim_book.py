"""The book's Sphinx extension: scripts and styles for figures drawn offline, drawings, and repairs of the theme."""

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

ASSETS = Path(__file__).resolve().parents[2] / "book" / "assets"
# In this order: vega-lite needs vega, vega-embed needs both, charts.js needs all three.
SCRIPTS = ("vega/vega.min.js", "vega/vega-lite.min.js", "vega/vega-embed.min.js", "charts.js")


def _repair_page(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Keep the first of equal scripts: sphinx-thebe adds its constants twice, an error in every browser.

    The bibliography's entries become items of the list they stand in, which docutils' role for them is not.
    """
    kept: dict[str, Any] = {}
    for script in context.get("script_files", []):
        body = getattr(script, "attributes", {}).get("body")
        kept.setdefault(body or str(getattr(script, "filename", script)), script)
    context["script_files"] = list(kept.values())
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def _forget_late_style(app: Sphinx) -> None:
    """Remove myst-nb's style sheet, which it copies after the pages are written: only a second build would
    find it and stamp its checksum into them, and equal results must give equal pages."""
    for path in (Path(app.outdir) / "_static").glob("mystnb.*.css"):
        path.unlink()


def _write_all(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Write every page at every build: from the search index Sphinx 7 drops the terms of unwritten pages."""
    return sorted(env.found_docs)


class Diagram(SphinxDirective):
    """`{rim-diagram} name`: the drawing `assets/diagrams/name.svg`, inline, so that it follows light and dark mode.

    The drawing's `<title>` and `<desc>` are what a screen reader says; the content is the caption.
    """

    has_content = True
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The drawing as it is, in a figure."""
        path = ASSETS / "diagrams" / f"{self.arguments[0]}.svg"
        self.env.note_dependency(str(path))
        try:
            drawing = path.read_text(encoding="utf-8")
        except OSError:
            raise self.error(f"there is no drawing {path.name} in {path.parent}") from None
        opening = nodes.raw("", f'<figure class="rim-diagram">{drawing}<figcaption>', format="html")
        return [opening, *self.parse_content_to_nodes(), nodes.raw("", "</figcaption></figure>", format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the assets, the directive, and the repairs of the theme."""
    app.config.html_static_path.append(str(ASSETS))
    for i, script in enumerate(SCRIPTS):
        app.add_js_file(script, priority=600 + i)
    app.add_css_file("rim.css")
    app.add_directive("rim-diagram", Diagram)
    app.connect("builder-inited", _forget_late_style)
    app.connect("env-updated", _write_all)
    app.connect("html-page-context", _repair_page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
