"use strict";
const content = JSON.parse(document.getElementById("content").textContent);
const ink = { train: "var(--blue)", val: "var(--orange)", chosen: "var(--teal)", rejected: "var(--purple)" };
const ofRun = ["--blue", "--orange", "--teal", "--purple", "--gold", "--red"].map((name) => `var(${name})`);
const runInk = (run) => ofRun[run % ofRun.length];
const runDash = (run) => [null, "7 3", "2 3"][Math.floor(run / ofRun.length) % 3];
const many = content.runs.length > 1;
const short = (value) => (value === null || value === undefined ? "–" : Math.abs(value) >= 1e4 || (value !== 0 &&
  Math.abs(value) < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4)));

function plot(canvas, label, options) {
  const width = Math.max(220, canvas.clientWidth);
  const chart = Plot.plot({ width, height: options.height || Math.round(Math.min(260, 120 + width / 4)),
    marginLeft: 46, marginRight: 16, marginBottom: 34, marginTop: 14, ariaLabel: label,
    style: { fontFamily: "inherit", fontSize: "12px", background: "none", overflow: "visible" }, ...options });
  chart.setAttribute("role", "img");
  for (const part of chart.querySelectorAll("g[aria-label]")) { // what an image is made of has no names of its own
    part.dataset.part = part.getAttribute("aria-label");
    part.removeAttribute("aria-label");
  }
  canvas.replaceChildren(chart);
}

function legend(canvas, keys) {
  const line = canvas.parentElement.querySelector(".legend") || document.createElement("p");
  line.className = "legend";
  line.replaceChildren(...keys.map(([name, color]) => {
    const key = document.createElement("span");
    key.style.setProperty("--c", color);
    key.textContent = name;
    return key;
  }));
  canvas.before(line);
}

function smoothed(values, weight) {
  let mean = 0, known = 0;
  return values.map((value) => {
    mean = weight * mean + (1 - weight) * value;
    known = weight * known + (1 - weight);
    return mean / known;
  });
}

const shownRuns = () => {
  const boxes = [...document.querySelectorAll("input.run")];
  return boxes.length ? boxes.filter((box) => box.checked).map((box) => Number(box.value)) : content.runs.map((_, i) => i);
};

function curve(figure, canvas) {
  const chart = content.charts[Number(figure.dataset.chart)];
  const weight = Number(document.getElementById("smoothing")?.value || 0);
  const logarithmic = document.getElementById("logarithmic").checked;
  const marks = [], raw = [], ends = [], said = [];
  for (const run of shownRuns()) {
    for (const { key, label, role } of chart.series) {
      const found = content.runs[run].curves[key];
      if (!found || !found.values.length) continue;
      const held = role === "val" || found.values.length < 12;
      const smooth = held || weight === 0 ? found.values : smoothed(found.values, weight);
      const stroke = many ? runInk(run) : ink[role];
      const name = many ? `${content.runs[run].name}, ${label}` : label;
      const points = found.steps.map((step, i) => ({ step: logarithmic ? step + 1 : step, value: found.values[i],
        smooth: smooth[i], name }));
      const dash = many ? (role === "val" || role === "rejected" ? "5 3" : runDash(run)) : null;
      if (smooth !== found.values) marks.push(Plot.line(points, { x: "step", y: "value", stroke, strokeOpacity: 0.28, strokeWidth: 1 }));
      marks.push(Plot.line(points, { x: "step", y: "smooth", stroke, strokeWidth: 2.2, strokeDasharray: dash }));
      if (held && points.length < 40) marks.push(Plot.dot(points, { x: "step", y: "smooth", fill: stroke, r: 3 }));
      raw.push(...points);
      ends.push({ ...points[points.length - 1], label, stroke });
      said.push(`${name} from ${short(found.values[0])} to ${short(found.values[found.values.length - 1])}`);
    }
  }
  if (!raw.length) { canvas.textContent = "Nothing logged."; return; }
  legend(canvas, many ? shownRuns().map((run) => [content.runs[run].name, runInk(run)]) : ends.map(({ label, stroke }) => [label, stroke]));
  plot(canvas, `${chart.title}: ${said.join("; ")}`, {
    x: { label: "step", type: logarithmic ? "log" : "linear", ticks: 5, tickFormat: logarithmic ? ".0s" : undefined },
    y: { label: null, grid: true, ticks: 5, nice: true, tickFormat: (value) => short(value) },
    marks: [...marks,
      Plot.tip(raw, Plot.pointer({ x: "step", y: "smooth", title: (point) =>
        `${point.name}\nstep ${Math.round(logarithmic ? point.step - 1 : point.step)}: ${short(point.value)}` }))],
  });
}

