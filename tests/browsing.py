"""A tab of the tests' browser, in light or in dark."""

import re
from pathlib import Path

THEMES = ("light", "dark")


class Visit:
    """A browser tab in one theme that remembers what went wrong in it."""

    def __init__(self, browser, theme: str, width: int = 1280) -> None:
        self.context = browser.new_context(color_scheme=theme, viewport={"width": width, "height": 900})
        self.tab = self.context.new_page()
        self.wrong: list[str] = []
        self.tab.route(re.compile(r"^(?!file:|data:|blob:)"), self._refuse)
        self.tab.on("pageerror", lambda error: self.wrong.append(f"{self.at}: {error}"))
        self.tab.on("console", self._listen)
        self.at = ""

    def _refuse(self, route) -> None:
        self.wrong.append(f"{self.at}: asked for {route.request.url}")
        route.abort()

    def _listen(self, message) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(f"{self.at}: {message.text}")

    def open(self, path: Path) -> None:
        self.at = path.name
        self.tab.goto(path.as_uri())
        self.tab.wait_for_function(
            "() => [...document.querySelectorAll('figure.rim-chart')]"
            ".every(figure => ['ok', 'error'].includes(figure.dataset.state))"
        )

    def unfold(self) -> None:
        """Open what is folded; of what repeats itself keep some: rows of one table, marks of one kind in a figure,
        words of code, which share a dozen colours, and entries of each kind on the API's page."""
        self.tab.evaluate(
            "() => { document.querySelectorAll('details').forEach(details => { details.open = true }); "
            # What opens fades in, and half-faded text has too little contrast.
            "document.getAnimations().forEach(animation => animation.finish()); "
            "const seen = {}, times = each => seen[each.className] = (seen[each.className] || 0) + 1; "
            "document.querySelectorAll('dl.py').forEach(entry => "
            "entry.isConnected && times(entry) > 5 && entry.remove()); "
            "document.querySelectorAll('.highlight span[class]').forEach(word => "
            "times(word) > 1 && word.replaceWith(...word.childNodes)); "
            "document.querySelectorAll('tbody tr, .rim-vega g[class*=mark-]:not(.mark-group) > *').forEach(each => "
            "each.matches(':nth-child(n+4)') && each.classList.add('one-of-many')); "
            "document.querySelectorAll('.one-of-many').forEach(each => each.remove()) }"
        )

    def figures(self) -> list[list[str]]:
        return self.tab.evaluate(
            "() => [...document.querySelectorAll('figure.rim-chart')].map(figure => [figure.dataset.state, "
            "figure.dataset.theme, figure.querySelector('svg path') ? 'drawn' : 'empty'])"
        )
