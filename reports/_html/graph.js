// The network as a graph: segments in layers from the inputs down, coloured by what they did.

const NODE = { width: 184, height: 42, lane: 14, gapX: 20, gapY: 26, margin: 24 };
const MOST_BENDS = 30000; // beyond this long edges run straight instead of through their own lane
const SWEEPS = 8; // of ordering and of placing, down and up in turn

const METRICS = {
  introduced: ["introduced error", (s) => s.introduced, heat, error],
  accumulated: ["accumulated error", (s) => s.accumulated, heat, error],
  impact: ["impact on the output", (s) => s.leave_one_in, shareHeat, percent],
};

/**
 * The graph of one backend, in a frame that scrolls, drags and zooms.
 *
 * Arrow keys walk along the edges and along a layer, Enter opens a segment, as does a click.
 * `choose(index)` is called then. Returns also `neighbours(index)`, the segments before and after.
 */
function drawGraph(backend, choose) {
  const { nodes, links } = connect(backend);
  const layers = arrange(nodes);
  const boxes = nodes.filter((node) => node.kind !== "bend");
  const width = nodes.reduce((most, n) => Math.max(most, n.x + n.width / 2), 0) + NODE.margin;
  const height = layers.length * (NODE.height + NODE.gapY) + 2 * NODE.margin;
  let metric = "introduced";
  let zoom = 1;
  let current = boxes.find((node) => node.index !== null && flagged(backend.segments[node.index])) ?? boxes[0];
  let chosen = null;

  const lit = svg("path", { class: "edges lit" });
  const drawing = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "group",
    "aria-label": `Graph of ${count(backend.segments.length, "segment")}; arrow keys walk along it`,
  }, svg("path", { class: "edges", d: links.map(curve).join("") }), lit);
  const frame = html("div", { class: "frame" }, drawing);

  for (const node of boxes) {
    node.element = svg("g", {
      transform: `translate(${node.x} ${node.y})`, tabindex: "-1",
      role: node.index === null ? "img" : "button",
    });
    if (node.index !== null) node.element.dataset.segment = node.index;
    drawing.append(node.element);
    node.element.addEventListener("focus", () => { if (node !== current) focusOn(node, false); });
  }
  paint();
  current?.element.setAttribute("tabindex", "0");

  function paint() {
    const [name, pick, step, figure] = METRICS[metric];
    for (const node of boxes) {
      const half = node.width / 2;
      const box = svg("rect", { x: -half, y: -node.height / 2, width: node.width, height: node.height,
        rx: node.index === null ? node.height / 2 : 4 });
      if (node.index === null) {
        node.element.setAttribute("class", "node terminal");
        node.element.setAttribute("aria-label", `${node.kind} ${clip(node.label)}`);
        node.element.replaceChildren(box, svg("text", { y: 4 }, clip(node.label, 24)));
        continue;
      }
      const segment = backend.segments[node.index];
      const value = pick(segment);
      const said = segment.unmeasured === null ? figure(value) : "not measured";
      const finding = findingOf(backend, segment);
      const rank = finding ? ` · #${finding.rank}` : "";
      node.element.setAttribute("class", [
        "node", `h${step(value)}`, segment.unmeasured === null ? "" : "unmeasured",
        finding ? "offender" : "", node.index === chosen ? "chosen" : "",
      ].join(" "));
      node.element.setAttribute("aria-label",
        `${clip(segment.id)}, ${operators(segment, 60)}: ${name} ${said}, ${cause(segment)}`);
      node.element.replaceChildren(
        svg("title", null, `${clip(segment.id)}: ${clip(segment.nodes.join(", "), 200)}`),
        box,
        svg("text", { y: -4 }, operators(segment, 20)),
        svg("text", { y: 12, class: "figure" }, `${clip(segment.id, 8)} · ${said}${rank}`));
    }
  }

  function resize() {
    drawing.setAttribute("width", width * zoom);
    drawing.setAttribute("height", height * zoom);
  }

  function setZoom(next) {
    const middle = [frame.scrollLeft + frame.clientWidth / 2, frame.scrollTop + frame.clientHeight / 2];
    const factor = Math.min(Math.max(next, 0.05), 3) / zoom;
    zoom *= factor;
    resize();
    frame.scrollLeft = middle[0] * factor - frame.clientWidth / 2;
    frame.scrollTop = middle[1] * factor - frame.clientHeight / 2;
  }

  const fit = () => setZoom(Math.min(frame.clientWidth / width, frame.clientHeight / height, 1));

  function show(node) {
    const pad = 40;
    const [x, y] = [node.x * zoom, node.y * zoom];
    const [halfX, halfY] = [(node.width / 2) * zoom + pad, (node.height / 2) * zoom + pad];
    if (x - halfX < frame.scrollLeft || x + halfX > frame.scrollLeft + frame.clientWidth) {
      frame.scrollLeft = x - frame.clientWidth / 2;
    }
    if (y - halfY < frame.scrollTop || y + halfY > frame.scrollTop + frame.clientHeight) {
      frame.scrollTop = y - frame.clientHeight / 2;
    }
  }

  function focusOn(node, move = true) {
    current?.element.setAttribute("tabindex", "-1");
    current = node;
    node.element.setAttribute("tabindex", "0");
    if (move) node.element.focus({ preventScroll: true });
    show(node);
  }

  const along = (node, way) => follow(node, way).boxes
    .sort((a, b) => Math.abs(a.x - node.x) - Math.abs(b.x - node.x))[0];
  const beside = (node, step) => {
    const row = layers[node.layer].filter((n) => n.kind !== "bend");
    return row[row.indexOf(node) + step];
  };

  frame.addEventListener("keydown", (event) => {
    if (!event.target.closest(".node")) return;
    const goal = {
      ArrowDown: () => along(current, "after"), ArrowUp: () => along(current, "before"),
      ArrowLeft: () => beside(current, -1), ArrowRight: () => beside(current, 1),
      Home: () => boxes[0], End: () => boxes[boxes.length - 1],
    }[event.key];
    if (goal) {
      const next = goal();
      if (next) focusOn(next);
    } else if (event.key === "Enter" || event.key === " ") {
      if (current.index !== null) choose(current.index);
    } else if (event.key === "+") setZoom(zoom * 1.25);
    else if (event.key === "-") setZoom(zoom / 1.25);
    else if (event.key === "0") fit();
    else return;
    event.preventDefault();
  });

  // Drag to pan; a press that moves less than this is a click.
  const SLACK = 4;
  let press = null;
  let dragged = false;
  frame.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "mouse" || event.button !== 0) return;
    press = { x: event.clientX, y: event.clientY, left: frame.scrollLeft, top: frame.scrollTop };
    dragged = false;
  });
  frame.addEventListener("pointermove", (event) => {
    if (!press) return;
    const [dx, dy] = [event.clientX - press.x, event.clientY - press.y];
    if (!dragged && Math.hypot(dx, dy) < SLACK) return;
    if (!dragged) frame.setPointerCapture(event.pointerId);
    dragged = true;
    frame.scrollLeft = press.left - dx;
    frame.scrollTop = press.top - dy;
  });
  frame.addEventListener("pointerup", () => { press = null; });
  frame.addEventListener("pointercancel", () => { press = null; });
  frame.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    setZoom(zoom * Math.exp(-event.deltaY / 300));
  }, { passive: false });
  drawing.addEventListener("click", (event) => {
    const element = event.target.closest("[data-segment]");
    if (element && !dragged) choose(Number(element.dataset.segment));
    dragged = false;
  });

  const choice = html("select", {
    id: `metric-${REPORT.backends.indexOf(backend)}`,
    change: (event) => { metric = event.target.value; paint(); },
  }, Object.entries(METRICS).map(([key, [name]]) => html("option", { value: key }, name)));
  const button = (label, title, click) =>
    html("button", { type: "button", title, "aria-label": title, click }, label);
  const toolbar = html("div", { class: "legend" },
    html("label", { for: choice.id }, "Colour"), choice,
    html("span", { class: "ramp", "aria-hidden": "true" }, "low",
      Array.from({ length: HOTTEST + 1 }, (_, step) => html("i", { class: `swatch h${step}` })), "high"),
    html("span", { class: "buttons" },
      button("−", "Zoom out", () => setZoom(zoom / 1.25)),
      button("+", "Zoom in", () => setZoom(zoom * 1.25)),
      button("Fit", "Show the whole graph", fit),
      button("1:1", "Natural size", () => setZoom(1))));
  resize();
  const first = new ResizeObserver(() => {
    if (!frame.clientWidth || !current) return;
    first.disconnect();
    requestAnimationFrame(centre);
  });
  function centre() {
    if (width > frame.clientWidth) setZoom(Math.max(frame.clientWidth / width, 0.6));
    frame.scrollLeft = (width * zoom - frame.clientWidth) / 2;
    show(current);
  }
  first.observe(frame);

  const ofSegment = new Map(boxes.map((node) => [node.index, node]));
  return {
    element: html("div", null, toolbar, frame),
    neighbours: (index) => ["before", "after"].map((way) =>
      follow(ofSegment.get(index), way).boxes.map((node) => node.index).filter((i) => i !== null)
        .sort((a, b) => a - b)),
    select(index) {
      ofSegment.get(chosen)?.element.classList.remove("chosen");
      chosen = index;
      const node = ofSegment.get(index);
      const near = node ? [...follow(node, "before").passed, ...follow(node, "after").passed] : [];
      lit.setAttribute("d", near.map(curve).join(""));
      if (!node) return;
      node.element.classList.add("chosen");
      focusOn(node, false);
    },
  };
}

