// The page: header, backends, offenders, network, agreement, gaps, provenance.

const MOST_ROWS = 100; // of a long table before the rest is asked for

const { model: MODEL, stimulus: STIMULUS, reference: REFERENCE } = REPORT;
const AUDITED = REPORT.backends.filter((backend) => backend.segments.length);
const networks = new Map(); // backend → its chart and graph

// --- header -----------------------------------------------------------------------------------------

function header() {
  const shapes = Object.entries(STIMULUS.shapes).map(([name, shape]) =>
    [code(name, 60), ` ${dims(shape)}  `]);
  const seed = STIMULUS.seed === null ? "" : `, seed ${STIMULUS.seed}`;
  const source = STIMULUS.source ? ` from ${clip(STIMULUS.source, 120)}` : "";
  const producer = MODEL.producer ? `, from ${clip(MODEL.producer, 80)}` : "";
  return html("header", null,
    html("div", { class: "title" },
      html("span", { class: `badge ${REPORT.verdict}` }, REPORT.verdict),
      html("h1", null, clip(MODEL.path.split("/").pop(), 120)),
      themeButton()),
    html("p", { class: "headline" }, clip(WORDS.headline, 600), "."),
    facts(
      ["model", clip(MODEL.path, 200), html("span", { class: "quiet" },
        ` opset ${MODEL.opset}, ${count(MODEL.nodes, "node")}, ${count(MODEL.parameters, "parameter")}${producer}, sha256 ${clip(MODEL.sha256, 16)}`)],
      ["candidate", MODEL.candidate && `${clip(MODEL.candidate, 200)}, compiled by the backends`],
      ["inputs", `${count(STIMULUS.samples, `${STIMULUS.kind} sample`)}${source}${seed}: `, shapes,
        STIMULUS.notes.map((note) => html("p", { class: "warning" }, clip(note, 600)))],
      ["reference", `${clip(REFERENCE.engine)}, version ${clip(REFERENCE.version)}, ${clip(REFERENCE.precision)}`],
      ["limit", REPORT.judgement ? judgement(REPORT.judgement)
        : `fails from ${REPORT.fail_on}; exit code ${REPORT.exit_code}`]),
    navigation());
}

// By what the verdict was reached: a policy or a baseline.
function judgement({ source, broken, waived, notes }) {
  const held = broken.length ? count(broken.length, "broken rule") : "every rule holds";
  const off = waived.length ? `; ${count(waived.length, "finding")} waived` : "";
  return [`${held} (${clip(source, 200)})${off}; exit code ${REPORT.exit_code}`,
    ...broken.map((rule) => html("p", { class: "broken" }, clip(rule.sentence, 600))),
    ...notes.map((note) => html("p", { class: "quiet" }, clip(note, 600)))];
}

function navigation() {
  const sections = [REPORT.pipeline && ["pipeline", "Around the network"], ["backends", "Backends"], ["offenders", "Offenders"],
    AUDITED.length && ["network", "Network"], REPORT.agreement.length && ["agreement", "Agreement"],
    ["gaps", "Not audited"], ["provenance", "Provenance"]];
  return html("nav", { "aria-label": "Sections" }, sections.filter(Boolean).map(([id, title]) =>
    html("a", { href: `#${id}` }, title)));
}

function themeButton() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const button = html("button", { type: "button", class: "theme", click: () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    name();
  } });
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  dark.addEventListener("change", name);
  name();
  return button;
}

const section = (id, title, ...content) =>
  html("section", { id, "aria-labelledby": `${id}-title` },
    html("h2", { id: `${id}-title` }, title), content);

// --- around the network -----------------------------------------------------------------------------

