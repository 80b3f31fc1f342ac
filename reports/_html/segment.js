// Everything about one segment.

const MOST_SHOWN = 3; // sentences of evidence, and rows of long lists, before the rest unfolds
const MOST_HYPOTHESES = 6;

/**
 * The content of the panel for one segment.
 *
 * `before` and `after` are indices of the segments it is connected to, `open(index)` opens one.
 */
function drawSegment(backend, segment, [before, after], open) {
  const finding = findingOf(backend, segment);
  const part = (title, ...content) =>
    content.flat(Infinity).some(Boolean) && html("section", null, html("h3", null, title), content);
  const jump = (index) => html("button", { type: "button", class: "link", click: () => open(index) },
    backend.segments[index].id);
  const jumps = (indices) => indices.flatMap((index, i) => (i ? [", ", jump(index)] : [jump(index)]));
  return [
    html("p", { class: "verdictline" }, finding
      ? [severity(finding.severity), ` severity, ${finding.confidence} confidence; offender ${finding.rank}`]
      : "not an offender"),
    part("Divergence", divergence(segment)),
    part("Effect on the final outputs", effect(segment, finding)),
    part("Pictures", pictures(segment, finding)),
    part("Cause", causeOf(segment, finding)),
    part("Replayed hypotheses", hypotheses(segment)),
    part("Evidence", finding && listed(finding.evidence.map((line) => clip(line, 600)), MOST_SHOWN)),
    part("What to do", finding?.remedy && html("p", null, clip(finding.remedy, 1000))),
    part("Program", facts(
      ["ran", kernels(backend, segment)],
      ["captured", segment.fidelity],
      ["fed by", jumps(before)],
      ["feeds", jumps(after)],
      ["constants", segment.constants.map((line) => html("p", null, clip(line, 600)))])),
    part("ONNX nodes", nodeTable(segment)),
    part("Tensors", segment.tensors.map(tensor)),
  ];
}

function divergence(segment) {
  const rows = [["introduced", segment.introduced], ["its floor", segment.floor],
    ["inherited", segment.inherited], ["accumulated", segment.accumulated]];
  if (segment.noise !== null && flagged(segment)) rows.push(["left by its cause", segment.residual]);
  const values = rows.map(([, value]) => value).filter((value) => value > 0).map(Math.log10);
  const low = Math.floor(Math.min(...values, -7)) - 0.5;
  const high = Math.max(...values, -1);
  // Bars are on a log scale: their length says how many decades above the smallest.
  const length = (value) => (value === null ? 1 : value > 0 ? (Math.log10(value) - low) / (high - low) : 0);
  const above = segment.floor > 0 && segment.introduced !== null && segment.introduced / segment.floor;
  return [
    segment.unmeasured && html("p", { class: "warning" }, `Not measured: ${clip(segment.unmeasured, 600)}`),
    html("div", { class: "bars" }, rows.map(([name, value]) => [
      html("span", null, name),
      html("span", { class: "number" }, error(value)),
      bar(length(value), `${name} ${error(value)}`)])),
    html("p", { class: "quiet" }, "Relative L2, on a log scale."),
    facts(
      ["above floor", above > 1 && `introduced is ${times(above)} its floor`],
      ["amplification", segment.amplification !== null &&
        `the error leaves ${times(segment.amplification)} as large as it entered`],
      ["one step off", segment.one_step && `${percent(segment.one_step)} of its integer elements`],
      ["concentrated", segment.concentration && concentrated(segment.concentration)]),
  ];
}

const concentrated = ({ share, axis, index, axis_size: size }) =>
  `${percent(share)} of the squared error at index ${index} of axis ${axis} (size ${size.toLocaleString("en")})`;

const beside = (text) => text && html("span", { class: "quiet" }, `, ${text}`);

function effect(segment, finding) {
  return facts(
    ["impact", segment.leave_one_in === null ? "not measured" : [
      `alone it makes ${percent(segment.leave_one_in)} of the final divergence`,
      beside(ranged(segment.leave_one_in_spread, percent))]],
    ["share", segment.impact_share === null ? "booked together with its neighbours" : [
      `${percent(segment.impact_share)} in the exact book-keeping`,
      beside(ranged(segment.impact_share_spread, percent))]],
    ["effect", finding && finding.effect !== null && `relative L2 ${error(finding.effect)} of the outputs`],
    ["means", segment.consequences.map((c) => html("p", null, code(c.output, 60), ": ", clip(c.sentence, 300)))]);
}