// --- who is connected to whom -----------------------------------------------------------------------

function makeNode(kind, index, label) {
  const bend = kind === "bend";
  return {
    kind, index, label, layer: 0, x: 0, y: 0, before: [], after: [],
    width: bend ? NODE.lane : NODE.width,
    height: kind === "segment" || bend ? NODE.height : 26,
  };
}

/** Nodes for segments, model inputs and model outputs; long edges get a bend in every layer. */
function connect(backend) {
  const segments = backend.segments.map((s, index) => makeNode("segment", index, s.id));
  const inputs = Object.keys(REPORT.stimulus.shapes).map((name) => makeNode("input", null, name));
  const outputs = [];
  const maker = new Map(inputs.map((node) => [node.label, node]));
  const pairs = new Map([...inputs, ...segments].map((node) => [node, new Set()]));
  backend.segments.forEach((segment, index) => {
    // Segments come in topological order: a tensor made later is another one of the same name.
    for (const tensor of segment.inputs) {
      if (maker.has(tensor)) pairs.get(maker.get(tensor)).add(segments[index]);
    }
    for (const tensor of segment.outputs) maker.set(tensor, segments[index]);
  });
  for (const { name } of backend.outputs) {
    if (!maker.has(name)) continue;
    const node = makeNode("output", null, name);
    outputs.push(node);
    pairs.get(maker.get(name)).add(node);
  }
  const used = inputs.filter((node) => pairs.get(node).size);
  const nodes = [...used, ...segments, ...outputs];

  const fed = new Set();
  for (const node of nodes) {
    for (const next of pairs.get(node) ?? []) {
      next.layer = Math.max(next.layer, node.layer + 1);
      fed.add(next);
    }
  }
  for (const node of nodes) {
    const next = [...(pairs.get(node) ?? [])];
    if (!fed.has(node) && next.length) node.layer = Math.min(...next.map((n) => n.layer)) - 1;
  }

  const links = [];
  const link = (from, to) => {
    links.push([from, to]);
    from.after.push(to);
    to.before.push(from);
  };
  let bends = 0;
  for (const node of [...nodes]) {
    const lane = new Map([[node.layer, node]]); // layer → where this node's tensor runs through it
    for (const next of [...(pairs.get(node) ?? [])].sort((a, b) => a.layer - b.layer)) {
      for (let layer = node.layer + 1; layer < next.layer && bends < MOST_BENDS; layer++) {
        if (lane.has(layer)) continue;
        const bend = makeNode("bend", null, "");
        bend.layer = layer;
        link(lane.get(layer - 1), bend);
        lane.set(layer, bend);
        nodes.push(bend);
        bends++;
      }
      link(lane.get(next.layer - 1) ?? node, next);
    }
  }
  return { nodes, links };
}

