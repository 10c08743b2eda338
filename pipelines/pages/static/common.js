"use strict";
// What both pages share. Everything from outside reaches the page as text, through `el`: no markup is ever parsed.

const Pages = (() => {
  const received = { meta: null, index: null, blocks: new Map() };

  /** An element. `props`: `text`, `class`, `on` (a map of listeners), `style` (a map); else attributes. */
  function el(tag, props = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(props)) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "text") node.textContent = value;
      else if (name === "class") node.className = value;
      else if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
      else if (name === "style") for (const [key, part] of Object.entries(value)) node.style.setProperty(key, part);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  const known = (value) => value !== null && value !== undefined;

  /** A number in three digits, without an exponent where that reads well. */
  function number(value) {
    if (!known(value)) return "–";
    if (typeof value !== "number") return String(value);
    if (Number.isInteger(value)) return value.toLocaleString("en");
    const size = Math.abs(value);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return size >= 0.001 ? value.toPrecision(3) : value.toExponential(1);
  }

  /** An activation: three digits, whole or not, so that a column of them lines up. */
  const strength = (value) => (typeof value === "number" && value !== 0 && Math.abs(value) < 1000 && Math.abs(value) >= 0.001 ? value.toPrecision(3) : number(value));

  /** A share as a percentage: 0.0123 → "1.2 %". */
  function share(value) {
    if (!known(value)) return "–";
    const percent = 100 * value;
    if (percent === 0) return "0 %";
    return `${percent >= 10 ? percent.toFixed(0) : percent >= 0.001 ? percent.toPrecision(2) : percent.toExponential(0)} %`;
  }

  const score = (value) => (known(value) ? value.toFixed(2) : "–");

  const SPECIAL = { "\n": "↵", "\r": "␍", "\t": "⇥", "\0": "␀" };
  // Marks that turn the direction of what follows, or cannot be seen at all, are named instead of obeyed.
  const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

  function visible(text) {
    return text.replace(UNSEEN, (c) => SPECIAL[c] ?? `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
  }

  /** A token as a chip; a leading space is drawn. */
  function chip(token) {
    const text = visible(String(token));
    const spaced = text.startsWith(" ");
    return el("span", { class: "chip", title: JSON.stringify(token) },
      spaced ? el("span", { class: "space", text: "␣", "aria-hidden": "true" }) : null,
      el("bdi", { text: (spaced ? text.slice(1) : text) || "∅" }));
  }

  const STATUS = {
    survives: "Survives", labelled: "Labelled", unlabelled: "Unlabelled", silent: "Silent",
  };

  function badge(status) {
    return el("span", { class: `badge ${STATUS[status] ? status : "unlabelled"}`, text: STATUS[status] ?? "Unlabelled" });
  }

  /** Run a script of this folder; rejects if it is not there. */
  function load(source) {
    return new Promise((resolve, reject) => {
      const script = el("script", { src: source });
      script.onload = () => { script.remove(); resolve(); };
      script.onerror = () => { script.remove(); reject(new Error(`${source} is missing or damaged: write the pages again.`)); };
      document.head.append(script);
    });
  }

  return {
    el, known, number, strength, share, score, visible, chip, badge, load, received, STATUS,
    // Called by the data files.
    meta(value) { received.meta = value; },
    index(value) { received.index = value; },
    block(at, names, rows) { received.blocks.set(at, { names, rows }); },
  };
})();