function pipelineSection() {
  const { pipeline } = REPORT;
  if (!pipeline) return null;
  const head = [{ title: "step" }, { title: "training" }, { title: "deployment" },
    { title: "introduced", number: true }, { title: "effect", number: true },
    { title: "share", number: true }, { title: "alone" }];
  const row = (step) => [html("strong", null, clip(step.name, 40)), clip(step.training, 120),
    clip(step.deployment, 120), error(step.introduced), step.effect === null ? NONE : error(step.effect),
    [percent(step.share), bar(Math.abs(step.share ?? 0), percent(step.share))],
    step.consequences.map(({ output, sentence }) => html("div", null, `${clip(output, 60)}: ${clip(sentence, 200)}`))];
  return section("pipeline", "Around the network",
    html("p", { class: "quiet" },
      `What ${clip(pipeline.source, 200)} does differently in deployment, each step switched alone on the reference: ${count(pipeline.photos, "photograph")}.`),
    html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Steps before the network" },
      table("Steps that differ, in the order of execution", head, pipeline.steps.map(row))),
    outputTable({ id: "the reference after the deployment's pipeline", outputs: pipeline.outputs }));
}

// --- backends ---------------------------------------------------------------------------------------

const backendSection = () => section("backends", "Backends",
  html("p", { class: "quiet" }, "How far each runtime's outputs are from the reference's, and why."),
  html("div", { class: "cards" }, REPORT.backends.map(card)));

function card(backend, index) {
  const said = WORDS.backends[index];
  const made = backend.provenance;
  const notes = [...(made?.notes ?? []), ...backend.warnings];
  return html("article", { class: "card" },
    html("h3", null, clip(backend.id), made && html("span", { class: "quiet" },
      ` ${clip(made.engine, 60)} ${clip(made.version, 40)}${backend.device ? ` on ${clip(backend.device, 60)}` : ""}`)),
    backend.gap && gapText(backend.gap),
    backend.outputs.length > 0 && outputTable(backend),
    said.told.map((line) => html("p", null, clip(line, 600))),
    backend.outputs.length > 0 && categories(backend, said),
    backend.fidelity ? html("p", { class: said.proved ? "proof good" : "proof warning" }, said.proof)
      : backend.outputs.length > 0 && html("p", { class: "proof warning" }, "not proved: nothing was captured"),
    backend.input_control !== null && html("p", null,
      `Control: the reference amplifies noise on its input ${plain(backend.input_control)} times.`),
    notes.map((note) => html("p", { class: "warning" }, clip(note, 800))),
    experiments(backend),
    backend.booked.length > 1 && folded("Exact book-keeping by stretch of segments", () => books(backend)));
}

function outputTable(backend) {
  const outputs = [...backend.outputs].sort((a, b) => (b.relative_l2 ?? Infinity) - (a.relative_l2 ?? Infinity));
  const head = ["output", "rel. L2", "max abs", "SQNR dB", "cosine", "top-1"]
    .map((title, i) => ({ title, number: i > 0 }));
  const row = (o) => [code(o.name, 60),
    o.relative_l2 === null ? html("span", { class: "warning" }, clip(o.mismatch ?? "cannot be compared", 200))
      : html("strong", null, error(o.relative_l2)),
    plain(o.max_abs), o.sqnr_db === null ? (o.relative_l2 === null ? "-∞" : "∞") : o.sqnr_db.toFixed(1),
    o.cosine === null ? NONE : o.cosine.toFixed(6), percent(o.top1_agreement)];
  return longTable(`Outputs of ${clip(backend.id)}`, head, outputs, row, 6);
}

/** A table of which the first rows show until the others are asked for. */
function longTable(caption, head, items, row, most = MOST_ROWS) {
  const element = table(caption, head, items.slice(0, most).map(row));
  if (items.length <= most) return element;
  const more = html("button", { type: "button", class: "more", click: () => {
    element.replaceWith(table(caption, head, items.map(row)));
    more.remove();
  } }, `Show all ${items.length.toLocaleString("en")}`);
  return [element, more];
}

