// The charts, drawn with Observable Plot: quality and cost, learning curves, heat maps. The data are page.js's.

// Put a chart where it belongs. Arrow keys move the pointer over `points`: lists of { x, y, text } in the chart's pixels.
function place(chart, label, points) {
  chart.setAttribute("tabindex", 0);
  chart.setAttribute("role", "img");
  chart.setAttribute("aria-label", `${label} Arrow keys move through its points.`);
  let line = 0,
    at = -1;
  chart.addEventListener("keydown", (event) => {
    const [down, right] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key] ?? [];
    if (right === undefined || !points.length) return;
    event.preventDefault();
    line = Math.min(Math.max(line + down, 0), points.length - 1);
    at = Math.min(Math.max(at + right, 0), points[line].length - 1);
    const { x, y, text } = points[line][at];
    const box = chart.getBoundingClientRect(),
      zoom = box.width / chart.width.baseVal.value;
    const where = { clientX: box.left + x * zoom, clientY: box.top + y * zoom, pointerType: "mouse", bubbles: true };
    chart.dispatchEvent(new PointerEvent("pointermove", where));
    byId("said").textContent = text;
  });
  chart.addEventListener("blur", () => chart.dispatchEvent(new PointerEvent("pointerleave")));
  return chart;
}

function pixels(chart, x, y) {
  const [sx, sy] = [chart.scale("x"), chart.scale("y")];
  return { x: sx.apply(x) + (sx.bandwidth ?? 0) / 2, y: sy.apply(y) + (sy.bandwidth ?? 0) / 2 };
}

function legend(list, shown) {
  list.replaceChildren(
    ...shown.map(({ name, colour, dash }) => {
      const swatch = d3.create("svg").attr("aria-hidden", true);
      swatch
        .append("line")
        .attr("x2", 26)
        .attr("y1", 5)
        .attr("y2", 5)
        .attr("stroke", colour)
        .attr("stroke-width", 3)
        .attr("stroke-dasharray", dash);
      return element("li", [swatch.node(), name]);
    }),
  );
}

const style = { background: "transparent", color: "var(--soft)", fontSize: "12px", fontFamily: "inherit" };
const tip = (points, maxRadius = 40) =>
  Plot.tip(points, Plot.pointer({ x: "x", y: "y", title: "text", maxRadius, fill: "var(--panel)", stroke: "var(--soft)" }));

function frontOf(points, better) {
  const sign = better === "up" ? -1 : 1;
  const front = [];
  for (const point of [...points].sort((a, b) => a.x - b.x || sign * (a.y - b.y))) {
    const last = front.at(-1);
    if (!last || sign * point.y < sign * last.y || (point.x === last.x && point.y === last.y)) front.push(point);
  }
  return front;
}

function drawFronts() {
  const result = data.results[byId("quality").selectedIndex];
  const fronts = data.costs.map((cost) => result && drawFront(byId("fronts"), result, cost)).filter(Boolean);
  const figures = fronts.map(({ figure }) => figure);
  // Of many rows the colours repeat: those on a front are named, the others show their names under the pointer.
  const named = visible().length > 10 ? new Set(fronts.flatMap(({ front }) => front.map((p) => p.row))) : visible();
  legend(byId("fronts-legend"), [...named]);
  byId("fronts").replaceChildren(...(figures.length ? figures : [missing("Missing: no row has both a result and a cost.")]));
}

