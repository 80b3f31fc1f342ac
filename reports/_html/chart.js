// The errors along the network: one backend's segments in topological order, on a log scale.

const CHART = { height: 300, left: 48, right: 14, top: 14, bottom: 36, zooms: [1, 2, 4, 8, 16] };

/**
 * The chart of one backend.
 *
 * Left and right, Home, End and the page keys move along the segments and Enter opens one, as
 * does a click. `choose(index)` is called then.
 */
function drawChart(backend, choose) {
  const { segments } = backend;
  const scale = verticalScale(segments);
  const tip = html("div", { class: "tip", hidden: true, "aria-hidden": "true" });
  const canvas = html("div", {
    class: "canvas",
    tabindex: "0",
    role: "slider",
    "aria-label": `Errors along the network on ${clip(backend.id)}: choose a segment`,
    "aria-valuemin": "0",
    "aria-valuemax": String(segments.length - 1),
  });
  const view = html("div", { class: "chart" }, canvas, tip);
  let at = 0;
  let chosen = null;
  let zoom = 0;
  let place = null; // index → x, once drawn

  function draw() {
    const width = Math.max(view.clientWidth, 240) * CHART.zooms[zoom];
    const inner = width - CHART.left - CHART.right;
    const step = inner / Math.max(segments.length, 1);
    place = (index) => CHART.left + step * (index + 0.5);
    canvas.replaceChildren(picture(segments, width, place, scale, backend));
    mark();
  }

  function mark() {
    const lines = canvas.querySelectorAll(".cursor, .chosen");
    for (const line of lines) {
      const index = line.matches(".chosen") ? chosen : at;
      line.setAttribute("transform", `translate(${place(index ?? 0)} 0)`);
      line.toggleAttribute("hidden", index === null);
    }
  }

  function point(index) {
    at = Math.min(Math.max(index, 0), segments.length - 1);
    canvas.setAttribute("aria-valuenow", String(at));
    canvas.setAttribute("aria-valuetext", spoken(segments[at]));
    mark();
  }

  function showTip() {
    const segment = segments[at];
    tip.replaceChildren(
      html("strong", null, clip(segment.id, 30)), " ", operators(segment, 40),
      html("div", { class: "quiet" }, clip(segment.nodes[0] ?? "", 60)),
      html("table", null, ERRORS.map(([key, name]) =>
        html("tr", null, html("th", null, name), html("td", { class: "number" }, error(segment[key]))))),
      html("div", null, cause(segment)));
    tip.hidden = false;
    const left = place(at) - view.scrollLeft;
    const right = left > view.clientWidth / 2;
    tip.style.left = right ? "" : `${view.scrollLeft + left + 12}px`;
    tip.style.right = right ? `${view.clientWidth - view.scrollLeft - left + 12}px` : "";
    canvas.classList.add("pointed");
  }

  function hideTip() {
    tip.hidden = true;
    canvas.classList.remove("pointed");
  }

  /** The segment under the pointer; of several in its reach the one that introduces most. */
  function under(event) {
    const x = event.clientX - canvas.getBoundingClientRect().left;
    const step = place(1) - place(0);
    const middle = (x - place(0)) / step;
    const reach = Math.floor(3 / step);
    let best = Math.min(Math.max(Math.round(middle), 0), segments.length - 1);
    for (let i = best - reach; i <= best + reach; i++) {
      if (segments[i] && (segments[i].introduced ?? Infinity) > (segments[best].introduced ?? Infinity)) {
        best = i;
      }
    }
    return best;
  }

  canvas.addEventListener("pointermove", (event) => { point(under(event)); showTip(); });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("click", (event) => { point(under(event)); choose(at); });
  canvas.addEventListener("focus", () => { if (canvas.matches(":focus-visible")) showTip(); });
  canvas.addEventListener("blur", hideTip);
  canvas.addEventListener("keydown", (event) => {
    const last = segments.length - 1;
    const page = Math.max(Math.round(segments.length / 20), 5);
    const goal = {
      ArrowLeft: at - 1, ArrowRight: at + 1, ArrowDown: at - 1, ArrowUp: at + 1,
      PageDown: at + page, PageUp: at - page, Home: 0, End: last,
    }[event.key];
    if (goal !== undefined) {
      point(goal);
      const x = place(at);
      if (x < view.scrollLeft + 20 || x > view.scrollLeft + view.clientWidth - 20) {
        view.scrollLeft = x - view.clientWidth / 2;
      }
      showTip();
    } else if (event.key === "Enter" || event.key === " ") {
      choose(at);
    } else if (event.key === "Escape" && !tip.hidden) {
      hideTip();
      event.stopPropagation();
    } else return;
    event.preventDefault();
  });

  function zoomBy(steps) {
    zoom = Math.min(Math.max(zoom + steps, 0), CHART.zooms.length - 1);
    draw();
    view.scrollLeft = place(at) - view.clientWidth / 2;
  }

  point(0);
  // In the next frame: a size that changes while sizes are told is an error of the page.
  new ResizeObserver(() => requestAnimationFrame(draw)).observe(view);
  const buttons = html("span", { class: "buttons" },
    html("button", { type: "button", title: "Narrower", "aria-label": "Narrower chart", click: () => zoomBy(-1) }, "−"),
    html("button", { type: "button", title: "Wider", "aria-label": "Wider chart", click: () => zoomBy(1) }, "+"));
  return {
    element: html("div", null, chartLegend(buttons), view),
    select(index) {
      chosen = index;
      if (index !== null) point(index);
      if (place) mark();
    },
  };
}

