"use strict";
// Small drawings: an interval on a line from 0 to 1, and a histogram.

const Charts = (() => {
  const { el, known, score, number } = Pages;
  const SVG = "http://www.w3.org/2000/svg";
  const clamp = (x) => Math.min(1, Math.max(0, x));

  function svg(tag, attributes, ...children) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  /** A score with its bounds, the null beside it, and a line at chance, on an axis from `first` to 1. */
  function interval(value, low, high, nothing, first = 0) {
    const place = (x) => clamp((x - first) / (1 - first));
    const percent = (x) => `${(100 * place(x)).toFixed(2)}%`;
    const words = `${score(value)}, 95 % interval ${score(low)} to ${score(high)}` + (known(nothing) ? `, null ${score(nothing)}` : "");
    const node = el("span", { class: "interval", role: "img", "aria-label": words, title: words },
      el("i", { class: "chance", style: { left: percent(0.5) } }));
    if (known(low) && known(high)) node.append(el("i", { class: "range", style: { left: percent(low), width: `${(100 * (place(high) - place(low))).toFixed(2)}%` } }));
    if (known(nothing)) node.append(el("i", { class: "null", style: { left: percent(nothing) } }));
    if (known(value)) node.append(el("i", { class: "dot", style: { left: percent(value) } }));
    return node;
  }

  /** Counts in bins of equal width; heights are logarithms, since a latent fires weakly far more often than strongly. */
  function histogram(counts, first, last) {
    const width = 640, height = 150, floor = height - 22;
    const most = Math.max(...counts, 1), total = counts.reduce((a, b) => a + b, 0);
    const step = width / counts.length;
    const tall = (count) => (count ? 4 + (floor - 14) * Math.log1p(count) / Math.log1p(most) : 0);
    const edge = (i) => first + (last - first) * i / counts.length;
    const bars = counts.map((count, i) => svg("rect", {
      x: i * step + 0.75, width: Math.max(step - 1.5, 0.5), y: floor - tall(count), height: tall(count), rx: 1,
    }, svg("title", {}, `${count.toLocaleString("en")} firings from ${number(edge(i))} to ${number(edge(i + 1))}`)));
    const ticks = [0, 0.25, 0.5, 0.75, 1].map((part) => {
      const anchor = part === 0 ? "start" : part === 1 ? "end" : "middle";
      return svg("text", { x: part * width, y: height - 5, "text-anchor": anchor }, number(Number((first + (last - first) * part).toPrecision(3))));
    });
    return svg("svg", {
      viewBox: `0 0 ${width} ${height}`, class: "histogram", role: "img",
      "aria-label": `Histogram of ${total.toLocaleString("en")} firings between ${number(first)} and ${number(last)}; most in one bin: ${most.toLocaleString("en")}.`,
    }, ...bars, svg("line", { x1: 0, x2: width, y1: floor + 0.5, y2: floor + 0.5 }), ...ticks);
  }

  return { interval, histogram };
})();