/** Shares of the final divergence by cause. They are drawn as measured, never rescaled. */
function categories(backend, said) {
  if (backend.outputs.every((output) => output.relative_l2 === 0)) {
    return html("p", { class: "quiet" }, "Equal to the reference: nothing to explain.");
  }
  if (!backend.categories.length && backend.unexplained_share === null) {
    return html("p", { class: "quiet" }, "No shares of a divergence that is not finite.");
  }
  const parts = [...backend.categories]
    .sort((a, b) => (b.share ?? 0) - (a.share ?? 0))
    .map(({ noise, stage, share, spread: varied }, i) => ({
      name: stage === "inference" ? noise : `${noise} (${stage})`, share, varied, tone: `tone${Math.min(i, 4)}`,
    }));
  parts.push({ name: "unexplained", share: backend.unexplained_share, varied: backend.unexplained_spread, tone: "unknown" });
  const positive = parts.filter(({ share }) => share > 0);
  const whole = Math.max(positive.reduce((sum, { share }) => sum + share, 0), 1);
  const stack = html("div", { class: "stack", "aria-hidden": "true" }, positive.map(({ share, tone }) => {
    const piece = html("span", { class: tone });
    piece.style.inlineSize = `${(100 * share) / whole}%`;
    return piece;
  }));
  return html("div", { class: "categories" }, stack,
    html("ul", null, parts.map(({ name, share, varied, tone }) => html("li", null,
      html("i", { class: `swatch ${tone}` }), html("span", { class: "number" }, percent(share)), " ", clip(name, 80),
      varied && varied.samples > 1 && varied.deviation >= 0.005 &&
        html("span", { class: "quiet" }, ` ${percent(varied.low)} to ${percent(varied.high)}`)))),
    said.books && html("p", { class: "quiet" }, said.books));
}

/** A text whose words may be broken where their parts end. */
function breakable(text) {
  return text.split(/(?<=[._])/).map((part) => [part, html("wbr")]);
}

/** What building again without one factor did. */
function experiments(backend) {
  const tried = backend.counterfactuals ?? []; // absent from the first reports of version 1
  if (!tried.length) return null;
  const head = [{ title: "built without" }, { title: "conclusion" }, { title: "before", number: true },
    { title: "after", number: true }, { title: "removed", number: true }, { title: "claimed", number: true },
    { title: "latency", number: true }];
  return [
    html("h4", null, "Built again without one factor"),
    table(`Counterfactuals of ${clip(backend.id)}`, head, tried.map((one) => [
      [clip(one.factor, 120), html("div", { class: "quiet option" },
        Object.entries(one.options).map(([key, value]) => html("div", null,
          breakable(`${clip(key, 60)}=${clip(value, 60)}`))),
        one.noises.length > 0 && breakable(`brings ${clip(one.noises.join(", "), 120)}`))],
      [one.conclusion, one.failure && html("div", { class: "warning" }, clip(one.failure, 300))],
      error(one.before), error(one.after), percent(one.removed), percent(one.claimed),
      one.latency_after === null || !one.latency_before ? NONE
        : `${plain(one.latency_after / one.latency_before)}×`])),
  ];
}

function books(backend) {
  const most = Math.max(...backend.booked.map(({ share }) => Math.abs(share ?? 0)), 1e-9);
  const head = [{ title: "segments" }, { title: "share", number: true }, { title: "" }];
  return longTable("Shares of the final divergence", head, backend.booked, ({ label, share }) =>
    [clip(label, 60), percent(share), bar(Math.abs(share ?? 0) / most, percent(share))]);
}

// --- offenders --------------------------------------------------------------------------------------

const RANKS = ["info", "low", "medium", "high", "critical"];

const COLUMNS = [
  { title: "#", number: true, key: (f) => -f.rank, cell: (f) => String(f.rank) },
  { title: "severity", key: (f) => RANKS.indexOf(f.severity), cell: (f) => [
    severity(f.severity), html("div", { class: "quiet" }, `${f.confidence} confidence`)] },
  { title: "backend", key: (f) => f.backend, cell: (f) => clip(f.backend, 30) },
  { title: "segment", key: (f) => f.segment, cell: (f) => openButton(f) },
  { title: "nodes", key: (f) => f.nodes[0] ?? "", cell: (f) => [
    code(f.nodes[0] ?? NONE, 70), html("div", { class: "quiet" },
      f.nodes.length > 1 ? `and ${f.nodes.length - 1} more · ` : "", clip(f.op_types.join(" + "), 60)),
    f.modules?.length > 0 && html("div", { class: "quiet" }, clip(f.modules.join(", "), 80))] },
  { title: "cause", key: (f) => f.noise ?? "", cell: (f) =>
    (f.noise ? clip(f.noise, 60) : html("em", null, "unexplained")) },
  { title: "impact", number: true, key: (f) => f.leave_one_in, cell: (f) => [
    html("strong", null, percent(f.leave_one_in)), bar(f.leave_one_in, percent(f.leave_one_in))] },
  { title: "share", number: true, key: (f) => f.impact_share, cell: (f) => percent(f.impact_share) },
  { title: "introduced", number: true, key: (f) => f.introduced ?? Infinity, cell: (f) => error(f.introduced) },
  { title: "explained", number: true, key: (f) => f.explained, cell: (f) => percent(f.explained) },
  { title: "bits", number: true, key: (f) => f.bit_identical, cell: (f) => percent(f.bit_identical) },
];

