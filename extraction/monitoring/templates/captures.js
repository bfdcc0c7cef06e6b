// The state of the page (prompt, trait, layer, point, token) and everything drawn from it. All text is inserted as text;
// the state is kept in the address.
(() => {
  const byId = (name) => document.getElementById(name);
  const json = (name) => JSON.parse(byId(name).textContent);
  const data = json("set");
  if (!data.prompts.length || !data.traits.length) return;
  const NONE = "\u2013";
  const OUT = data.points.indexOf(data.levelsAt);
  const [nLayers, nPoints, nFigures] = [data.layers.length, data.points.length, data.figures.length];
  const state = { p: 0, t: 0, l: data.traits[0].layer, at: Math.max(OUT, 0), i: 0 };

  // --- data blocks, unpacked on first use -----------------------------------------------------------------------------

  const bytes = (text) => {
    const found = atob(text);
    const out = new Uint8Array(found.length);
    for (let i = 0; i < found.length; i++) out[i] = found.charCodeAt(i);
    return out;
  };

  // cache the results of the most recent calls
  const memoized = (count, make) => {
    const cache = new Map();
    return (...key) => {
      const name = key.join("-");
      const value = cache.has(name) ? cache.get(name) : make(...key);
      cache.delete(name);
      cache.set(name, value);
      if (cache.size > count) cache.delete(cache.keys().next().value);
      return value;
    };
  };

  const textOf = memoized(64, (p) => json(`text-${p}`));

  // Float32Array: a trajectory over tokens for each point and layer
  const valuesOf = memoized(64, (p, t) => {
    const packed = json(`values-${p}-${t}`);
    const raw = bytes(packed.codes);
    const codes = data.bits === 16 ? new Uint16Array(raw.buffer) : raw;
    const tokens = data.prompts[p].tokens;
    const values = Float32Array.from(codes, (code, at) => {
      const j = Math.floor(at / tokens);
      return packed.low[j] + code * packed.step[j];
    });
    for (const [at, value] of packed.far) values[at] = value === null ? NaN : value;
    return values;
  });
  const rowOf = (p, t, at, l) => {
    const tokens = data.prompts[p].tokens;
    const from = (at * nLayers + l) * tokens;
    return valuesOf(p, t).subarray(from, from + tokens);
  };

  const traitOf = memoized(16, (t) => {
    const packed = json(`trait-${t}`);
    return { dynamics: new Float32Array(bytes(packed.dynamics).buffer), bars: bytes(packed.bars) };
  });
  const figure = (name, p, t = state.t, l = state.l) => {
    const value = traitOf(t).dynamics[(p * nLayers + l) * nFigures + data.figures.indexOf(name)];
    return Number.isFinite(value) ? value : null;
  };
  const barOf = (p, t, l) => {
    const from = (p * nLayers + l) * data.bins;
    return traitOf(t).bars.subarray(from, from + data.bins);
  };
  const scale = (l = state.l) => {
    const trait = data.traits[state.t];
    return { centre: trait.centre[l][state.at], half: trait.half[l][state.at] };
  };
  const levels = () => {
    const found = data.traits[state.t].levels[state.l];
    return state.at === OUT && found.every((value) => value !== null) ? found : null;
  };

  // --- formatting ----------------------------------------------------------------------------------------------------

  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const number = (value) => {
    if (value === null || !Number.isFinite(value)) return NONE;
    const size = Math.abs(value);
    const plain = size === 0 ? "0" : size >= 1e4 ? String(Number(value.toPrecision(4))) : value.toPrecision(4);
    return (size && (size < 1e-4 || size >= 1e6) ? value.toExponential(3) : plain).replace("-", "\u2212");
  };
  const WHOLE = new Set(["peak_token", "commitment"]);
  const figureText = (name, value) => {
    if (value === null) return NONE;
    if (name === "committed_to") return data.sides[String(value)] || NONE;
    return WHOLE.has(name) ? String(value) : number(value);
  };
  const plainOf = (p, i) => {
    const { pieces, tokens } = textOf(p);
    return pieces[i] || tokens[i] || "";
  };
  const quoted = (text) => "\u201c" + text.replaceAll("\n", "\u23ce").replaceAll(" ", "\u2423").replaceAll("\t", "\u21e5") + "\u201d";
  const pointName = () => data.points[state.at].replaceAll("_", " ");

  // --- colours ------------------------------------------------------------------------------------------------------

  const isDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isPrinted = window.matchMedia("print");
  const palettes = { light: Charts.palette(data.colours.light), dark: Charts.palette(data.colours.dark) };
  let colours = palettes.light;
  let look = {};
  const readStyle = () => {
    colours = palettes[isDark.matches && !isPrinted.matches ? "dark" : "light"];
    const css = getComputedStyle(document.documentElement);
    look = { font: "12px " + getComputedStyle(document.body).fontFamily };
    for (const name of ["page", "text", "soft", "line", "raised", "positive", "negative"]) {
      look[name] = css.getPropertyValue("--" + name).trim();
    }
  };
  const colourOf = (value, { centre, half }) => (Number.isFinite(value) ? colours[Charts.place(value, centre, half)] : null);

  // --- the list of prompts ------------------------------------------------------------------------------------------

  const items = data.prompts.map((prompt, p) => {
    const button = element("button");
    button.type = "button";
    const head = element("span", "item-head");
    head.append(element("span", "item-id", prompt.id), element("span", "item-mean"));
    const bar = element("canvas", "item-bar");
    bar.setAttribute("aria-hidden", "true");
    button.append(head, element("span", "item-text", prompt.prompt || "(empty)"), bar);
    button.addEventListener("click", () => go({ p }));
    const made = element("li");
    made.append(button);
    return { made, button, bar, mean: head.lastChild, searched: (prompt.id + "\n" + prompt.prompt).toLowerCase() };
  });

  const showList = () => {
    items.forEach((item, p) => {
      item.mean.textContent = number(figure("mean", p));
      Charts.bar(item.bar, barOf(p, state.t, state.l), colours);
    });
  };
  const find = () => {
    const word = byId("find").value.trim().toLowerCase();
    let count = 0;
    for (const item of items) {
      item.made.hidden = Boolean(word) && !item.searched.includes(word);
      count += item.made.hidden ? 0 : 1;
    }
    byId("found").hidden = !word;
    byId("found").textContent = count === 1 ? "1 prompt matches" : count + " prompts match";
  };

  // --- the text -----------------------------------------------------------------------------------------------------

  let spans = [];
  const tokenOf = (texts, i) => {
    const [piece, name] = [texts.pieces[i], texts.tokens[i]];
    const isSpecial = !piece || (piece === name && /^(<[^<>\s]+>|\[[A-Z0-9_]+\])$/.test(piece));
    const span = element("span", isSpecial ? "token special" : "token");
    span.textContent = isSpecial ? name || "\u2205" : piece.replaceAll("\n", "\u23ce\n").replaceAll("\t", "\u21e5\t");
    span.id = "token-" + i;
    span.dataset.i = i;
    span.setAttribute("role", "option");
    return span;
  };
  const showText = () => {
    const [prompt, texts] = [data.prompts[state.p], textOf(state.p)];
    spans = texts.ids.map((_, i) => tokenOf(texts, i));
    const parts = [["Prompt", spans.slice(0, prompt.prompted)], ["Response", spans.slice(prompt.prompted)]];
    const made = parts.map(([name, tokens]) => {
      const part = element("div", "part " + name.toLowerCase());
      part.setAttribute("role", "group");
      part.setAttribute("aria-label", name);
      const words = element("p", "token-text");
      words.dir = "auto";
      words.setAttribute("role", "presentation");
      words.append(...tokens);
      const head = element("span", "part-name", name);
      head.setAttribute("aria-hidden", "true");
      part.append(head, tokens.length ? words : element("p", "hint", "(no tokens)"));
      return part;
    });
    byId("text").replaceChildren(...made);
    byId("chosen-title").textContent = prompt.id;
    byId("chosen-facts").textContent = `${prompt.prompted} prompt tokens, ${prompt.answered} response tokens; ended by: ${prompt.finish}`;
  };
  const paintText = () => {
    const [row, span, commits] = [rowOf(state.p, state.t, state.at, state.l), scale(), commitment()];
    spans.forEach((token, i) => {
      const colour = colourOf(row[i], span);
      token.classList.toggle("commits", commits !== null && commits.token === i);
      token.style.backgroundColor = colour ? colour.css : "";
      token.style.color = colour ? colour.ink : "";
    });
  };
  const markToken = () => {
    for (const old of byId("text").querySelectorAll("[aria-selected]")) {
      old.removeAttribute("aria-selected");
    }
    const now = spans[state.i];
    if (!now) return;
    now.setAttribute("aria-selected", "true");
    byId("text").setAttribute("aria-activedescendant", now.id);
  };

  // --- the status line ----------------------------------------------------------------------------------------------

  const showStatus = (i = state.i, l = state.l) => {
    const prompt = data.prompts[state.p];
    if (i >= prompt.tokens) return;
    const where = i < prompt.prompted ? "prompt" : "response " + (i - prompt.prompted);
    const value = rowOf(state.p, state.t, state.at, l)[i];
    const parts = [
      quoted(plainOf(state.p, i)),
      `token ${i} (${where})`,
      "id " + textOf(state.p).ids[i],
      `layer ${data.layers[l]}, ${pointName()}`,
      `${data.traits[state.t].name} ${number(value)}`,
    ];
    byId("status").replaceChildren(...parts.map((part, at) => element("span", at === parts.length - 1 ? "value" : "", part)));
    for (const span of [...byId("status").children].slice(1)) span.before(" ");
  };

  // --- plots --------------------------------------------------------------------------------------------------------

  let place = null;
  let image = null;
  const makeImage = () => {
    const prompt = data.prompts[state.p];
    const rows = data.layers.map((_, l) => [rowOf(state.p, state.t, state.at, l), scale(l)]);
    image = Charts.bitmap(prompt.tokens, nLayers, (token, l) => {
      const colour = colourOf(rows[l][0][token], rows[l][1]);
      return colour && colour.rgb;
    });
  };
  const drawMap = (over = null) => {
    const prompted = data.prompts[state.p].prompted;
    Charts.heat(byId("map"), { place, image, layerNames: data.layers, prompted, token: state.i, layer: state.l, over }, look);
  };
  const commitment = () => {
    const token = figure("commitment", state.p);
    if (token === null || state.at !== OUT) return null;
    const side = figure("committed_to", state.p);
    return { token: data.prompts[state.p].prompted + token, colour: side > 0 ? look.positive : look.negative };
  };
  const drawLine = () => {
    const found = levels();
    const named = found ? [[found[0], "negative level", look.negative], [found[1], "positive level", look.positive]] : [];
    const row = rowOf(state.p, state.t, state.at, state.l);
    const { prompted } = data.prompts[state.p];
    Charts.line(byId("line"), { place, values: row, prompted, token: state.i, levels: named, ...scale(), commitment: commitment() }, look);
  };
  const measure = () => {
    place = Charts.layout(byId("plots").clientWidth, data.prompts[state.p].tokens, nLayers);
  };
  const describePlots = () => {
    const trait = data.traits[state.t];
    byId("trait-note").textContent = `${trait.name} (${trait.method}): ${trait.description}`;
    byId("commits-note").hidden = commitment() === null;
    byId("map-note").textContent = `${trait.name}, ${pointName()}; each layer on its own scale. Click a cell to choose its layer and token.`;
    byId("map").setAttribute("aria-label", `Heat map of ${trait.name}, layers by tokens. Arrow keys move; the line at the foot of the page shows the value.`);
    const from = `The projection at layer ${data.layers[state.l]} over the tokens`;
    const known = levels() ? "; dashed, the mean of the run's negative and positive responses" : "";
    byId("line-note").textContent = `${from}${known}. Triangles: values off the scale.`;
    byId("line").setAttribute("aria-label", `${from}. The text gives the value of every token.`);
  };
  const keepInSight = () => {
    const [plots, x] = [byId("plots"), Charts.columnX(place, state.i)];
    if (x < plots.scrollLeft + 60) plots.scrollLeft = x - 60;
    else if (x > plots.scrollLeft + plots.clientWidth - 60) plots.scrollLeft = x - plots.clientWidth + 60;
  };

  // --- legend, summary, table ---------------------------------------------------------------------------------------

  const showLegend = () => {
    const { centre, half } = scale();
    const found = levels();
    const stops = colours.filter((_, i) => i % 2 === 0).map((colour) => colour.css);
    byId("legend-bar").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    byId("legend-low").textContent = "\u2264 " + number(centre - half);
    byId("legend-centre").textContent = number(centre);
    byId("legend-high").textContent = "\u2265 " + number(centre + half);
    byId("legend-note").textContent = found
      ? `Middle: half way between the levels of negative (${number(found[0])}) and positive (${number(found[1])}) responses.`
      : "Middle: the median of the set's response tokens here.";
  };

  const termOf = (p, name, value) => {
    const row = element("div");
    const what = element("dd", "", figureText(name, value));
    if (WHOLE.has(name) && value !== null) {
      const i = data.prompts[p].prompted + value;
      const link = element("button", "jump", quoted(plainOf(p, i)));
      link.type = "button";
      link.addEventListener("click", () => go({ i }));
      what.append(" ", link);
    }
    row.append(element("dt", "", heads[name]), what);
    return row;
  };
  const showDynamics = () => {
    byId("dynamics-title").textContent = `The response at layer ${data.layers[state.l]}, residual out`;
    byId("dynamics").replaceChildren(...data.figures.map((name) => termOf(state.p, name, figure(name, state.p))));
  };

  const table = document.querySelector("table.every");
  const titles = [...table.tHead.rows[0].cells];
  const heads = Object.fromEntries(data.figures.map((name, f) => [name, titles[f + 2].textContent]));
  const rows = [...table.tBodies[0].rows];
  rows.forEach((row, p) => {
    row.dataset.p = p;
    const button = element("button", "jump", data.prompts[p].id);
    button.type = "button";
    row.cells[0].firstChild.replaceWith(button);
    row.addEventListener("click", () => {
      go({ p });
      byId("chosen-title").scrollIntoView({ block: "start" });
    });
  });
  const sorting = { column: -1, sign: 1 };
  const valueAt = (p, column) => {
    if (column === 0) return p;
    return column === 1 ? data.prompts[p].answered : figure(data.figures[column - 2], p);
  };
  const sortTable = () => {
    const { column, sign } = sorting;
    titles.forEach((title, at) => {
      if (at === column) title.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      else title.removeAttribute("aria-sort");
    });
    if (column < 0) return;
    const keyed = rows.map((row, p) => [valueAt(p, column), p, row]);
    keyed.sort(([a, p], [b, q]) => (a === null) - (b === null) || sign * ((a || 0) - (b || 0)) || p - q);
    table.tBodies[0].append(...keyed.map(([, , row]) => row));
  };
  titles.forEach((title, column) => {
    const button = element("button", "sort", title.textContent);
    button.type = "button";
    button.addEventListener("click", () => {
      const first = column < 2 ? 1 : -1;
      sorting.sign = sorting.column === column ? -sorting.sign : first;
      sorting.column = column;
      sortTable();
    });
    title.replaceChildren(button);
  });
  const showTable = () => {
    const trait = data.traits[state.t];
    table.caption.textContent = `${trait.name} at layer ${data.layers[state.l]}, residual out; of the response. Click a heading to sort.`;
    rows.forEach((row, p) => {
      data.figures.forEach((name, f) => {
        row.cells[f + 2].textContent = figureText(name, figure(name, p));
      });
    });
    sortTable();
  };

  // --- choosing -----------------------------------------------------------------------------------------------------

  const show = (changed) => {
    const any = (...names) => names.some((name) => changed.has(name));
    if (any("p")) showText();
    if (any("p", "look")) items.forEach((item, p) => item.button.setAttribute("aria-current", p === state.p));
    if (any("t", "l", "look")) showList();
    if (any("p", "t", "l", "at", "look")) {
      paintText();
      showDynamics();
      describePlots();
    }
    if (any("t", "l", "at", "look")) showLegend();
    if (any("t", "l")) showTable();
    if (any("p", "i")) markToken();
    if (any("p", "look")) measure();
    if (any("p", "t", "at", "look")) makeImage();
    drawMap();
    drawLine();
    showStatus();
    byId("layer").value = state.l;
    byId("layer").setAttribute("aria-valuetext", "layer " + data.layers[state.l]);
    byId("layer-value").textContent = data.layers[state.l];
    byId("trait").value = state.t;
    byId("point").value = state.at;
  };

  const inside = (value, count) => Math.min(Math.max(value, 0), count - 1);
  const go = (change) => {
    const before = { ...state };
    Object.assign(state, change);
    state.p = inside(state.p, data.prompts.length);
    state.t = inside(state.t, data.traits.length);
    state.l = inside(state.l, nLayers);
    state.at = inside(state.at, nPoints);
    const prompt = data.prompts[state.p];
    if (state.p !== before.p && change.i === undefined) state.i = prompt.answered ? prompt.prompted : 0;
    state.i = inside(state.i, Math.max(prompt.tokens, 1));
    const changed = new Set(Object.keys(state).filter((name) => state[name] !== before[name]));
    if (!changed.size) return;
    show(changed);
    if (changed.has("i") || changed.has("p")) keepInSight();
    if (changed.has("p")) items[state.p].button.scrollIntoView({ block: "nearest" });
    writeAddress();
  };

  const writeAddress = () => {
    const { id } = data.prompts[state.p];
    const fields = { p: id, t: state.t, l: data.layers[state.l], at: data.points[state.at], i: state.i };
    try {
      history.replaceState(null, "", "#" + new URLSearchParams(fields));
    } catch {
      // a page in a sandbox has no address of its own
    }
  };
  const readAddress = () => {
    const fields = new URLSearchParams(location.hash.slice(1));
    const change = {};
    const take = (name, list, value) => {
      const at = list.indexOf(value);
      if (at >= 0) change[name] = at;
    };
    take("p", data.prompts.map((prompt) => prompt.id), fields.get("p"));
    take("t", data.traits.map((_, t) => String(t)), fields.get("t"));
    take("l", data.layers.map(String), fields.get("l"));
    take("at", data.points, fields.get("at"));
    if (/^\d{1,7}$/.test(fields.get("i") || "")) change.i = Number(fields.get("i"));
    return change;
  };

  // --- keys and pointers --------------------------------------------------------------------------------------------

  const MOVES = {
    ArrowLeft: () => ({ i: state.i - 1 }),
    ArrowRight: () => ({ i: state.i + 1 }),
    ArrowUp: () => ({ l: state.l + 1 }),
    ArrowDown: () => ({ l: state.l - 1 }),
    Home: () => ({ i: 0 }),
    End: () => ({ i: data.prompts[state.p].tokens - 1 }),
  };
  const shownPrompt = (step) => {
    for (let p = state.p + step; p >= 0 && p < items.length; p += step) if (!items[p].made.hidden) return { p };
    return {};
  };
  const KEYS = {
    n: () => shownPrompt(1),
    p: () => shownPrompt(-1),
    t: () => ({ t: (state.t + 1) % data.traits.length }),
    a: () => ({ at: (state.at + 1) % nPoints }),
  };
  const openKeys = () => byId("keys").open || byId("keys").showModal();
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || byId("keys").open) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "range") return;
    if (event.key === "?") openKeys();
    else if (event.key in KEYS) go(KEYS[event.key]());
    else if (event.key in MOVES && (event.target === byId("text") || event.target === byId("map"))) {
      event.preventDefault();
      go(MOVES[event.key]());
      if (event.target === byId("text") && spans[state.i]) spans[state.i].scrollIntoView({ block: "nearest" });
    }
  });

  const tokenUnder = (event) => {
    const token = event.target.closest(".token");
    return token ? Number(token.dataset.i) : null;
  };
  byId("text").addEventListener("pointerover", (event) => {
    const i = tokenUnder(event);
    if (i === null) return;
    showStatus(i);
    drawMap({ token: i, layer: state.l });
  });
  byId("text").addEventListener("pointerleave", () => {
    showStatus();
    drawMap();
  });
  byId("text").addEventListener("click", (event) => {
    const i = tokenUnder(event);
    if (i !== null) go({ i });
  });
  byId("map").addEventListener("pointermove", (event) => {
    const cell = Charts.cellAt(place, event.offsetX, event.offsetY);
    drawMap(cell);
    if (cell) showStatus(cell.token, cell.layer);
    else showStatus();
  });
  byId("map").addEventListener("pointerleave", () => {
    drawMap();
    showStatus();
  });
  byId("map").addEventListener("click", (event) => {
    const cell = Charts.cellAt(place, event.offsetX, event.offsetY);
    if (cell) go({ i: cell.token, l: cell.layer });
  });
  byId("line").addEventListener("click", (event) => {
    const cell = Charts.cellAt({ ...place, layers: 1, row: 1e6 }, event.offsetX, 100);
    if (cell) go({ i: cell.token });
  });

  byId("layer").addEventListener("input", (event) => go({ l: Number(event.target.value) }));
  byId("trait").addEventListener("change", (event) => go({ t: Number(event.target.value) }));
  byId("point").addEventListener("change", (event) => go({ at: Number(event.target.value) }));
  byId("show-keys").addEventListener("click", openKeys);
  if (byId("find")) byId("find").addEventListener("input", find);
  window.addEventListener("hashchange", () => go(readAddress()));

  // --- the start ----------------------------------------------------------------------------------------------------

  byId("prompts").append(...items.map((item) => item.made));
  byId("app").hidden = false;
  byId("layer").disabled = nLayers < 2;
  byId("status").hidden = false;
  const redraw = () => {
    readStyle();
    show(new Set(["look"]));
  };
  isDark.addEventListener("change", redraw);
  isPrinted.addEventListener("change", redraw);
  let width = 0;
  new ResizeObserver(() => {
    if (byId("plots").clientWidth === width) return;
    width = byId("plots").clientWidth;
    redraw();
  }).observe(byId("plots"));

  readStyle();
  const first = data.prompts[0];
  const change = readAddress();
  Object.assign(state, { i: first.answered ? first.prompted : 0 });
  if (change.t !== undefined && change.l === undefined) change.l = data.traits[change.t].layer;
  const initial = { ...state, ...change };
  if (change.p !== undefined && change.i === undefined) initial.i = data.prompts[change.p].answered ? data.prompts[change.p].prompted : 0;
  initial.i = inside(initial.i, Math.max(data.prompts[initial.p].tokens, 1));
  Object.assign(state, initial);
  show(new Set(["p", "t", "l", "at", "i", "look"]));
  keepInSight();
  items[state.p].button.scrollIntoView({ block: "nearest" });
})();