/** The boxes that a node's edges lead to in one direction, through bends, and the links passed. */
function follow(node, way) {
  const boxes = new Set();
  const passed = [];
  const todo = [node];
  while (todo.length) {
    const at = todo.pop();
    for (const next of at[way]) {
      passed.push(way === "after" ? [at, next] : [next, at]);
      if (next.kind === "bend") todo.push(next);
      else boxes.add(next);
    }
  }
  return { boxes: [...boxes], passed };
}

// --- where everything goes --------------------------------------------------------------------------

/** Layers of nodes in order, each node with its x and y (Sugiyama, Tagawa and Toda, 1981). */
function arrange(nodes) {
  const layers = [];
  for (const node of nodes) (layers[node.layer] ??= []).push(node);
  for (let i = 0; i < layers.length; i++) layers[i] ??= [];
  for (let sweep = 0; sweep < SWEEPS; sweep++) {
    const way = sweep % 2 ? "after" : "before";
    const order = sweep % 2 ? [...layers].reverse() : layers;
    for (const layer of layers) layer.forEach((node, i) => { node.order = i; });
    for (const layer of order) {
      const centre = new Map(layer.map((node) => [node, mean(node[way].map((n) => n.order)) ?? node.order]));
      layer.sort((a, b) => centre.get(a) - centre.get(b));
      layer.forEach((node, i) => { node.order = i; });
    }
  }
  for (const layer of layers) spread(layer, layer.map(() => 0));
  for (let sweep = 0; sweep <= SWEEPS; sweep++) {
    const way = sweep % 2 ? "after" : "before"; // ends downwards: chains come out straight
    const order = sweep % 2 ? [...layers].reverse() : layers;
    for (const layer of order) {
      spread(layer, layer.map((node) => mean(node[way].map((n) => n.x)) ?? node.x));
    }
  }
  const left = nodes.reduce((least, node) => Math.min(least, node.x - node.width / 2), Infinity);
  for (const node of nodes) {
    node.x += NODE.margin - left;
    node.y = NODE.margin + (node.layer + 0.5) * (NODE.height + NODE.gapY);
  }
  return layers;
}