function histogram(figure, canvas) {
  const found = content.runs[Number(figure.dataset.run)].histograms[figure.dataset.name];
  const bars = (counts) => counts.map((count, i) => ({ low: found.edges[i], high: found.edges[i + 1], count }));
  const total = found.after.reduce((sum, count) => sum + count, 0);
  const after = bars(found.after), before = found.before ? bars(found.before) : [];
  const spread = found.before && found.before.filter((count) => count).length > 1;
  const marks = [Plot.rectY(after, { x1: "low", x2: "high", y: "count", fill: "var(--blue)", fillOpacity: 0.75, inset: 0.5,
    title: (bar) => `${short(bar.low)} to ${short(bar.high)}\n${bar.count} of ${total} pairs`, tip: true })];
  // Before training all margins are zero if the reference is the initial policy: a bar would hide all else.
  if (spread) {
    const outline = before.flatMap((bar) => [{ x: bar.low, y: bar.count }, { x: bar.high, y: bar.count }]);
    marks.push(Plot.line(outline, { x: "x", y: "y", stroke: "var(--orange)", strokeWidth: 2 }));
  }
  if (found.before) legend(canvas, [...(found.before ? [[spread ? "before" : "before: all in one bin", "var(--orange)"]] : []), ["after", "var(--blue)"]]);
  if (found.before && !spread) {
    const at = found.before.findIndex((count) => count > 0);
    marks.push(Plot.ruleX([(found.edges[at] + found.edges[at + 1]) / 2], { stroke: "var(--orange)", strokeWidth: 2.5 }));
  }
  const outside = [...found.below, ...found.above].reduce((sum, count) => sum + count, 0);
  figure.querySelector(".beyond")?.remove();
  if (outside) {
    const note = document.createElement("p");
    note.className = "beyond soft small";
    note.textContent = `Beyond the outermost bars, and counted in them: ${outside}.`;
    canvas.after(note);
  }
  plot(canvas, `Histogram of ${total} pairs from ${short(found.edges[0])} to ${short(found.edges[found.edges.length - 1])}`, {
    x: { label: null, ticks: 5 }, y: { label: "pairs", grid: true, ticks: Math.min(4, Math.max(...found.after)), labelAnchor: "top" }, marginTop: 26,
    marks: [...marks, ...(found.edges[0] < 0 && found.edges[found.edges.length - 1] > 0 ? [Plot.ruleX([0],
      { stroke: "var(--ink)", strokeDasharray: "3 3" })] : []), Plot.ruleY([0], { stroke: "var(--line)" })],
  });
}

function calibration(figure, canvas) {
  const found = content.runs[Number(figure.dataset.run)].calibration;
  const points = found.confidence.map((x, i) => ({ x, y: found.accuracy[i], low: found.low[i], high: found.high[i], count: found.counts[i] }));
  plot(canvas, `Calibration: ${points.map((p) => `${short(p.x)} sure, ${short(p.y)} right`).join("; ")}`, {
    x: { label: "confidence σ(|margin|)", domain: [0.5, 1.01], ticks: 5, tickFormat: ".0%" },
    y: { label: "share that is right", domain: [0, 1.02], grid: true, ticks: 5, tickFormat: ".0%", labelAnchor: "top" }, marginTop: 26,
    marks: [Plot.line([[0.5, 0.5], [1, 1]], { stroke: "var(--soft)", strokeDasharray: "4 4" }),
      Plot.ruleX(points, { x: "x", y1: "low", y2: "high", stroke: "var(--blue)", strokeWidth: 2 }),
      Plot.dot(points, { x: "x", y: "y", r: (p) => Math.sqrt(p.count), fill: "var(--blue)", stroke: "var(--plot-background)",
        title: (p) => `${Math.round(100 * p.x)} % sure, ${Math.round(100 * p.y)} % right\n${p.count} pairs`, tip: true })],
  });
}