function causeOf(segment, finding) {
  if (!flagged(segment) && !finding) {
    return html("p", null, "Nothing to explain: the introduced error is below what rounding can do.");
  }
  const known = REPORT.noises.find((noise) => noise.id === segment.noise);
  return [
    html("p", null, segment.noise
      ? html("strong", null, clip(segment.noise))
      : [html("strong", null, "Unexplained"), ": no replayed cause reproduces enough of this error."]),
    known && html("p", null, clip(known.title, 300), ". ", clip(known.cause, 600)),
    facts(
      ["explained", segment.explained !== null && [
        `${percent(segment.explained)} of the introduced error`,
        beside(ranged(segment.explained_spread, percent))]],
      ["bit-identical", segment.noise && `${percent(segment.bit_identical)} of the elements`],
      ["found on", segment.explained_on !== null && [
        `sample ${segment.explained_on}`,
        segment.contradicted > 0 && `; does not fit on ${count(segment.contradicted, "sample")}`]],
      ["source", known && clip(known.source, 300)]),
  ];
}

function hypotheses(segment) {
  if (!segment.hypotheses.length) return null;
  const order = [...segment.hypotheses].sort((a, b) => (b.explained ?? -Infinity) - (a.explained ?? -Infinity));
  const rows = (some) => html("div", { class: "hypotheses" }, some.map((one) => [
    html("span", { class: "number" }, score(one.explained)),
    bar(one.explained, `explains ${score(one.explained)}`),
    html("span", { class: "number" }, percent(one.bit_identical)),
    html("span", null, clip(one.noise, 80), html("br"), html("span", { class: "quiet" }, clip(one.variant, 200)))]));
  const rest = order.slice(MOST_HYPOTHESES);
  return [
    html("p", { class: "quiet" }, "Share of the introduced error that replaying each cause reproduces (1 is all of it), and elements that it reproduces bit for bit."),
    rows(order.slice(0, MOST_HYPOTHESES)),
    rest.length > 0 && folded(`${rest.length} more`, () => rows(rest)),
  ];
}

function kernels(backend, segment) {
  const keys = new Set(segment.node_keys);
  const ran = (backend.provenance?.kernels ?? []).filter((k) => k.nodes.some((node) => keys.has(node)));
  if (!ran.length) {
    return [segment.kernel, segment.precision].filter(Boolean).map((t) => clip(t)).join(", ") || "the engine does not say";
  }
  return listed(ran.map((kernel) => [
    [clip(kernel.type, 80), clip(kernel.primitive, 80),
      kernel.precision && `computes ${clip(kernel.precision, 20)}`,
      kernel.output_precision && `writes ${clip(kernel.output_precision, 20)}`].filter(Boolean).join(", "),
    html("div", { class: "quiet" }, code(kernel.name))]), MOST_SHOWN);
}

function nodeTable(segment) {
  return listed(segment.nodes.map((label, i) => [
    html("strong", null, clip(segment.op_types[i] ?? "", 60)), " ", code(label),
    segment.node_keys[i] !== undefined && !segment.node_keys[i].startsWith(label) &&
      html("div", { class: "quiet" }, code(segment.node_keys[i]))]), 8);
}

function tensor(one) {
  const range = ([low, high]) => `${plain(low)} to ${plain(high)}`;
  const far = one.relative_l2 === 0 ? "equal to the reference"
    : one.relative_l2 === null ? `not comparable: ${clip(one.mismatch ?? "values are not finite", 300)}`
      : `relative L2 ${error(one.relative_l2)}, max abs ${plain(one.max_abs)}, SQNR ${one.sqnr_db === null ? "∞" : one.sqnr_db.toFixed(1)} dB, cosine ${one.cosine === null ? NONE : one.cosine.toFixed(6)}`;
  return html("div", { class: "tensor" },
    html("p", null, html("span", { class: "quiet" }, `${one.role} `), code(one.name), " ",
      html("span", { class: "quiet" }, `${clip(one.dtype, 20)} ${dims(one.shape)}`)),
    facts(
      ["distance", far],
      ["reference", range(one.reference_range)],
      ["here", range(one.backend_range)]),
    one.relative_l2 !== 0 && one.histogram.some(Boolean) && histogram(one));
}