function openButton(finding) {
  const backend = REPORT.backends.find(({ id }) => id === finding.backend);
  const index = backend ? backend.segments.findIndex(({ id }) => id === finding.segment) : -1;
  if (index < 0) return clip(finding.segment, 30);
  return html("button", { type: "button", class: "link",
    "aria-label": `Open segment ${clip(finding.segment, 30)} of ${clip(finding.backend, 30)}`,
    click: (event) => openSegment(backend, index, event.currentTarget) }, clip(finding.segment, 30));
}

function offenderSection() {
  const { findings } = REPORT;
  if (!findings.length) {
    return section("offenders", "Ranked offenders",
      html("p", null, "No segment introduced an error above its floor."));
  }
  const body = html("tbody", { click: (event) => {
    // The whole row opens its segment; the button in it is what the keyboard reaches.
    if (!event.target.closest("button")) event.target.closest("tr")?.querySelector("button")?.click();
  } });
  const heads = COLUMNS.map((column) => html("th", {
    scope: "col", class: column.number ? "number" : null, "aria-sort": "none",
  }, html("button", { type: "button", click: () => sortBy(column) }, column.title)));
  const more = html("button", { type: "button", class: "more", click: () => { most = Infinity; draw(); } });
  const filter = html("input", { type: "search", id: "filter", input: () => draw(),
    placeholder: "backend, node, operator, cause" });
  const found = html("span", { class: "quiet", role: "status" });
  const sought = findings.map((f) =>
    [f.backend, f.segment, ...f.nodes, ...(f.modules ?? []), ...f.op_types, f.kernel, f.noise ?? "unexplained", f.severity].join("\n").toLowerCase());
  let sorted = COLUMNS[0];
  let down = true;
  let most = MOST_ROWS;

  function sortBy(column) {
    down = sorted === column ? !down : true;
    sorted = column;
    draw();
  }

  function draw() {
    const wanted = filter.value.trim().toLowerCase();
    const rows = findings.filter((_, i) => sought[i].includes(wanted))
      .sort((a, b) => (down ? -1 : 1) * compare(sorted.key(a), sorted.key(b)));
    body.replaceChildren(...rows.slice(0, most).map((finding) => html("tr", null, COLUMNS.map((column) =>
      html("td", { class: column.number ? "number" : null, "data-label": column.title }, column.cell(finding))))));
    COLUMNS.forEach((column, i) => heads[i].setAttribute("aria-sort",
      column !== sorted ? "none" : down ? "descending" : "ascending"));
    more.hidden = rows.length <= most;
    more.textContent = `Show all ${rows.length.toLocaleString("en")}`;
    found.textContent = wanted ? `${rows.length} of ${count(findings.length, "finding")}` : count(findings.length, "finding");
  }

  draw();
  return section("offenders", "Ranked offenders",
    WORDS.remedies.length > 0 && [html("h3", null, "What to do"), listed(WORDS.remedies.map(
      ([backend, noise, remedy, number]) => [html("strong", null, `${clip(backend, 30)}, ${clip(noise, 60)}`),
        ` (${count(number, "finding")}): ${clip(remedy, 800)}`]), 6)],
    html("p", { class: "quiet" },
      "Ranked by what each error alone changes in the outputs. Impact: that, as part of the final divergence. Share: its part in the exact book-keeping, which sums to 100%. Introduced: relative L2 made here. Explained, bits: how much of it, and how many elements exactly, replaying the cause reproduces."),
    html("div", { class: "legend" }, html("label", { for: "filter" }, "Filter"), filter, found),
    html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Ranked offenders" },
      html("table", { class: "offenders" }, html("thead", null, html("tr", null, heads)), body)),
    more);
}

