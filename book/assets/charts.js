// Draws every figure.rim-chart from the specification inside it, in the page's light or dark colours, and again
// whenever the reader switches. A figure tells how it went in data-state: "drawing", "ok" or "error".
(function () {
  "use strict";

  const INK = {
    light: { text: "#222832", line: "#6b7280", grid: "#e3e5e8" },
    dark: { text: "#e6e6e6", line: "#9ca3af", grid: "#3a3f46" },
  };
  const views = new WeakMap();

  function theme() {
    return document.documentElement.dataset.theme === "dark" ? "dark" : "light";
  }

  function config(ink) {
    const labels = { labelColor: ink.text, titleColor: ink.text };
    return {
      background: "transparent",
      axis: { ...labels, domainColor: ink.line, tickColor: ink.line, gridColor: ink.grid },
      legend: labels,
      title: { color: ink.text, subtitleColor: ink.text },
    };
  }

  async function draw(figure) {
    const target = figure.querySelector(".rim-vega");
    const wanted = theme();
    figure.dataset.state = "drawing";
    try {
      const specification = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
      const options = { actions: false, renderer: "svg", config: config(INK[wanted]) };
      const previous = views.get(figure);
      const result = await vegaEmbed(target, specification, options);
      if (previous) previous.finalize();
      views.set(figure, result);
      figure.dataset.theme = wanted;
      figure.dataset.state = "ok";
    } catch (error) {
      target.textContent = "This figure could not be drawn: " + error.message;
      figure.dataset.state = "error";
    }
  }

  async function drawAll() {
    for (const figure of document.querySelectorAll("figure.rim-chart")) {
      if (figure.dataset.theme !== theme()) await draw(figure);
    }
  }

  document.addEventListener("DOMContentLoaded", function () {
    let drawing = drawAll();
    const again = () => { drawing = drawing.then(drawAll); };
    new MutationObserver(again).observe(document.documentElement, { attributeFilter: ["data-theme"] });

    // A notebook's download button would open its JSON in the tab.
    for (const link of document.querySelectorAll("a[href*='_sources/'][href$='.ipynb']")) {
      link.setAttribute("download", "");
    }
  });
})();