const ERRORS = [
  ["accumulated", "accumulated"],
  ["inherited", "inherited"],
  ["introduced", "introduced"],
  ["floor", "floor"],
];

const spoken = (segment) =>
  `${clip(segment.id)}, ${operators(segment, 60)}: introduced ${error(segment.introduced)}, ` +
  `inherited ${error(segment.inherited)}, accumulated ${error(segment.accumulated)}, ${cause(segment)}`;

function chartLegend(buttons) {
  const key = (name, ...shapes) => html("span", { class: "key" },
    svg("svg", { width: "26", height: "14", "aria-hidden": "true" }, shapes), name);
  const line = (name) => svg("path", { class: name, d: "M1 7H25" });
  return html("div", { class: "legend" },
    key("accumulated", line("accumulated")),
    key("inherited", line("inherited")),
    key("introduced", svg("path", { class: "introduced", d: "M5 14V5M13 14V8M21 14V3" })),
    key("above its floor", svg("circle", { class: "flag", cx: "13", cy: "7", r: "4" })),
    key("floor", line("floor")),
    buttons);
}

/**
 * Error → height. A decade takes the same room everywhere; zero has a row of its own below them
 * and infinity one above.
 */
function verticalScale(segments) {
  const values = segments.flatMap((s) => ERRORS.map(([key]) => s[key]));
  const positive = values.filter((v) => v > 0).map(Math.log10);
  const infinite = values.includes(null);
  const zero = values.includes(0);
  const extreme = (pick, start) => positive.reduce((a, b) => pick(a, b), start);
  const low = positive.length ? Math.floor(extreme(Math.min, Infinity)) : -8;
  const high = Math.max(positive.length ? Math.ceil(extreme(Math.max, -Infinity)) : 0, low + 1);
  const top = CHART.top + (infinite ? 18 : 0);
  const bottom = CHART.height - CHART.bottom - (zero ? 18 : 0);
  const decade = (bottom - top) / (high - low);
  const place = (value) => {
    if (value === null) return CHART.top;
    if (value <= 0) return CHART.height - CHART.bottom;
    return bottom - (Math.log10(value) - low) * decade;
  };
  const every = Math.ceil((high - low) / 8);
  const ticks = [];
  for (let e = low; e <= high; e += every) ticks.push([bottom - (e - low) * decade, `1e${e}`]);
  if (zero) ticks.push([place(0), "0"]);
  if (infinite) ticks.push([place(null), "∞"]);
  return { place, ticks };
}

function picture(segments, width, place, scale, backend) {
  const base = CHART.height - CHART.bottom;
  const round = (value) => Math.round(value * 10) / 10;
  const line = (key) => segments
    .map((s, i) => `${i ? "L" : "M"}${round(place(i))} ${round(scale.place(s[key]))}`).join("");
  const stems = segments.map((s, i) =>
    (s.introduced === 0 ? "" : `M${round(place(i))} ${base}V${round(scale.place(s.introduced))}`));
  const grid = scale.ticks.map(([y, label]) => [
    svg("path", { class: "grid", d: `M${CHART.left} ${round(y)}H${width - CHART.right}` }),
    svg("text", { class: "tick", x: CHART.left - 8, y: round(y) + 4, "text-anchor": "end" }, label),
  ]);
  const every = Math.max(Math.ceil(segments.length / (width / 70)), 1);
  const names = segments.map((s, i) => i % every === 0 && svg("text", {
    class: "tick", x: round(place(i)), y: base + 18, "text-anchor": "middle",
  }, clip(s.id, 8)));
  const flags = segments.map((s, i) => flagged(s) && svg("circle", {
    class: findingOf(backend, s) ? "flag" : "flag hollow",
    cx: round(place(i)), cy: round(scale.place(s.introduced)), r: segments.length > 400 ? 2.5 : 4,
  }));
  const axis = svg("text", { class: "tick", x: width - CHART.right, y: CHART.height - 2, "text-anchor": "end" },
    "segments in topological order →");
  const upright = `M0 ${CHART.top}V${base}`;
  return svg("svg", { width, height: CHART.height, "aria-hidden": "true" },
    grid, names, axis,
    svg("path", { class: "introduced", d: stems.join("") }),
    svg("path", { class: "inherited", d: line("inherited") }),
    svg("path", { class: "accumulated", d: line("accumulated") }),
    svg("path", { class: "floor", d: line("floor") }),
    flags,
    svg("path", { class: "chosen", d: upright, hidden: true }),
    svg("path", { class: "cursor", d: upright }));
}