/** Smaller first, with what was not measured before everything else. */
function compare(a, b) {
  if (a === null || b === null) return (a !== null) - (b !== null);
  if (typeof a === "string") return b.localeCompare(a, "en", { numeric: true });
  return a - b;
}

// --- network ----------------------------------------------------------------------------------------

function networkSection() {
  if (!AUDITED.length) return null;
  const panels = AUDITED.map((backend, i) => html("div", {
    role: "tabpanel", id: `network-${i}`, "aria-labelledby": `tab-${i}`, hidden: true }));
  const tabs = AUDITED.map((backend, i) => html("button", {
    type: "button", role: "tab", id: `tab-${i}`, "aria-controls": `network-${i}`,
    click: () => showNetwork(AUDITED[i]),
  }, clip(backend.id, 30), html("span", { class: "quiet" }, ` ${count(backend.segments.length, "segment")}`)));
  const list = html("div", { role: "tablist", "aria-label": "Backend", keydown: (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length];
    next.click();
    next.focus();
  } }, tabs);
  const search = html("input", { type: "search", id: "find", placeholder: "segment, node, tensor, operator",
    keydown: (event) => { if (event.key === "Enter") findNext(search.value, answer); } });
  const answer = html("span", { class: "quiet", role: "status" });
  return section("network", "Along the network",
    html("p", { class: "quiet" },
      "Accumulated: how far a segment's output is from the reference. Inherited: what it was handed and passed on. Introduced: what it did itself; only above the floor is anything blamed."),
    html("div", { class: "legend" }, list, html("label", { for: "find" }, "Find"), search, answer),
    panels);
}

let shown = null; // the backend whose network is shown

function showNetwork(backend) {
  shown = backend;
  AUDITED.forEach((each, i) => {
    const on = each === backend;
    const tab = document.getElementById(`tab-${i}`);
    tab.setAttribute("aria-selected", String(on));
    tab.setAttribute("tabindex", on ? "0" : "-1");
    document.getElementById(`network-${i}`).hidden = !on;
  });
  networkOf(backend);
}

/** The backend's chart and graph, drawn when first asked for. */
function networkOf(backend) {
  if (networks.has(backend)) return networks.get(backend);
  const panel = document.getElementById(`network-${AUDITED.indexOf(backend)}`);
  const choose = (index) => openSegment(backend, index, document.activeElement);
  const parts = { chart: drawChart(backend, choose), graph: drawGraph(backend, choose) };
  networks.set(backend, parts);
  panel.append(parts.chart.element, parts.graph.element,
    html("p", { class: "quiet onpaper" }, "The graph is not printed: open this report in a browser."));
  return parts;
}

let found = -1;
let soughtLast = "";

/** Opens the next segment of which some name contains the text; exact names come first. */
function findNext(text, answer) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return;
  const names = (s) =>
    [s.id, ...s.nodes, ...s.node_keys, ...s.outputs, ...s.inputs, ...s.op_types, ...(s.modules ?? [])];
  const matching = (fits) => shown.segments.flatMap((s, i) => (names(s).some((n) => fits(n.toLowerCase())) ? [i] : []));
  const exact = matching((name) => name === wanted);
  const all = exact.length ? exact : matching((name) => name.includes(wanted));
  found = wanted === soughtLast ? found + 1 : 0;
  soughtLast = wanted;
  answer.textContent = all.length ? `${(found % all.length) + 1} of ${all.length}` : "nothing has that name";
  if (all.length) openSegment(shown, all[found % all.length], null);
}

// --- one segment ------------------------------------------------------------------------------------

const panel = document.getElementById("segment");
let opener = null; // where the keyboard was before the panel opened
let openedBackend = null;