function drawFront(parent, result, cost) {
  const points = visible()
    .filter((row) => row.values[result.key] && row.values[cost.key])
    .map((row) => {
      const [y, deviation, quality] = row.values[result.key];
      const [x, , price] = row.values[cost.key];
      return {
        row,
        x,
        y,
        low: y - deviation,
        high: y + deviation,
        text: `${row.name}\n${result.title}: ${quality}\n${cost.title}: ${price}`,
      };
    });
  if (!points.length) return null;
  const front = frontOf(points, result.better);
  const [least, most] = d3.extent(points, (p) => p.x);
  const steps = [...front, { x: most, y: front.at(-1).y }];
  const log = least > 0 && most / least > 6;
  const width = Math.max(parent.clientWidth / Math.max(Math.floor(parent.clientWidth / 340), 1) - 24, 240);
  const right = (p) => p.x > (log ? Math.sqrt(least * most) : (least + most) / 2);
  const names = {
    x: "x",
    y: "y",
    text: (p) => p.row.name,
    dy: result.better === "up" ? -13 : 13,
    fill: "var(--ink)",
    stroke: "var(--panel)",
    strokeWidth: 4,
    lineWidth: 13,
    textOverflow: "ellipsis",
  };
  const chart = Plot.plot({
    width: Math.min(width, 460),
    height: 260,
    marginLeft: 54,
    marginTop: 26,
    marginBottom: 38,
    style,
    insetLeft: 16,
    insetRight: 16,
    insetTop: 12,
    insetBottom: 12,
    x: {
      label: `${cost.title} →`,
      labelAnchor: "right",
      labelArrow: "none",
      type: log ? "log" : "linear",
      ticks: 4,
      tickFormat: most >= 1e4 ? "~s" : undefined,
      nice: false,
    },
    y: {
      label: `${result.better === "up" ? "↑" : "↓"} ${result.title} (${result.better === "up" ? "higher" : "lower"} is better)`,
      labelArrow: "none",
      grid: true,
      ticks: 5,
    },
    marks: [
      Plot.line(steps, { x: "x", y: "y", curve: "step-after", stroke: "var(--soft)", strokeDasharray: "4 3" }),
      Plot.ruleX(
        points.filter((p) => p.high > p.low),
        { x: "x", y1: "low", y2: "high", stroke: (p) => p.row.colour, strokeOpacity: 0.6 },
      ),
      Plot.dot(front, { x: "x", y: "y", r: 8, stroke: (p) => p.row.colour, strokeWidth: 1.5 }),
      Plot.dot(points, { x: "x", y: "y", r: 4.5, fill: (p) => p.row.colour }),
      Plot.text(front.filter(right), { ...names, textAnchor: "end", dx: -6, dy: -names.dy }),
      Plot.text(
        front.filter((p) => !right(p)),
        { ...names, textAnchor: "start", dx: 6 },
      ),
      tip(points),
    ],
  });
  const keyed = d3.sort(points, (p) => p.x).map((p) => ({ ...pixels(chart, p.x, p.y), text: p.text }));
  place(chart, `${result.title} against ${cost.title}.`, [keyed]);
  const caption = element("figcaption", [element("b", "On the front: "), front.map((p) => p.row.name).join("; ")]);
  return { front, figure: element("figure", [chart, caption]) };
}

function drawCurves() {
  const metric = byId("metric").value;
  const curves = data.curves[metric] ?? {};
  const log = byId("log").checked;
  const smooth = (values) => (byId("smooth").checked ? d3.blur([...values], Math.max(values.length / 40, 1)) : values);
  const series = drawn()
    .filter((row) => curves[row.id])
    .map((row) => {
      const [steps, means, lows = means, highs = means] = d3.transpose(curves[row.id]);
      const [y, low, high] = [smooth(means), smooth(lows), smooth(highs)];
      const points = Array.from(steps, (x, i) => ({
        x,
        y: y[i],
        low: low[i],
        high: high[i],
        text:
          `${row.name}\nstep ${d3.format(",")(x)}\n${metric}: ${written(y[i])}` +
          (high[i] > low[i] ? ` (${written(low[i])} to ${written(high[i])})` : ""),
      })).filter((p) => !log || p.low > 0);
      return { row, points };
    })
    .filter(({ points }) => points.length);
  const parent = byId("curves");
  legend(
    byId("curves-legend"),
    series.map(({ row }) => row),
  );
  if (!series.length) return parent.replaceChildren(missing("Missing: no row that is drawn has such a curve."));
  const all = series.flatMap(({ points }) => points);
  const chart = Plot.plot({
    width: Math.max(parent.clientWidth, 280),
    height: Math.min(Math.max(parent.clientWidth * 0.42, 280), 460),
    marginLeft: 58,
    marginRight: 12,
    marginTop: 26,
    marginBottom: 38,
    style,
    x: { label: "step →", labelArrow: "none", ticks: Math.min(parent.clientWidth / 90, 10) },
    y: {
      label: metric,
      labelArrow: "none",
      type: log ? "log" : "linear",
      grid: true,
      nice: true,
      ticks: 6,
      tickFormat: d3.max(all, (p) => Math.abs(p.y)) >= 1e4 ? "~s" : undefined,
    },
    marks: [
      ...series.map(({ row, points }) =>
        Plot.areaY(points, { x: "x", y1: "low", y2: "high", fill: row.colour, fillOpacity: 0.14 }),
      ),
      ...series.map(({ row, points }) =>
        Plot.lineY(points, { x: "x", y: "y", stroke: row.colour, strokeWidth: 1.8, strokeDasharray: row.dash }),
      ),
      ...series
        .filter(({ points }) => points.length < 25)
        .map(({ row, points }) => Plot.dot(points, { x: "x", y: "y", r: 2.8, fill: row.colour })),
      Plot.dot(all, Plot.pointer({ x: "x", y: "y", r: 5, fill: "var(--ink)", maxRadius: Infinity })),
      tip(all, Infinity),
    ],
  });
  const keyed = series.map(({ points }) => points.map((p) => ({ ...pixels(chart, p.x, p.y), text: p.text })));
  parent.replaceChildren(place(chart, `${metric} over steps, ${series.length} lines.`, keyed));
}