/** Elements by the size of their error, one column per bin of the record. */
function histogram({ histogram: counts, histogram_edges: edges }) {
  const column = 34;
  const height = 64;
  const total = counts.reduce((a, b) => a + b, 0);
  const most = Math.max(...counts);
  const power = (exponent) => {
    const whole = Math.floor(exponent);
    return `${(10 ** (exponent - whole)).toFixed(1)}e${whole}`;
  };
  const bins = counts.map((number, i) => {
    const span = i === 0 ? `below ${power(edges[1])}` : i === counts.length - 1
      ? `above ${power(edges[i])}` : `${power(edges[i])} to ${power(edges[i + 1])}`;
    return { number, said: `${span}: ${percent(number / total)}`, tall: number && Math.max((number / most) * height, 1) };
  });
  const columns = bins.map(({ number, said, tall }, i) => [
    svg("rect", { x: i * column + 2, y: 14 + height - tall, width: column - 4, height: tall }),
    svg("rect", { class: "hit", x: i * column, y: 0, width: column, height: height + 14 }, svg("title", null, said)),
    number > 0 && svg("text", { class: "tick", x: (i + 0.5) * column, y: 10 + height - tall, "text-anchor": "middle" },
      percent(number / total).replace(/\.\d+%/, "%")),
  ]);
  const ticks = edges.slice(1, -1).map((edge, i) => i % 2 === 0 && svg("text", {
    class: "tick", x: (i + 1) * column, y: height + 28, "text-anchor": "middle",
  }, power(edge)));
  return html("figure", null,
    svg("svg", {
      class: "histogram", viewBox: `0 0 ${counts.length * column} ${height + 32}`, role: "img",
      "aria-label": `Elements by error: ${bins.filter((b) => b.number).map((b) => b.said).join("; ")}`,
    }, columns, svg("path", { class: "grid", d: `M0 ${height + 14}H${counts.length * column}` }), ticks),
    html("figcaption", { class: "quiet" }, "Elements by |difference| over the reference's root mean square"));
}

// --- pictures -----------------------------------------------------------------------------------

// Of values: dark to bright, told apart in grey too (the stops of matplotlib's viridis).
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
// Of differences: the sign's colour, the more of it the larger; the page shows through where there is
// none, so that this reads on light and dark alike.
const BELOW = [47, 126, 216];
const ABOVE = [232, 113, 10];

/** Red, green, blue and opacity of a level of a value. */
function valueColour(level) {
  const at = ((level - 1) / 254) * (VIRIDIS.length - 1);
  const i = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return [...VIRIDIS[i].map((from, c) => from + (at - i) * (VIRIDIS[i + 1][c] - from)), 255];
}

/** The same of a difference; 128 is none. */
const differenceColour = (level) =>
  [...(level < 128 ? BELOW : ABOVE), Math.min(2 * Math.abs(level - 128), 255)];

/** A segment's output on both sides, and how they differ. */
function pictures({ picture }, finding) {
  if (!picture) {
    return finding && html("p", { class: "quiet" },
      "None kept: the audit was told so, the sides have other shapes, or other segments matter more.");
  }
  const { cells, size, range: [low, high], most_accumulated: whole, most_introduced: own } = picture;
  const values = `${plain(low)} to ${plain(high)}`;
  const reduced = cells[0] < size[0] || cells[1] < size[1];
  return [
    html("p", { class: "quiet" }, code(picture.tensor), ` ${clip(picture.plane, 60)}, ${dims(size)} values`,
      reduced && ` in ${dims(cells)} cells`, `, sample ${picture.sample}: where its own error is largest.`),
    html("div", { class: cells[1] > 3 * cells[0] ? "pictures wide" : "pictures" },
      [["reference", "reference", valueColour, values],
        ["deployed", "here", valueColour, values],
        ["accumulated", "difference", differenceColour, `at most ${error(whole)}`],
        ["introduced", "its own part", differenceColour, `at most ${error(own)}`],
      ].map(([key, title, colour, said]) => heatmap(picture[key], cells, colour, title, said))),
    html("p", { class: "quiet" }, html("i", { class: "swatch below" }), "less than the reference ",
      html("i", { class: "swatch above" }), "more", reduced && "; the largest in each cell",
      ". Its own part is what the segment makes of the inputs that it was given."),
  ];
}

/** Levels as a picture, a pixel for each cell. */
function heatmap(levels, [rows, columns], colour, title, range) {
  const cells = Array.from(atob(levels), (byte) => byte.charCodeAt(0));
  const said = cells.every((level) => !level) ? "NaN or infinite throughout"
    : range + (cells.includes(0) ? "; blank where NaN or infinite" : "");
  const canvas = html("canvas", { width: columns, height: rows, role: "img", "aria-label": `${title}: ${said}` });
  canvas.style.aspectRatio = `${columns} / ${Math.max(rows, columns / 16)}`; // a vector is a strip
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  cells.forEach((level, i) => { if (level) image.data.set(colour(level), 4 * i); });
  context.putImageData(image, 0, 0);
  return html("figure", null, canvas,
    html("figcaption", null, html("strong", null, title), html("br"), html("span", { class: "quiet" }, said)));
}
