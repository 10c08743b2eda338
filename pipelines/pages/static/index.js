"use strict";
// The table of all latents: only the rows in sight are in the page, so that 65,536 of them scroll as 65 do.

(() => {
  const { el, known, number, strength, share, score, visible, chip, badge, received, STATUS } = Pages;
  const { meta, index } = received;
  const at = (id) => document.getElementById(id);
  if (!meta || !index) {
    at("scroller").replaceChildren(el("p", { class: "failure", text: "The data of this dictionary are missing or damaged: write the pages again." }));
    return;
  }
  const ROW = 52, OVERSCAN = 8;
  const n = meta.n;
  const DENSITIES = [
    ["any share", () => true],
    ["never", (d) => d === 0],
    ["below 0.01 %", (d) => d > 0 && d < 1e-4],
    ["0.01 to 0.1 %", (d) => d >= 1e-4 && d < 1e-3],
    ["0.1 to 1 %", (d) => d >= 1e-3 && d < 1e-2],
    ["1 to 10 %", (d) => d >= 1e-2 && d < 0.1],
    ["above 10 %", (d) => d >= 0.1],
  ];

  const COLUMNS = [
    { key: "latent", title: "Latent", class: "num latent", values: null, cell: (i) => String(i), ascending: true },
    { key: "label", title: "Label", class: "wide", values: index.label, cell: label, ascending: true },
    index.test && { key: "value", title: index.test.title, help: index.test.help, class: "test", values: index.value, cell: test },
    index.monosemanticity && { key: "monosemanticity", title: "Mono.", help: "Monosemanticity", class: "num", values: index.monosemanticity, cell: (i) => score(index.monosemanticity[i]) },
    index.density && { key: "density", title: "Fires on", help: "Share of tokens", class: "num", values: index.density, cell: (i) => share(index.density[i]) },
    index.max_activation && { key: "max_activation", title: "Max", help: "Largest activation", class: "num", values: index.max_activation, cell: (i) => strength(index.max_activation[i]) },
    index.top && { key: "top", title: "Top tokens", class: "tokens", cell: (i) => el("span", { class: "chips" }, ...(index.top[i] ?? []).map(chip)) },
  ].filter(Boolean);

  function label(i) {
    const text = index.label[i] ?? index.candidate[i];
    const status = index.status[i];
    const by = index.by[i] ?? (index.label[i] ? null : index.candidate[i] ? "candidate" : null);
    return el("span", { class: "labelled" },
      el("span", { class: `name${index.label[i] ? "" : " faint"}` }, el("bdi", { text: text ? visible(text) : "no rule found", title: text })),
      el("span", { class: "under" }, badge(status), index.kind[i] && index.kind[i] !== status ? el("span", { text: visible(index.kind[i]) }) : null, by ? el("bdi", { text: visible(by) }) : null));
  }

  function test(i) {
    if (!known(index.value[i])) return "–";
    return el("span", { class: "measured" }, el("span", { class: "figure", text: score(index.value[i]) }), Charts.interval(index.value[i], index.low[i], index.high[i], null, 0.3));
  }

  // ---- which rows, in which order ------------------------------------------------------------------------------

  const state = { q: "", status: "", kind: "", density: "0", sort: "latent", down: false };
  let order = Int32Array.from({ length: n }, (_, i) => i);
  let haystacks = null;
  let active = -1;

  function haystack(i) {
    haystacks ??= new Array(n);
    return (haystacks[i] ??= [index.label[i], index.candidate[i], index.by[i], ...(index.top?.[i] ?? [])].filter(known).join("\n").toLowerCase());
  }

  function wanted() {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const only = words.length === 1 && /^#?\d+$/.test(words[0]) ? Number(words[0].replace("#", "")) : null;
    const dense = (DENSITIES[state.density] ?? DENSITIES[0])[1];
    const kept = new Int32Array(n);
    let found = 0;
    for (let i = 0; i < n; i++) {
      if (state.status && index.status[i] !== state.status && !(state.status === "labelled" && index.status[i] === "survives")) continue;
      if (state.kind && index.kind[i] !== state.kind) continue;
      if (state.density !== "0" && !dense(index.density[i])) continue;
      if (words.length && i !== only) {
        const text = haystack(i);
        if (!words.every((word) => text.includes(word))) continue;
      }
      kept[found++] = i;
    }
    return kept.slice(0, found);
  }

  function sorted(rows) {
    const column = COLUMNS.find((c) => c.key === state.sort) ?? COLUMNS[0];
    const sign = state.down ? -1 : 1;
    if (!column.values) return state.down ? rows.reverse() : rows;
    const values = column.values;
    const compare = new Intl.Collator("en", { numeric: true }).compare;
    return rows.sort((a, b) => {
      const x = values[a], y = values[b];
      if (!known(x) || !known(y)) return (known(y) - known(x)) || a - b; // what is not known comes last, both ways
      return (typeof x === "string" ? sign * compare(x, y) : sign * (x - y)) || a - b;
    });
  }

  function update(keepPlace = false) {
    order = sorted(wanted());
    active = -1;
    at("count").textContent = order.length === n ? `${n.toLocaleString("en")} latents` : `${order.length.toLocaleString("en")} of ${n.toLocaleString("en")}`;
    at("nothing").hidden = order.length > 0;
    at("table").setAttribute("aria-rowcount", order.length + 1);
    for (const head of at("head").children) {
      if (head.dataset.key === state.sort) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    if (!keepPlace) at("scroller").scrollTop = 0;
    remember();
    render();
  }

  // ---- drawing -------------------------------------------------------------------------------------------------

  function render() {
    const scroller = at("scroller");
    const first = Math.max(0, Math.floor(scroller.scrollTop / ROW) - OVERSCAN);
    const last = Math.min(order.length, Math.ceil((scroller.scrollTop + scroller.clientHeight) / ROW) + OVERSCAN);
    const rows = [];
    for (let at_ = first; at_ < last; at_++) rows.push(row(at_));
    const focused = at("rows").contains(document.activeElement);
    at("rows").replaceChildren(...rows);
    at("before").firstElementChild.style.height = `${first * ROW}px`;
    at("after").firstElementChild.style.height = `${(order.length - last) * ROW}px`;
    if (focused && active >= first && active < last) at("rows").children[active - first].querySelector("a").focus({ preventScroll: true });
  }

  function row(position) {
    const i = order[position];
    const cells = COLUMNS.map((column) => el("td", { class: column.class }, column.cell(i)));
    cells[0].replaceChildren(el("a", { href: `feature.html#${i}`, text: String(i), "aria-label": `Latent ${i}` }));
    return el("tr", { "aria-rowindex": position + 2, "data-at": position, class: position === active ? "active" : null }, ...cells);
  }

  let waiting = false;
  at("scroller").addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; render(); });
  }, { passive: true });
  window.addEventListener("resize", render);

  at("rows").addEventListener("click", (event) => {
    const line = event.target.closest("tr");
    if (!line || event.target.closest("a") || String(getSelection())) return;
    location.href = line.querySelector("a").href;
  });

  function move(to) {
    if (!order.length) return;
    active = Math.min(order.length - 1, Math.max(0, to));
    const scroller = at("scroller"), head = at("head").offsetHeight;
    const top = active * ROW, bottom = top + ROW + head;
    if (top < scroller.scrollTop) scroller.scrollTop = top;
    else if (bottom > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = bottom - scroller.clientHeight;
    render();
    at("rows").querySelector(`[data-at="${active}"] a`)?.focus({ preventScroll: true });
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const writing = event.target.closest("input, select");
    const page = Math.max(1, Math.floor(at("scroller").clientHeight / ROW) - 2);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page };
    if (event.key === "/" && !writing) { event.preventDefault(); at("search").focus(); at("search").select(); }
    else if (event.key === "Escape" && event.target === at("search")) { at("search").value = state.q = ""; update(); }
    else if (event.key in steps && (!writing || (event.target === at("search") && event.key === "ArrowDown"))) { event.preventDefault(); move(active + steps[event.key]); }
    else if (event.key === "Home" && !writing) { event.preventDefault(); move(0); }
    else if (event.key === "End" && !writing) { event.preventDefault(); move(order.length - 1); }
  });
  at("rows").addEventListener("focusin", (event) => { active = Number(event.target.closest("tr").dataset.at); });

  // ---- tools ---------------------------------------------------------------------------------------------------

  /** The view is in the address, so that "back" and a bookmark return to it. */
  function remember() {
    const kept = new URLSearchParams();
    for (const [name, value] of Object.entries(state)) if (value && value !== "0" && !(name === "sort" && value === "latent")) kept.set(name, value);
    const text = kept.toString();
    try {
      history.replaceState(null, "", text ? `#${text}` : location.pathname);
      sessionStorage.setItem(`pages:${meta.title}`, text);
    } catch { /* a browser may refuse both to files; the table works without */ }
  }

  function recall() {
    const kept = new URLSearchParams(location.hash.slice(1));
    for (const name of Object.keys(state)) if (kept.has(name)) state[name] = name === "down" ? kept.get(name) === "true" : kept.get(name);
  }

  function counts() {
    const found = { survives: 0, labelled: 0, unlabelled: 0, silent: 0 };
    for (const status of index.status) found[status] += 1;
    found.labelled += found.survives;
    return found;
  }

  function tools() {
    const found = counts();
    const choices = [["", "All", n], ...Object.entries(STATUS).filter(([key]) => found[key]).map(([key, name]) => [key, name, found[key]])];
    at("statuses").append(...choices.map(([key, name, count]) => el("label", {},
      el("input", { type: "radio", name: "status", value: key, checked: key === state.status, on: { change: () => { state.status = key; update(); } } }),
      el("span", {}, name, el("small", { text: count.toLocaleString("en") })))));
    const kinds = [...new Set(index.kind.filter(known))].sort();
    at("kind").append(el("option", { value: "", text: "any" }), ...kinds.map((kind) => el("option", { value: kind, text: visible(kind) })));
    at("density").append(...DENSITIES.map(([name], i) => el("option", { value: i, text: name })));
    at("kind").parentElement.hidden = kinds.length < 2;
    at("density").parentElement.hidden = !index.density;
    for (const id of ["kind", "density"]) {
      at(id).value = state[id];
      at(id).addEventListener("change", () => { state[id] = at(id).value; update(); });
    }
    at("search").value = state.q;
    at("search").addEventListener("input", () => { state.q = at("search").value; update(); });
    at("tools").addEventListener("submit", (event) => { event.preventDefault(); move(0); });
  }

  function head() {
    at("head").append(...COLUMNS.map((column) => el("th", { class: column.class, scope: "col", "data-key": column.key, title: column.help ?? null },
      column.values !== undefined ? el("button", { type: "button", on: { click: () => sortBy(column) } }, column.title, el("span", { class: "arrow", "aria-hidden": "true" })) : column.title)));
  }

  function sortBy(column) {
    state.down = state.sort === column.key ? !state.down : !column.ascending;
    state.sort = column.key;
    update();
  }

  function masthead() {
    document.title = `${meta.title} – features`;
    at("title").textContent = visible(meta.title);
    const where = meta.hooks.join(", ");
    at("subtitle").textContent = visible(`${n.toLocaleString("en")} latents, ${meta.architecture}${where ? `, on ${where}` : ""}${meta.model ? ` of ${meta.model.split("/").pop()}` : ""}`);
    at("figures").append(...meta.figures.map((figure) => el("div", {},
      el("dt", { text: figure.words }), el("dd", { text: figure.format === "share" ? share(figure.value) : number(figure.value) }))));
  }

  recall();
  masthead();
  tools();
  head();
  update();
  performance.mark("ready");
})();