function heat(share) {
  const [from, to] = share < 0.5 ? ["--none", "--half"] : ["--half", "--most"];
  return `color-mix(in oklab, var(${to}) ${((share < 0.5 ? share : share - 0.5) * 200).toFixed(1)}%, var(${from}))`;
}

function drawChanges() {
  const parent = byId("changes");
  const shown = drawn().filter((row) => row.changes);
  const most = d3.max(shown, (row) => d3.max(row.changes.cells.flat()));
  const own = byId("own").checked;
  byId("scale").hidden = !shown.length;
  byId("scale").querySelector("output").value = own ? "the greatest of each" : written(most ?? 0);
  if (!shown.length) return parent.replaceChildren(missing("Missing: no row that is drawn has changes.json."));
  const columns = Math.max(Math.floor(parent.clientWidth / 480), 1);
  const width = (parent.clientWidth - (columns - 1) * 22) / columns;
  parent.replaceChildren(...shown.map((row) => drawHeatMap(row, width, own ? null : most)));
}

// The end of a module's name, of whole parts, that has so many characters.
function fitted(module, most) {
  const parts = module.split(".");
  while (parts.length > 1 && parts.join(".").length > most) parts.shift();
  const end = parts.join(".");
  return end === module ? end : `…${end}`;
}

function drawHeatMap(row, width, top) {
  const { layers, modules, cells } = row.changes;
  const lines = modules.map((module, m) =>
    layers.map((layer, l) => ({ x: layer, y: module, value: cells[m][l] })).filter((c) => c.value !== null),
  );
  const all = lines.flat();
  const peak = d3.greatest(all, (c) => c.value);
  for (const cell of all) {
    cell.colour = heat(Math.min(cell.value / (top ?? peak.value) || 0, 1));
    cell.text = `${row.name}\n${[cell.x && `layer ${cell.x}`, cell.y].filter(Boolean).join(", ")}\n${written(cell.value)}`;
  }
  const margin = Math.min(14 + 6.6 * d3.max(modules, (m) => m.length), width * 0.36);
  const every = Math.ceil((layers.length * (8 + 7 * d3.max(layers, (l) => l.length))) / (width - margin));
  const chart = Plot.plot({
    width,
    height: 48 + modules.length * 20,
    marginLeft: margin,
    marginRight: 4,
    marginTop: 6,
    marginBottom: 36,
    style,
    x: {
      type: "band",
      domain: layers,
      label: "layer",
      labelArrow: "none",
      ticks: layers.filter((_, i) => i % every === 0),
      tickSize: 0,
      padding: 0.06,
    },
    y: {
      type: "band",
      domain: modules,
      label: null,
      tickSize: 0,
      padding: 0.08,
      tickFormat: (module) => fitted(module, margin / 6.8),
    },
    marks: [
      Plot.cell(all, { x: "x", y: "y", fill: "colour", rx: 2 }),
      Plot.cell(all, Plot.pointer({ x: "x", y: "y", fill: "none", stroke: "var(--ink)", strokeWidth: 2, rx: 2 })),
      tip(all),
    ],
  });
  place(
    chart,
    `Relative changes of ${row.name}, modules by layers.`,
    lines.map((line) => line.map((c) => ({ ...pixels(chart, c.x, c.y), text: c.text }))),
  );
  const where = [peak.x && `layer ${peak.x}`, peak.y].filter(Boolean).join(", ");
  const caption = element("figcaption", [
    element("b", row.name),
    `: mean ${written(d3.mean(all, (c) => c.value))}, up to ${written(peak.value)} (${where})`,
  ]);
  return element("figure", [caption, chart]);
}

function draw() {
  drawFronts();
  drawCurves();
  drawChanges();
}