function groups(figure, canvas) {
  const rows = content.runs[Number(figure.dataset.run)].groups.map((group) => ({ ...group, name: group.kind ?
    `${group.kind.replace(", chosen / rejected", " ratio")}: ${group.name}` : group.name, value: group.accuracy[0], low: group.accuracy[1], high: group.accuracy[2] }));
  const narrow = canvas.clientWidth < 560;
  const label = (row) => { const text = `${row.name} (${row.num_pairs})`; return narrow && text.length > 26 ? `${text.slice(0, 25)}…` : text; };
  const names = rows.map((row, i) => i);
  plot(canvas, `Accuracy by group: ${rows.map((row) => `${row.name} ${short(row.value)}`).join("; ")}`, {
    height: 52 + rows.length * 26, marginLeft: narrow ? 165 : 290,
    x: { label: "accuracy", domain: [0, 1], ticks: narrow ? 2 : 5, tickFormat: ".0%", grid: true },
    y: { type: "band", domain: names, label: null, tickFormat: (i) => label(rows[i]), tickSize: 0 },
    marks: [Plot.ruleX([0.5], { stroke: "var(--ink)", strokeDasharray: "3 3" }),
      Plot.ruleY(rows.filter((row) => row.low !== null), { y: (row) => rows.indexOf(row), x1: "low", x2: "high", stroke: "var(--blue)", strokeWidth: 2.2 }),
      Plot.dot(rows, { y: (row, i) => i, x: "longer", symbol: "times", stroke: "var(--orange)", r: 4, strokeWidth: 2 }),
      Plot.dot(rows, { y: (row, i) => i, x: "value", fill: "var(--blue)", r: 5, title: (row) =>
        `${row.name}\n${short(row.value)} of ${row.num_pairs} pairs\nlonger wins: ${short(row.longer)}`, tip: true })],
  });
}

function frontier(figure, canvas) {
  const points = content.frontier.map((point) => ({ ...point, name: content.runs[point.run].name }));
  const best = points.filter((p) => !points.some((q) => q !== p && q.kl <= p.kl && q.accuracy >= p.accuracy &&
    (q.kl < p.kl || q.accuracy > p.accuracy))).sort((a, b) => a.kl - b.kl);
  plot(canvas, points.map((p) => `${p.name}: accuracy ${short(p.accuracy)}, KL ${short(p.kl)}`).join("; "), {
    height: 340, marginTop: 26, inset: 14,
    x: { label: "KL from the reference, nats per token", zero: true }, y: { label: "accuracy", grid: true, labelAnchor: "top" },
    marks: [Plot.line(best, { x: "kl", y: "accuracy", stroke: "var(--soft)", strokeDasharray: "4 4" }),
      Plot.ruleX(points.filter((p) => p.low !== null), { x: "kl", y1: "low", y2: "high", stroke: (p) => runInk(p.run), strokeWidth: 2 }),
      Plot.dot(points, { x: "kl", y: "accuracy", fill: (p) => runInk(p.run), r: 6, title: (p) =>
        `${p.name}\naccuracy ${short(p.accuracy)}\nKL ${short(p.kl)}`, tip: true }),
      Plot.text(points, { x: "kl", y: "accuracy", text: "name", dy: -14, fontWeight: 600 })],
  });
}

const at = new WeakMap(); // the token that a pair's readout tells of
function cumulative(figure, canvas) {
  const view = content.runs[Number(figure.dataset.run)].tokens[Number(figure.dataset.pair)];
  const points = ["chosen", "rejected"].flatMap((side) => {
    let sum = 0;
    return [{ side, i: 0, sum: 0 }, ...view[side].rewards.map((value, i) => ({ side, i: i + 1, sum: sum += value || 0 }))];
  });
  const place = at.get(figure.closest("details"));
  const ends = ["chosen", "rejected"].map((side) => points.filter((point) => point.side === side).pop());
  plot(canvas, `Cumulative reward: chosen ends at ${short(view.chosen.reward)}, rejected at ${short(view.rejected.reward)}`, {
    x: { label: "token", ticks: 6 }, y: { label: "cumulative reward", grid: true, labelAnchor: "top" }, marginTop: 26, marginRight: 74, height: 220,
    marks: [Plot.ruleY([0], { stroke: "var(--soft)" }),
      ...["chosen", "rejected"].map((side) => Plot.line(points.filter((point) => point.side === side), { x: "i", y: "sum",
        stroke: ink[side], strokeWidth: 2.2, strokeDasharray: side === "rejected" ? "6 3" : null })),
      ...(place ? [Plot.ruleX([place.i + 1], { stroke: "var(--ink)" })] : []),
      ...ends.map((end) => Plot.text([end], { x: "i", y: "sum", text: "side", dx: 8, textAnchor: "start", fontWeight: 600,
        fill: ink[end.side] })),
      Plot.tip(points, Plot.pointer({ x: "i", y: "sum", title: (p) => `${p.side}, after ${p.i} tokens\n${short(p.sum)}` }))],
  });
}