/** Opens a segment in the panel, and shows where it is; focus moves there if `from` is given. */
function openSegment(backend, index, from) {
  const segment = backend.segments[index];
  if (openedBackend && openedBackend !== backend) select(openedBackend, null);
  if (from && !panel.contains(from)) opener = from;
  openedBackend = backend;
  if (backend !== shown) showNetwork(backend);
  const neighbours = networkOf(backend).graph.neighbours(index);
  const step = (label, to, title) => html("button", { type: "button", title, "aria-label": title,
    disabled: !backend.segments[to], click: (event) => openSegment(backend, to, event.currentTarget) }, label);
  const title = html("h2", { id: "segment-title", tabindex: "-1" },
    clip(segment.id, 40), html("span", { class: "quiet" }, ` on ${clip(backend.id, 40)}`));
  panel.replaceChildren(
    html("div", { class: "panelhead" }, title, html("span", { class: "buttons" },
      step("←", index - 1, "Previous segment"), step("→", index + 1, "Next segment"),
      html("button", { type: "button", title: "Close (Esc)", "aria-label": "Close", click: closeSegment }, "×"))),
    html("p", { class: "operators" }, clip(segment.op_types.join(" + "), 200)),
    ...drawSegment(backend, segment, neighbours, (to) => openSegment(backend, to, panel)).filter(Boolean));
  panel.hidden = false;
  panel.scrollTop = 0;
  document.body.classList.add("opened");
  select(backend, index);
  history.replaceState(null, "", `#/${encodeURIComponent(backend.id)}/${encodeURIComponent(segment.id)}`);
  if (from) title.focus({ preventScroll: true });
}

function closeSegment() {
  if (panel.hidden) return;
  panel.hidden = true;
  document.body.classList.remove("opened");
  select(openedBackend, null);
  history.replaceState(null, "", location.pathname + location.search);
  (opener?.isConnected ? opener : document.getElementById("main")).focus({ preventScroll: true });
  opener = null;
}

function select(backend, index) {
  const { chart, graph } = networkOf(backend);
  chart.select(index);
  graph.select(index);
}

/** Follows an address such as #/ov/s12. */
function followAddress() {
  const [, id, segmentId] = (location.hash.match(/^#\/([^/]*)\/([^/]*)$/) ?? []).map(decode);
  const backend = AUDITED.find((each) => each.id === id);
  const index = backend ? backend.segments.findIndex((each) => each.id === segmentId) : -1;
  if (index < 0) return;
  openSegment(backend, index, null);
  document.getElementById("network").scrollIntoView();
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return ""; // an address that somebody cut short
  }
}

// --- agreement, gaps, provenance ----------------------------------------------------------------------

function agreementSection() {
  const pairs = REPORT.agreement;
  if (!pairs.length) return null;
  const names = [...new Set(pairs.flatMap(({ a, b }) => [a, b]))];
  const between = new Map(pairs.flatMap(({ a, b, relative_l2: far }) =>
    [[JSON.stringify([a, b]), far], [JSON.stringify([b, a]), far]]));
  const cell = (a, b) => {
    const key = JSON.stringify([a, b]);
    if (a === b || !between.has(key)) return html("td", { class: "number" }, a === b ? "" : NONE);
    return html("td", { class: `number heatcell h${heat(between.get(key))}` }, error(between.get(key)));
  };
  const name = (one) => [clip(one, 30), one === REPORT.outlier && html("span", { class: "quiet" }, " (outlier)")];
  return section("agreement", "Agreement",
    html("p", { class: "quiet" }, "Relative L2 between the final outputs of each two."),
    html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Agreement" },
      html("table", { class: "matrix" },
        html("thead", null, html("tr", null, html("td"), names.map((b) => html("th", { scope: "col", class: "number" }, name(b))))),
        html("tbody", null, names.map((a) => html("tr", null, html("th", { scope: "row" }, name(a)), names.map((b) => cell(a, b))))))),
    html("p", null, REPORT.outlier !== null ? `Outlier: ${clip(REPORT.outlier, 40)}.`
      : names.length < 3 ? "No outlier: two participants cannot outvote each other." : "No outlier: nobody stands apart."));
}

function gapText(gap) {
  return [
    html("p", { class: "warning" }, html("strong", null, `${clip(gap.stage, 60)}: `), clip(gap.reason, 1500)),
    gap.remedy && html("p", null, html("strong", null, "Remedy: "), clip(gap.remedy, 800)),
    gap.log.length > 0 && folded(count(gap.log.length, "line") + " of the engine's log",
      () => html("pre", { tabindex: "0" }, gap.log.map((line) => clip(line, 2000)).join("\n"))),
  ];
}

