"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const LINES = 6;

  const said = (number) =>
    number === null || number === undefined ? "?" : String(Number(number.toPrecision(3)));

  const made = (parent, tag, attributes, text) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  };

  // ---- tables that are sorted by a click on a header

  const keyOf = (row, column, numeric) => {
    const cell = row.cells[column];
    return numeric ? parseFloat(cell.dataset.value) : cell.textContent;
  };

  const compared = (a, b, numeric, sign) => {
    if (!numeric) return sign * a.localeCompare(b, undefined, { numeric: true });
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b); // what is no number comes last
    return a === b ? 0 : sign * (a < b ? -1 : 1);
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      header.querySelector("button").addEventListener("click", () => {
        const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        headers.forEach((each) => each.removeAttribute("aria-sort"));
        header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        const numeric = !header.classList.contains("text");
        const keyed = [...table.tBodies[0].rows].map((row) => [keyOf(row, column, numeric), row]);
        keyed.sort(([a], [b]) => compared(a, b, numeric, sign));
        table.tBodies[0].append(...keyed.map(([, row]) => row));
      });
    });
  }

  // ---- curves, drawn anew for the width that there is

  const tickStep = (span, most) => {
    const raw = span / most, size = 10 ** Math.floor(Math.log10(raw));
    return size * ([1, 2, 5].find((each) => each * size >= raw) || 10);
  };

  const linear = (low, high, most) => {
    const step = tickStep(high - low || 1, most), ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
    return ticks;
  };

  const decades = (low, high, most) => {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    const every = Math.max(1, Math.ceil((last - first) / most)), ticks = [];
    for (let i = first; i <= last; i += every) ticks.push(10 ** i);
    return ticks;
  };

  // where the axis is logarithmic, zero has a place of its own below all else
  const vertical = (chart, top, bottom) => {
    const all = chart.lines.flatMap((line) => line.y).filter((y) => y !== null);
    if (chart.logarithmic && all.some((y) => y > 0)) {
      const positive = all.filter((y) => y > 0), zero = all.some((y) => y <= 0);
      const ticks = decades(Math.min(...positive), Math.max(...positive), 6);
      if (ticks.length === 1) ticks.push(ticks[0] * 10);
      const high = Math.max(Math.max(...positive), ticks[ticks.length - 1]), floor = bottom - (zero ? 22 : 0);
      const place = (y) =>
        y > 0 ? floor - ((floor - top) * Math.log(y / ticks[0])) / Math.log(high / ticks[0]) : bottom;
      return { ticks: zero ? [0, ...ticks] : ticks, place, broken: zero };
    }
    const low = Math.min(0, ...all), least = Math.max(...all, chart.least || 0), high = least > low ? least : low + 1;
    const ticks = linear(low, high, 5);
    const ceiling = Math.max(high, ticks[ticks.length - 1]);
    return { ticks, place: (y) => bottom - ((bottom - top) * (y - low)) / (ceiling - low), broken: false };
  };

  const draw = (figure) => {
    const chart = data.charts[figure.dataset.chart];
    const old = figure.querySelector("svg");
    const width = Math.max(220, figure.clientWidth), height = Math.max(200, Math.min(320, width * 0.55));
    const left = 58, right = width - 20, top = 12, bottom = height - 40;
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `${chart.vertical} against ${chart.horizontal}`);
    const first = chart.x[0], last = chart.x[chart.x.length - 1];
    const across = (x) => (last > first ? left + ((right - left) * (x - first)) / (last - first) : (left + right) / 2);
    const { ticks, place, broken } = vertical(chart, top, bottom);
    for (const tick of ticks) {
      made(svg, "line", { class: "grid", x1: left, x2: right, y1: place(tick), y2: place(tick) });
      const shown = chart.logarithmic && tick > 0 ? tick.toExponential(0).replace("+", "") : said(tick);
      made(svg, "text", { x: left - 6, y: place(tick) + 4, "text-anchor": "end" }, shown);
    }
    for (const tick of linear(first, last, Math.max(2, width / 110)).filter((each) => Number.isInteger(each))) {
      made(svg, "text", { x: across(tick), y: bottom + 17, "text-anchor": "middle" }, said(tick));
    }
    made(svg, "text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, chart.horizontal);
    made(svg, "line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom });
    if (broken) { // two strokes where the axis leaves out what lies between zero and the least number
      for (const y of [bottom - 13, bottom - 9]) {
        made(svg, "line", { class: "axis", x1: left - 5, x2: left + 5, y1: y + 3, y2: y - 3 });
      }
    }
    chart.lines.forEach((line, i) => {
      let path = "", pen = "M";
      line.y.forEach((y, k) => {
        if (y === null) { pen = "M"; return; }
        path += `${pen}${across(chart.x[k]).toFixed(1)},${place(y).toFixed(1)}`;
        pen = "L";
      });
      const style = `stroke: var(--line-${i % LINES})` + (i >= LINES ? "; stroke-dasharray: 6 3" : "");
      made(svg, "path", { d: path, style });
      if (chart.x.length <= 30) {
        line.y.forEach((y, k) => {
          if (y !== null) {
            made(svg, "circle", { cx: across(chart.x[k]), cy: place(y), r: 3, style: `fill: var(--line-${i % LINES})` });
          }
        });
      }
    });
    if (chart.follows) {
      const x = across(chart.x[current]);
      made(svg, "line", { class: "mark", x1: x, x2: x, y1: top, y2: bottom });
      chart.lines.forEach((line, i) => {
        const y = line.y[current];
        if (y !== null) made(svg, "circle", { cx: x, cy: place(y), r: 5, style: `fill: var(--line-${i % LINES})` });
      });
    }
    if (old) old.replaceWith(svg);
    else figure.append(svg);
  };

  // ---- the slider: nodes, numbers and the mark follow it

  const run = data.run, slider = document.getElementById("step"), play = document.getElementById("play");
  let current = run ? run.steps.length - 1 : 0;

  const colour = (energy) => {
    const [low, high] = run.range, stops = run.colours;
    const share = high > low ? Math.log(energy / low) / Math.log(high / low) : 1;
    const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(at), stops.length - 2);
    return stops[i].map((part, k) => Math.round(part + (stops[i + 1][k] - part) * (at - i)));
  };

  const paint = (box, energy) => {
    const rect = box.querySelector("rect"), kind = box.dataset.kind;
    box.querySelector(".number").textContent = said(energy);
    rect.style.fill = "";
    let shade = "";
    if (energy === 0) shade = "none";
    else if (energy !== null && energy < 0) shade = "below";
    else if (energy !== null) {
      const [red, green, blue] = colour(energy);
      rect.style.fill = `rgb(${red}, ${green}, ${blue})`;
      shade = 0.299 * red + 0.587 * green + 0.114 * blue > 128 ? "light" : "dark";
    }
    box.setAttribute("class", `box ${kind} ${shade}`);
  };

  const boxes = [...document.querySelectorAll(".box[data-column]")];

  const show = (step) => {
    current = step;
    for (const box of boxes) paint(box, run.columns[box.dataset.column][step]);
    if (slider) {
      const total = said(run.total[step]);
      slider.value = step;
      slider.setAttribute("aria-valuetext", `step ${run.steps[step]} of ${run.last}, energy ${total}`);
      document.getElementById("where").textContent = `step ${run.steps[step]} of ${run.last}`;
      document.getElementById("total").textContent = total;
      document.getElementById("errors").textContent = said(run.errors[step]);
      document.getElementById("loss").textContent = said(run.loss[step]);
    }
    for (const figure of document.querySelectorAll("figure[data-chart]")) {
      if (data.charts[figure.dataset.chart].follows) draw(figure);
    }
  };

  if (play) {
    let clock = 0;
    const stop = () => {
      clearInterval(clock);
      clock = 0;
      play.textContent = "Play";
    };
    play.addEventListener("click", () => {
      if (clock) return stop();
      if (current === run.steps.length - 1) show(0);
      play.textContent = "Pause";
      clock = setInterval(() => {
        if (current < run.steps.length - 1) show(current + 1);
        if (current === run.steps.length - 1) stop();
      }, Math.max(40, Math.min(600, 6000 / run.steps.length)));
    });
    slider.addEventListener("input", () => {
      stop();
      show(Number(slider.value));
    });
  }

  // ---- the size of the graph

  const graph = document.querySelector(".graph svg");
  if (graph) {
    const frame = graph.parentElement;
    const [, , width, height] = graph.getAttribute("viewBox").split(" ").map(Number);
    let scale = 1;
    const zoom = (to) => {
      scale = Math.min(3, Math.max(0.005, to));
      graph.setAttribute("width", width * scale);
      graph.setAttribute("height", height * scale);
    };
    const whole = () => zoom(Math.min(1, frame.clientWidth / width, (window.innerHeight * 0.7 - 4) / height));
    document.getElementById("larger").addEventListener("click", () => zoom(scale * 1.4));
    document.getElementById("smaller").addEventListener("click", () => zoom(scale / 1.4));
    document.getElementById("whole").addEventListener("click", whole);
    zoom(Math.min(1, Math.max(0.75, frame.clientWidth / width)));
    const first = graph.querySelector(".box.node rect, .box.output rect");
    const middle = Number(first.getAttribute("x")) + Number(first.getAttribute("width")) / 2;
    frame.scrollLeft = middle * scale - frame.clientWidth / 2;
  }

  if (run) show(current);
  const drawAll = () => document.querySelectorAll("figure[data-chart]").forEach(draw);
  drawAll();
  window.addEventListener("resize", drawAll);
})();
