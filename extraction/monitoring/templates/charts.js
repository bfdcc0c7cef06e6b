"use strict";
// Drawing only: colours, the heat map, the line, the bars of the list. The page's state is in captures.js.
const Charts = (() => {
  const LEFT = 46;
  const RIGHT = 10;
  const TOP = 20;
  const STEPS = 255;
  const LEAST_CELL = 2; // CSS pixels of a token; below that the plots scroll
  const MOST_PIXELS = 16000; // of a canvas, in device pixels

  const parsed = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };

  // interpolate 255 colours between anchors, each with the text colour of the higher contrast
  const palette = (anchors) => {
    const ends = anchors.map(parsed);
    return Array.from({ length: STEPS }, (_, index) => {
      const at = (index / (STEPS - 1)) * (ends.length - 1);
      const low = Math.min(Math.floor(at), ends.length - 2);
      const rgb = ends[low].map((c, i) => Math.round(c + (ends[low + 1][i] - c) * (at - low)));
      const light = luminance(rgb);
      return { rgb, css: `rgb(${rgb.join(", ")})`, ink: 1.05 / (light + 0.05) >= (light + 0.05) / 0.05 ? "#ffffff" : "#000000" };
    });
  };

  // index of a value's colour
  const place = (value, centre, half) => 127 + Math.round(127 * Math.max(-1, Math.min(1, (value - centre) / half)));

  const sized = (canvas, width, height) => {
    const scale = Math.min(window.devicePixelRatio || 1, MOST_PIXELS / width);
    const pixels = [Math.round(width * scale), Math.round(height * scale)];
    if (canvas.width !== pixels[0] || canvas.height !== pixels[1]) [canvas.width, canvas.height] = pixels;
    canvas.style.width = width + "px";
    canvas.style.height = height + "px";
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    context.imageSmoothingEnabled = false;
    return context;
  };

  // geometry: the map and the line have the same left edge and cell width
  const layout = (room, tokens, layers) => {
    const cell = Math.max((room - LEFT - RIGHT) / Math.max(tokens, 1), LEAST_CELL);
    const width = Math.max(room, LEFT + RIGHT + cell * tokens);
    const row = Math.max(6, Math.min(22, Math.round(240 / layers)));
    return { cell: Math.min(cell, 40), width, row, tokens, layers, height: TOP + row * layers + 6 };
  };
  const columnX = (place, token) => LEFT + place.cell * token;
  const rowY = (place, layer) => TOP + place.row * (place.layers - 1 - layer);
  const cellAt = (place, x, y) => {
    const token = Math.floor((x - LEFT) / place.cell);
    const layer = place.layers - 1 - Math.floor((y - TOP) / place.row);
    return token >= 0 && token < place.tokens && layer >= 0 && layer < place.layers ? { token, layer } : null;
  };

  // one pixel per cell, scaled up when drawn
  const bitmap = (tokens, layers, colourOf) => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [Math.max(tokens, 1), layers];
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, layers);
    for (let layer = 0; layer < layers; layer++) {
      for (let token = 0; token < tokens; token++) {
        const rgb = colourOf(token, layer);
        if (rgb) image.data.set([...rgb, 255], 4 * ((layers - 1 - layer) * canvas.width + token));
      }
    }
    context.putImageData(image, 0, 0);
    return canvas;
  };

  // outline a cell
  const framed = (context, look, x, y, width, height) => {
    for (const [colour, line, out] of [[look.page, 1, 2.5], [look.text, 2, 1]]) {
      context.strokeStyle = colour;
      context.lineWidth = line;
      context.strokeRect(x - out, y - out, width + 2 * out, height + 2 * out);
    }
  };

  const dashed = (context, colour, dash, from, to, width = 1.5) => {
    context.save();
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.setLineDash(dash);
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    context.stroke();
    context.restore();
  };

  // text with an outline, legible on any colour
  const label = (context, look, text, x, y, { align = "left", colour = look.text } = {}) => {
    context.font = look.font;
    context.textAlign = align;
    context.textBaseline = "middle";
    context.lineJoin = "round";
    context.lineWidth = 4;
    context.strokeStyle = look.page;
    context.strokeText(text, x, y);
    context.fillStyle = colour;
    context.fillText(text, x, y);
  };

  // steps of 1, 2 or 5 times a power of ten
  const stepOf = (span, count) => {
    const raw = span / Math.max(count, 1);
    const power = 10 ** Math.floor(Math.log10(raw));
    return [1, 2, 5, 10].map((n) => n * power).find((step) => step >= raw) || 10 * power;
  };

  const sides = (context, look, place, prompted, y) => {
    const x = columnX(place, prompted);
    context.font = look.font;
    if (x - LEFT > context.measureText("prompt").width + 8) label(context, look, "prompt", LEFT, y, { colour: look.soft });
    if (prompted >= place.tokens) return;
    const room = place.width - RIGHT - x > context.measureText("response").width + 8;
    label(context, look, "response", room ? x + 5 : x - 5, y, { align: room ? "left" : "right", colour: look.soft });
  };

  // map: {place, image, layerNames, prompted, token, layer, over}
  const heat = (canvas, map, look) => {
    const { place } = map;
    const context = sized(canvas, place.width, place.height);
    const [width, height] = [place.cell * place.tokens, place.row * place.layers];
    if (place.tokens) context.drawImage(map.image, LEFT, TOP, width, height);
    sides(context, look, place, map.prompted, TOP / 2);
    const every = stepOf(place.layers, Math.max(1, Math.floor(height / 16)));
    for (let layer = 0; layer < place.layers; layer++) {
      const isChosen = layer === map.layer;
      const isNear = Math.abs(layer - map.layer) * place.row < 13;
      if (!isChosen && (isNear || layer % Math.max(1, Math.round(every)))) continue;
      const y = rowY(place, layer) + place.row / 2;
      label(context, look, (isChosen ? "\u25b8 " : "") + map.layerNames[layer], LEFT - 7, y, {
        align: "right", colour: isChosen ? look.text : look.soft,
      });
    }
    const start = columnX(place, map.prompted);
    dashed(context, look.page, [], [start, TOP - 8], [start, TOP + height], 3);
    dashed(context, look.text, [], [start, TOP - 8], [start, TOP + height], 1);
    framed(context, look, LEFT, rowY(place, map.layer), width, place.row);
    framed(context, look, columnX(place, map.token), TOP, place.cell, height);
    if (map.over) framed(context, look, columnX(place, map.over.token), rowY(place, map.over.layer), place.cell, place.row);
  };

  // range of the vertical axis: the response's values, the prompt's values that are not far outside, and the levels
  const rangeOf = (values, prompted, levels, centre, half) => {
    const isNear = (value) => Math.abs(value - centre) <= 3 * half;
    const seen = [...values].filter((value, i) => Number.isFinite(value) && (i >= prompted ? Math.abs(value - centre) <= 6 * half : isNear(value)));
    const all = [...seen, ...levels, centre - half / 2, centre + half / 2];
    const [low, high] = [Math.min(...all), Math.max(...all)];
    const margin = (high - low || 1) * 0.08;
    return [low - margin, high + margin];
  };

  // line: {place, values, prompted, token, levels: [[value, name, colour]], centre, half, commitment, number}
  const HEIGHT = 190;
  const BOTTOM = 22;
  const line = (canvas, it, look) => {
    const { place, values } = it;
    const context = sized(canvas, place.width, HEIGHT);
    const [low, high] = rangeOf(values, it.prompted, it.levels.map(([value]) => value), it.centre, it.half);
    const [top, bottom] = [10, HEIGHT - BOTTOM];
    const y = (value) => bottom - ((value - low) / (high - low)) * (bottom - top);
    const x = (token) => columnX(place, token) + place.cell / 2;
    const end = LEFT + place.cell * place.tokens;
    axes(context, look, { place, low, high, y, bottom, end });
    context.fillStyle = look.raised;
    context.globalAlpha = 0.7;
    context.fillRect(LEFT, top, place.cell * it.prompted, bottom - top);
    context.globalAlpha = 1;
    dashed(context, look.text, [], [columnX(place, it.prompted), top], [columnX(place, it.prompted), bottom], 1);
    for (const [value, , colour] of it.levels) dashed(context, colour, [6, 4], [LEFT, y(value)], [end, y(value)]);
    curve(context, look, values, x, y, top, bottom);
    committed(context, look, it, x, y, top, bottom);
    named(context, look, it.levels, y, end, top, bottom);
    if (it.token < place.tokens) {
      dashed(context, look.soft, [2, 3], [x(it.token), top], [x(it.token), bottom], 1);
      dot(context, look, x(it.token), Math.max(top, Math.min(bottom, y(values[it.token]))), 4.5, look.text);
    }
  };

  const axes = (context, look, { place, low, high, y, bottom, end }) => {
    const step = stepOf(high - low, 4);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) {
      dashed(context, look.line, [], [LEFT, y(tick)], [end, y(tick)], 1);
      const text = Math.abs(tick) >= 1e5 ? tick.toExponential(0) : tick.toFixed(Math.min(digits, 6));
      label(context, look, text.replace("-", "\u2212"), LEFT - 7, y(tick), { align: "right", colour: look.soft });
    }
    const every = Math.max(1, Math.round(stepOf(place.tokens, Math.max(1, (place.cell * place.tokens) / 60))));
    for (let token = 0; token < place.tokens; token += every) {
      const middle = columnX(place, token) + place.cell / 2;
      label(context, look, String(token), middle, bottom + BOTTOM / 2 + 1, { align: "center", colour: look.soft });
    }
  };

  const curve = (context, look, values, x, y, top, bottom) => {
    const inside = (value) => Math.max(top, Math.min(bottom, y(value)));
    context.save();
    context.beginPath();
    context.rect(0, top - 1, context.canvas.width, bottom - top + 2);
    context.clip();
    context.strokeStyle = look.text;
    context.lineWidth = 1.75;
    context.lineJoin = "round";
    context.beginPath();
    let isDown = false;
    values.forEach((value, token) => {
      if (!Number.isFinite(value)) isDown = false;
      else if (isDown) context.lineTo(x(token), y(value));
      else {
        context.moveTo(x(token), y(value));
        isDown = true;
      }
    });
    context.stroke();
    context.restore();
    values.forEach((value, token) => {
      if (!Number.isFinite(value) || inside(value) === y(value)) return;
      const [tip, base] = y(value) < top ? [top - 7, top + 1] : [bottom + 7, bottom - 1];
      context.fillStyle = look.text;
      context.beginPath();
      context.moveTo(x(token), tip);
      context.lineTo(x(token) - 4.5, base);
      context.lineTo(x(token) + 4.5, base);
      context.fill();
    });
  };

  const dot = (context, look, x, y, size, colour) => {
    if (!Number.isFinite(y)) return;
    context.beginPath();
    context.arc(x, y, size, 0, 2 * Math.PI);
    context.fillStyle = colour;
    context.strokeStyle = look.page;
    context.lineWidth = 2;
    context.stroke();
    context.fill();
  };

  const committed = (context, look, it, x, y, top, bottom) => {
    if (it.commitment === null) return;
    const at = x(it.commitment.token);
    const colour = it.commitment.colour;
    dashed(context, colour, [], [at, top], [at, bottom], 2);
    context.font = look.font;
    const isRight = at + context.measureText("commits").width + 12 < it.place.width;
    const where = isRight ? at + 6 : at - 6;
    label(context, look, "commits", where, bottom - 9, { align: isRight ? "left" : "right", colour });
  };

  // names of the levels at the right end, without overlap
  const named = (context, look, levels, y, end, top, bottom) => {
    const sorted = [...levels].sort((a, b) => b[0] - a[0]);
    let least = top + 7;
    for (const [value, name, colour] of sorted) {
      const above = Math.max(y(value) - 9, least);
      label(context, look, name, end - 3, Math.min(above, bottom - 7), { align: "right", colour });
      least = above + 15;
    }
  };

  // codes: indices of colours, 255 for none
  const bar = (canvas, codes, colours) => {
    [canvas.width, canvas.height] = [codes.length, 1];
    const context = canvas.getContext("2d");
    const image = context.createImageData(codes.length, 1);
    codes.forEach((code, i) => code < STEPS && image.data.set([...colours[code].rgb, 255], 4 * i));
    context.putImageData(image, 0, 0);
  };

  return { palette, place, layout, cellAt, columnX, bitmap, heat, line, bar };
})();
