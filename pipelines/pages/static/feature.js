"use strict";
// One latent: feature.html#123. Its data come with the block of latents that it belongs to.

(() => {
  const { el, known, number, strength, share, score, visible, chip, badge, load, received } = Pages;
  const { meta } = received;
  const at = (id) => document.getElementById(id);
  const KINDS = {
    top: ["Strongest", "The strongest firings, at most one from a document."],
    quantile: ["Every strength", "One firing from each of equal ranks of strength, weakest first."],
    random: ["At random", "Firings drawn at random."],
    weighted: ["By weight", "Firings drawn in proportion to their strength."],
    false_negative: ["Missed by the label", "The latent fires, but the label says that it should not."],
    false_positive: ["Claimed by the label", "The label says that the latent should fire, but it does not."],
  };
  const RATES = {
    detection_tpr: ["Firings that the label predicts", share],
    detection_tpr_strong: ["… of the strong ones", share],
    detection_fpr: ["Other tokens that it predicts too", share],
    detection_precision: ["Predictions that are right", share],
    detection_auroc: ["AUROC", score],
    detection_mismatch_p: ["Other latents that it fits as well", share],
    monosemanticity: ["Monosemanticity", score],
  };

  function fail(words) {
    at("feature").replaceChildren(el("p", { class: "failure", text: words }));
  }
  if (!meta) { fail("The data of this dictionary are missing or damaged: write the pages again."); return; }

  const section = (title, help, ...content) => el("section", {},
    el("h2", { text: title }), help ? el("p", { class: "muted", text: help }) : null, ...content);

  const chips = (tokens) => el("p", { class: "chips" }, ...tokens.map(chip));

  // ---- the parts -----------------------------------------------------------------------------------------------

  function heading(latent, row, status) {
    const label = row.label ?? null;
    const rule = label ?? row.candidate ?? null;
    const whole = Array.isArray(row.rule_values) ? row.rule_values : [];
    return el("header", {},
      el("p", { class: "eyebrow", text: `Latent ${latent}` }),
      el("h1", { tabindex: "-1", id: "name", class: label ? null : "faint" }, el("bdi", { text: rule ? visible(rule) : status === "silent" ? "Never fires" : "Unlabelled" })),
      el("p", { class: "under" }, badge(status),
        row.label_kind && row.label_kind !== status ? el("span", { text: visible(String(row.label_kind)) }) : null,
        label || !rule ? null : el("span", { text: "The best rule found did not pass its tests." })),
      whole.length > 6 ? el("details", {}, el("summary", { text: `All ${whole.length} values of the rule` }), chips(whole)) : null,
      el("dl", { class: "figures" }, ...[
        [share(row.density), "of tokens fire it"],
        [strength(row.max_activation), "largest activation"],
        [number(row.n_train_active), "firings, training documents"],
        [number(row.n_heldout_active), "firings, held-out documents"],
        [known(row.monosemanticity) ? score(row.monosemanticity) : null, "monosemanticity"],
      ].filter(([value]) => value !== null && value !== "–").map(([value, words]) => el("div", {}, el("dt", { text: words }), el("dd", { text: value })))));
  }

  function tests(row) {
    const measured = meta.tests.filter((test) => known(row[test.value]));
    const rates = Object.entries(RATES).filter(([name]) => known(row[name]));
    if (!measured.length && !rates.length) return section("How the label did", "It was not tested.");
    const lines = measured.map((test) => el("tr", {},
      el("th", { scope: "row", title: test.help || null, text: test.title }),
      el("td", { class: "num", text: score(row[test.value]) }),
      el("td", { class: "num", text: `${score(row[test.low])} – ${score(row[test.high])}` }),
      el("td", { class: "num", text: test.null ? score(row[test.null]) : "–" }),
      el("td", { class: "plot" }, Charts.interval(row[test.value], row[test.low], row[test.high], test.null ? row[test.null] : null))));
    return section("How the label did", "On documents that had no part in making it. Bars are 95 % intervals; the open mark is the same label on other latents; the line stands at chance.",
      measured.length ? el("div", { class: "card scroll" }, el("table", { class: "tests" },
        el("thead", {}, el("tr", {}, ...["Test", "Score", "95 % interval", "Null", "0 to 1"].map((title, i) => el("th", { scope: "col", class: i && i < 4 ? "num" : null, text: title })))),
        el("tbody", {}, ...lines))) : null,
      rates.length ? el("dl", { class: "rates" }, ...rates.map(([name, [words, form]]) => el("div", {}, el("dt", { text: words }), el("dd", { text: form(row[name]) })))) : null);
  }

  function histogram(row) {
    const counts = row.histogram ?? row.histogram_counts ?? row.activation_histogram;
    if (!Array.isArray(counts) || !counts.length || !counts.every(Number.isFinite)) return null;
    return section("How strongly it fires", "Firings by strength, on a logarithmic scale.",
      el("figure", { class: "card" }, Charts.histogram(counts, 0, row.max_activation ?? 1)));
  }

  function words(row) {
    const lists = [["Fires on", row.top_tokens], ["Promotes", row.promotes], ["Suppresses", row.suppresses]].filter(([, list]) => Array.isArray(list) && list.length);
    if (!lists.length) return null;
    return section("Tokens", "What it fires on most, and which next tokens its direction makes more or less likely, seen through the final norm.",
      el("div", { class: "columns" }, ...lists.map(([title, list]) => el("div", { class: "card" }, el("h3", { text: title }), chips(list)))));
  }

  /** A context as spans of tokens; those that fire are marked, and say how strongly on hover. */
  function text(context, most) {
    const fires = new Map(context.at.map((where, i) => [where, context.values[i]]));
    const spans = [];
    context.pieces.forEach((piece, i) => {
      const value = fires.get(i) ?? 0;
      const last = spans[spans.length - 1];
      if (piece === "" && last) last.push([piece, value, i]); // a part of the character before it
      else spans.push([[piece, value, i]]);
    });
    return spans.flatMap((group, place) => {
      const value = Math.max(...group.map(([, v]) => v));
      const whole = visible(group[0][0]);
      const centre = group.some(([, , i]) => i === context.peak);
      if (!(value > 0) && !centre) return place ? whole : whole.trimStart();
      // The space before a word stays outside of its mark, so that lines break before the mark.
      const word = whole.trimStart() || whole;
      const before = whole.slice(0, whole.length - word.length);
      const token = value > 0 ? el("mark", {
        "data-tip": `${JSON.stringify(group[0][0])}  ${group.map(([, v]) => strength(v)).join(" + ")}`,
        style: { "--strength": Math.min(1, value / most).toFixed(3) }, text: word,
      }) : el("span", { text: word });
      if (centre) token.classList.add("peak");
      return [place ? before : "", token];
    });
  }

  function contexts(all, row) {
    if (!all.length) return section("Contexts", row.density === 0 || row.label_kind === "silent" ? "It never fires, so there are none." : "None were kept.");
    const most = Math.max(row.max_activation ?? 0, ...all.flatMap((context) => context.values), 1e-9);
    const kinds = new Map();
    for (const context of all) {
      const kind = context.kind ?? "contexts";
      if (!kinds.has(kind)) kinds.set(kind, []);
      kinds.get(kind).push(context);
    }
    const shown = new Set(["kind", "rank", "context", "offset", "document", "peak", "max_value", "pieces", "at", "values"]);
    return [...kinds].map(([kind, rows]) => {
      const [title, help] = KINDS[kind] ?? [visible(kind.replaceAll("_", " ")).replace(/^./, (c) => c.toUpperCase()), ""];
      return section(`${title}`, help, el("ol", { class: "contexts card" }, ...rows.map((context) => {
        const notes = Object.entries(context).filter(([name, value]) => !shown.has(name) && known(value));
        return el("li", {},
          el("span", { class: "value" }, known(context.max_value) ? el("b", { text: strength(context.max_value) }) : null,
            known(context.document) ? el("small", { text: `document ${context.document}` }) : null,
            ...notes.map(([name, value]) => el("small", { text: visible(`${name.replaceAll("_", " ")} ${number(value)}`) }))),
          context.pieces.length ? el("span", { class: "text", dir: "auto" }, ...text(context, most)) : el("span", { class: "muted", text: "The text was left out when this was published." }));
      })));
    });
  }

  function neighbours(rows) {
    if (!rows.length) return null;
    return section("Nearest latents", "By the cosine of their decoder directions.",
      el("div", { class: "card" }, el("table", { class: "near" }, el("tbody", {}, ...rows.map(([latent, cosine, label]) => el("tr", {},
        el("td", { class: "num" }, el("a", { href: `#${latent}`, text: String(latent) })),
        el("td", { class: "plot" }, el("span", { class: "bar-of", role: "img", "aria-label": `cosine ${score(cosine)}` }, el("i", { style: { width: `${(100 * Math.max(0, cosine)).toFixed(1)}%` } }))),
        el("td", { class: "num", text: score(cosine) }),
        el("td", { class: label ? null : "faint" }, el("bdi", { text: label ? visible(label) : "unlabelled" }))))))));
  }

  function others(rows) {
    if (!rows.length) return null;
    return section("What others call it", "Each of these labels takes the same tests.",
      ...rows.map((row) => el("div", { class: "card other" },
        el("p", { class: "name" }, el("bdi", { text: visible(String(row.label ?? "no label")) })),
        el("p", { class: "muted" }, el("bdi", { text: visible([row.source, row.author, row.date].filter(known).map(String).join(" · ")) })),
        facts(Object.entries(row).filter(([name, value]) => known(value) && !["latent", "label", "source", "author", "date"].includes(name)), plain))));
  }

  function facts(entries, plain) {
    return entries.length ? el("dl", { class: "facts" }, ...entries.flatMap(([name, value]) => [
      el("dt", { text: visible(name.replaceAll("_", " ")) }), el("dd", {}, el("bdi", { text: visible(plain(value)) }))])) : null;
  }

  const plain = (value) => typeof value === "object" ? JSON.stringify(value) : typeof value === "boolean" ? (value ? "yes" : "no") : String(value);

  function everything(row) {
    return el("details", { class: "all" }, el("summary", { text: "Everything recorded about it" }), facts(Object.entries(row).filter(([, value]) => known(value)), plain));
  }

  function origin() {
    const { provenance } = meta;
    if (!Object.keys(provenance).length) return null;
    return el("details", {}, el("summary", { text: "What it comes from" }), facts(Object.entries(provenance), plain));
  }

  // ---- the page ------------------------------------------------------------------------------------------------

  const named = (names, values) => Object.fromEntries(names.map((name, i) => [name, values[i]]));

  async function show() {
    const asked = decodeURIComponent(location.hash.slice(1));
    const latent = Number(asked || 0);
    if (!/^\d*$/.test(asked) || latent >= meta.n) { fail(`There is no latent ${asked}: they are numbered from 0 to ${meta.n - 1}.`); return; }
    const number_ = Math.floor(latent / meta.block);
    if (!received.blocks.has(number_)) {
      try { await load(`data/block-${number_}.js`); } catch (error) { fail(error.message); return; }
    }
    const block = received.blocks.get(number_);
    const record = block?.rows[latent % meta.block];
    if (!record) { fail(`The data of latent ${latent} are damaged: write the pages again.`); return; }
    const row = named(block.names.columns, record.columns);
    const all = record.contexts.map((values) => named([...block.names.contexts, "pieces", "at", "values"], values));
    at("feature").replaceChildren(...[
      heading(latent, row, record.status), tests(row), others(record.others), words(row), histogram(row),
      contexts(all, row), neighbours(record.neighbours), everything(row), origin(),
    ].flat().filter(Boolean));
    document.title = `${latent}: ${row.label ?? row.candidate ?? "unlabelled"} – ${meta.title}`;
    step("previous", latent - 1);
    step("next", latent + 1);
    at("number").value = latent;
    scrollTo(0, 0);
    at("tip").hidden = true;
    performance.mark("ready");
  }

  function step(id, latent) {
    if (latent >= 0 && latent < meta.n) at(id).setAttribute("href", `#${latent}`);
    else at(id).removeAttribute("href");
  }

  // The value of a token, beside the pointer.
  document.addEventListener("pointerover", (event) => {
    const token = event.target.closest?.("[data-tip]");
    at("tip").hidden = !token;
    if (!token) return;
    at("tip").textContent = visible(token.dataset.tip);
    const box = token.getBoundingClientRect(), tip = at("tip").getBoundingClientRect();
    at("tip").style.left = `${Math.max(8, Math.min(innerWidth - tip.width - 8, box.left + box.width / 2 - tip.width / 2))}px`;
    at("tip").style.top = `${box.top > tip.height + 12 ? box.top - tip.height - 6 : box.bottom + 6}px`;
  });
  document.addEventListener("scroll", () => { at("tip").hidden = true; }, { passive: true });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input")) return;
    const id = { ArrowLeft: "previous", ArrowRight: "next" }[event.key];
    if (id && at(id).hasAttribute("href")) { event.preventDefault(); location.hash = at(id).getAttribute("href"); }
    else if (event.key === "/") { event.preventDefault(); at("number").focus(); at("number").select(); }
  });
  at("go").addEventListener("submit", (event) => { event.preventDefault(); location.hash = `#${at("number").value.trim()}`; });
  window.addEventListener("hashchange", async () => { await show(); at("name")?.focus({ preventScroll: true }); });

  at("dictionary").textContent = visible(meta.title);
  try {
    const kept = sessionStorage.getItem(`pages:${meta.title}`);
    if (kept) at("back").setAttribute("href", `index.html#${kept}`);
  } catch { /* see index.js */ }
  show();
})();
