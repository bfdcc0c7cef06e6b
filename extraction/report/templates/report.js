
"use strict";
// Fill the list of responses. All text is inserted as text; the filters are kept in the address (#q=word&side=pos).
(() => {
  const block = document.getElementById("rows");
  if (!block) return;
  const data = JSON.parse(block.textContent);
  const rows = data.rows.map((values) => {
    const row = Object.fromEntries(data.columns.map((name, i) => [name, values[i]]));
    row.searched = [row.response, data.questions[row.question], row.id].join("\n").toLowerCase();
    return row;
  });
  const byId = (name) => document.getElementById(name);
  const FIELDS = ["q", "side", "kept", "question", "sort"];
  let page = 0;

  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  // append text, with every occurrence of the searched word appendMarked
  const appendMarked = (parent, text, word) => {
    const lower = text.toLowerCase();
    let from = 0;
    if (word && lower.length === text.length) {
      for (let at = lower.indexOf(word); at >= 0; at = lower.indexOf(word, from)) {
        parent.append(text.slice(from, at), element("mark", "", text.slice(at, at + word.length)));
        from = at + word.length;
      }
    }
    parent.append(text.slice(from));
    return parent;
  };

  const scoreText = (value) => (value === null || value === undefined ? "no score" : "score " + Number(value.toFixed(1)));

  const item = (row, word) => {
    const made = element("li");
    made.dataset.id = row.id;
    const line = element("p", "row-details");
    line.append(element("span", "side " + row.side, data.sides[row.side]), element("span", "", scoreText(row.score)));
    for (const [name, value] of Object.entries(row.scores)) {
      line.append(element("span", "", name + ": " + (value === null ? "none" : value)));
    }
    line.append(element("span", "", row.reason ? "left out: " + row.reason : "counts"));
    if (row.finish === "length") line.append(element("span", "", "cut off at the maximum length"));
    line.append(element("span", "", row.id));
    made.append(line, appendMarked(element("p", "question-text"), data.questions[row.question], word));
    made.append(appendMarked(element("p", "response-text"), row.response || "(empty)", word));
    const details = element("details");
    details.append(element("summary", "", "Instruction and prompt"));
    details.addEventListener("toggle", () => {
      if (!details.open || details.childElementCount > 1) return;
      if (row.instruction) details.append(element("p", "question-text", row.instruction));
      details.append(element("pre", "", data.prompts[row.prompt]));
    });
    made.append(details);
    return made;
  };

  const matching = (state) => {
    const word = state.q.trim().toLowerCase();
    const list = rows.filter(
      (row) =>
        (!word || row.searched.includes(word)) &&
        (!state.side || row.side === state.side) &&
        (!state.kept || (state.kept === "no") === Boolean(row.reason)) &&
        (!state.question || String(row.question) === state.question),
    );
    if (state.sort) {
      const sign = state.sort === "low" ? 1 : -1;
      const missing = (row) => (row.score === null || row.score === undefined ? 1 : 0);
      list.sort((a, b) => missing(a) - missing(b) || sign * (a.score - b.score) || 0);
    }
    return list;
  };

  const readFilters = () => Object.fromEntries(FIELDS.map((name) => [name, byId(name).value]));

  const show = () => {
    const state = readFilters();
    const list = matching(state);
    const pages = Math.max(1, Math.ceil(list.length / data.perPage));
    page = Math.min(Math.max(page, 0), pages - 1);
    const first = page * data.perPage;
    const part = list.slice(first, first + data.perPage);
    byId("list").replaceChildren(...part.map((row) => item(row, state.q.trim().toLowerCase())));
    const span = part.length ? first + 1 + " to " + (first + part.length) + " of " : "";
    byId("count").textContent = list.length ? "Showing " + span + list.length + " responses" : "No response matches.";
    byId("page").textContent = "Page " + (page + 1) + " of " + pages;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page === pages - 1;
    byId("pager").hidden = pages === 1;
  };

  const writeAddress = () => {
    const state = new URLSearchParams(Object.entries(readFilters()).filter(([, value]) => value));
    if (page) state.set("page", String(page + 1));
    const text = state.toString();
    try {
      history.replaceState(null, "", text ? "#" + text : "#responses");
    } catch {
      // a page in a sandbox has no address of its own
    }
  };

  const readAddress = () => {
    const text = location.hash.slice(1);
    if (!text.includes("=")) return false;
    const state = new URLSearchParams(text);
    for (const name of FIELDS) {
      byId(name).value = state.get(name) || "";
      if (byId(name).selectedIndex === -1) byId(name).value = "";
    }
    page = (parseInt(state.get("page"), 10) || 1) - 1;
    return true;
  };

  const changed = () => {
    page = 0;
    show();
    writeAddress();
  };
  const turn = (step) => {
    page += step;
    show();
    writeAddress();
    byId("responses").scrollIntoView();
  };

  const form = byId("filters");
  form.hidden = false;
  form.addEventListener("input", changed);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(changed));
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  window.addEventListener("hashchange", () => readAddress() && show());
  const hasAddress = readAddress();
  show();
  if (hasAddress) byId("responses").scrollIntoView();
})();