function gapSection() {
  const skipped = REPORT.backends.filter((b) => b.fidelity?.skipped.length).map((backend) => {
    const reasons = new Map();
    for (const { tensor: name, reason } of backend.fidelity.skipped) {
      if (!reasons.has(reason)) reasons.set(reason, []);
      reasons.get(reason).push(name);
    }
    return [...reasons].map(([reason, names]) => html("article", { class: "gap" },
      html("h3", null, clip(backend.id)),
      html("p", null, `${names.length} of ${count(backend.fidelity.candidates, "tensor")} not observed: ${clip(reason, 600)}`),
      folded(count(names.length, "name"), () => html("ul", null, names.map((name) => html("li", null, code(name)))))));
  });
  const gaps = REPORT.gaps.map((gap) => html("article", { class: "gap" }, html("h3", null, clip(gap.subject, 120)), gapText(gap)));
  return section("gaps", "Not audited", gaps, skipped,
    !gaps.length && !skipped.length && html("p", null, "No gaps: everything asked for was compared."));
}

function provenanceSection() {
  const made = REPORT.backends.filter((backend) => backend.provenance);
  const spent = (stages) => Object.entries(stages).map(([stage, time]) => `${clip(stage, 40)} ${seconds(time)}`).join(", ");
  const head = ["kernel", "type", "implementation", "computes", "writes", "ONNX nodes"].map((title) => ({ title }));
  const row = (k) => [code(k.name, 80), clip(k.type, 60), clip(k.primitive, 60), clip(k.precision, 20),
    clip(k.output_precision, 20), [code(k.nodes[0] ?? NONE, 60), k.nodes.length > 1 && ` and ${k.nodes.length - 1} more`]];
  return section("provenance", "Provenance",
    made.map((backend) => html("article", { class: "card wide" },
      html("h3", null, clip(backend.id)),
      html("p", null, WORDS.backends[REPORT.backends.indexOf(backend)].ran),
      facts(
        ["options", Object.entries(backend.provenance.options).map(([key, value]) =>
          html("div", null, code(key, 80), " = ", code(value, 200)))],
        ["time", spent(backend.seconds)]),
      backend.provenance.kernels.length > 0 && folded(count(backend.provenance.kernels.length, "kernel"),
        () => html("div", null, longTable(`Kernels of ${clip(backend.id)}`, head, backend.provenance.kernels, row))))),
    REPORT.noises.length > 0 && folded("Causes named in this report", () => html("div", { class: "causes" },
      REPORT.noises.map((noise) => html("article", null,
        html("h3", null, clip(noise.id, 80), html("span", { class: "quiet" }, ` ${noise.stage}, ${clip(noise.type, 80)}`)),
        html("p", null, clip(noise.title, 300), ". ", clip(noise.cause, 800)),
        html("p", { class: "quiet" }, `Source: ${clip(noise.source, 400)}`))))),
    facts(
      ["model", html("code", { class: "hash" }, clip(MODEL.sha256, 80))],
      ["inputs", STIMULUS.sha256 && html("code", { class: "hash" }, clip(STIMULUS.sha256, 80))],
      ["machine", REPORT.machine && `${clip(REPORT.machine.cpu, 80)}, ${count(REPORT.machine.cores, "core")}, ${clip(REPORT.machine.system, 80)}, Python ${clip(REPORT.machine.python, 20)}; ${clip(REPORT.machine.flags.join(" "), 200)}`],
      ["threads", REPORT.threads === null || REPORT.threads === undefined ? "the engines' own default" : String(REPORT.threads)],
      ["command", REPORT.command?.length > 0 && html("code", null, clip(`audit ${REPORT.command.join(" ")}`, 600))],
      ["time", spent(REPORT.timing)],
      ["written by", `audit ${clip(REPORT.tool.version, 40)}`]));
}

// --- together ---------------------------------------------------------------------------------------

document.getElementById("main").append(...[header(), pipelineSection(), backendSection(), offenderSection(), networkSection(),
  agreementSection(), gapSection(), provenanceSection()].filter(Boolean));
if (AUDITED.length) showNetwork(AUDITED.find(({ id }) => id === REPORT.findings[0]?.backend) ?? AUDITED[0]);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") closeSegment(); });
addEventListener("hashchange", followAddress);
followAddress();