const kinds = { curve, histogram, calibration, groups, frontier, cumulative };
function draw(figure) {
  const canvas = figure.querySelector(".canvas");
  if (!canvas.clientWidth) return; // inside a closed part
  kinds[figure.dataset.kind](figure, canvas);
  figure.dataset.drawn = canvas.clientWidth;
}
const figures = [...document.querySelectorAll("figure.chart")];
const drawAll = (kind) => figures.filter((figure) => !kind || figure.dataset.kind === kind).forEach(draw);
const sizes = new ResizeObserver((entries) => entries.forEach(({ target }) => {
  const figure = target.closest("figure");
  if (target.clientWidth && Number(figure.dataset.drawn) !== target.clientWidth) draw(figure);
}));
figures.forEach((figure) => sizes.observe(figure.querySelector(".canvas")));
for (const id of ["smoothing", "logarithmic"]) document.getElementById(id)?.addEventListener("input", () => drawAll("curve"));
document.querySelectorAll("input.run").forEach((box) => box.addEventListener("change", () => drawAll("curve")));
document.querySelectorAll("i.swatch").forEach((swatch) => swatch.style.setProperty("--c", runInk(Number(swatch.dataset.run))));

for (const pair of document.querySelectorAll("details.pair")) {
  const view = content.runs[Number(pair.dataset.run)].tokens[Number(pair.dataset.pair)];
  const readout = pair.querySelector(".readout"), figure = pair.querySelector("figure");
  const tell = (side, i) => {
    const response = view[side];
    if (i < 0 || i >= response.tokens.length) return;
    const before = at.get(pair);
    if (before) before.span.classList.remove("at");
    const span = pair.querySelector(`.tokens[data-side="${side}"] span[data-i="${i}"]`);
    span.classList.add("at");
    at.set(pair, { side, i, span });
    const sum = response.rewards.slice(0, i + 1).reduce((total, value) => total + (value || 0), 0);
    const parts = [[side, ` token ${i + 1}: “${response.tokens[i]}”`]];
    if (response.rewards[i] === null) parts.push(["", "not trained"]);
    else {
      parts.push(["log π ", short(response.policy[i])]);
      if (response.reference[i] !== null) parts.push(["log π ref ", short(response.reference[i])]);
      parts.push(["share of the reward ", short(response.rewards[i])], ["cumulative ", short(sum)]);
    }
    readout.replaceChildren(...parts.flatMap(([name, value], n) => {
      const bold = document.createElement("b");
      bold.textContent = name;
      return [...(n ? [document.createTextNode(" · ")] : []), bold, document.createTextNode(value)];
    }));
    draw(figure);
  };
  for (const tokens of pair.querySelectorAll(".tokens")) {
    const side = tokens.dataset.side;
    tokens.addEventListener("pointerover", (event) => {
      const span = event.target.closest("span[data-i]");
      if (span) tell(side, Number(span.dataset.i));
    });
    tokens.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10 }[event.key];
      const now = at.get(pair), last = view[side].tokens.length - 1;
      const from = now && now.side === side ? now.i : -1;
      const to = event.key === "Home" ? 0 : event.key === "End" ? last : step ? Math.max(0, Math.min(last, from + step)) : null;
      if (to === null) return;
      event.preventDefault();
      tell(side, to);
      at.get(pair).span.scrollIntoView({ block: "nearest" });
    });
  }
}

// Fewer numbers than this are shown as they are, so there is nothing to smooth.
const long = content.runs.some((run) => Object.entries(run.curves || {}).some(([name, one]) => name.startsWith("train/") && one.values.length >= 12));
if (!long) document.getElementById("smooth")?.remove();
document.querySelectorAll("details.pair pre.prompt").forEach((prompt) => { prompt.scrollTop = prompt.scrollHeight; });

const root = document.documentElement, button = document.getElementById("theme");
const setTheme = (theme) => { root.dataset.theme = theme; button.textContent = theme === "dark" ? "Light" : "Dark"; };
const system = matchMedia("(prefers-color-scheme: dark)");
setTheme(system.matches ? "dark" : "light");
system.addEventListener("change", () => setTheme(system.matches ? "dark" : "light"));
button.addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
addEventListener("beforeprint", () => {
  setTheme("light");
  document.querySelectorAll("details.pair").forEach((pair) => { pair.open = true; });
  drawAll();
});