const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);

/**
 * Gives the nodes of a layer the positions closest to those wanted, in least squares, in which
 * they keep their order and do not overlap (isotonic regression by pooling adjacent violators).
 */
function spread(layer, wanted) {
  let offset = 0;
  const offsets = layer.map((node, i) => {
    if (i) offset += (layer[i - 1].width + node.width) / 2 + NODE.gapX;
    return offset;
  });
  const pools = [];
  layer.forEach((_, i) => {
    pools.push({ sum: wanted[i] - offsets[i], size: 1 });
    while (pools.length > 1) {
      const [a, b] = pools.slice(-2);
      if (a.sum / a.size <= b.sum / b.size) break;
      pools.splice(-2, 2, { sum: a.sum + b.sum, size: a.size + b.size });
    }
  });
  let i = 0;
  for (const { sum, size } of pools) {
    for (let k = 0; k < size; k++, i++) layer[i].x = sum / size + offsets[i];
  }
}

/** The path of one link, down from the lower edge of one node to the upper edge of the next. */
function curve([from, to]) {
  const round = Math.round;
  const start = from.y + from.height / 2;
  const end = to.y - to.height / 2;
  const bend = from.kind === "bend" ? `M${round(from.x)} ${round(from.y - from.height / 2)}V${round(start)}` : `M${round(from.x)} ${round(start)}`;
  if (round(from.x) === round(to.x)) return `${bend}V${round(end)}`;
  const middle = round((start + end) / 2);
  return `${bend}C${round(from.x)} ${middle} ${round(to.x)} ${middle} ${round(to.x)} ${round(end)}`;
}
