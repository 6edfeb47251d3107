"use strict";
// The live page: one document arrives twice a second and everything is drawn from it.

const PARTS = ["queue", "prefill", "transfer", "decode_queue", "first_step", "decode"];
const ROLES = ["prefill", "decode", "mixed"];
const NAMES = { handoff: "hand-off", migration: "migration", failover: "failover" };
const MOST_DOTS = 12;
const RATE_STEPS = 5;
const RETRY_MS = 2000;
const SVG = "http://www.w3.org/2000/svg";

const calm = matchMedia("(prefers-reduced-motion: reduce)");
const byId = (id) => document.getElementById(id);
let seenMoves = null;
let shown = null;
let detailOf = null;

// Small helpers.

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function draw(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Rows are kept by key, so that focus and selection survive a refresh.
function keyed(parent, items, key, create, update) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = key(item);
    let child = old.get(name);
    if (child === undefined) {
      child = create(item);
      child.dataset.key = name;
    }
    old.delete(name);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
    update(child, item);
  }
  for (const child of old.values()) child.remove();
}

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 0.1) return `${(value * 1e3).toFixed(1)} ms`;
  if (value < 1) return `${(value * 1e3).toFixed(0)} ms`;
  return `${value.toFixed(2)} s`;
}

function number(value, digits = 1) {
  if (value === null || value === undefined) return "–";
  return value >= 100 ? Math.round(value).toLocaleString("en") : value.toFixed(digits);
}

// On an axis 50.0 ms is 50 ms.
const tick = (unit, value) => unit(value).replace(/\.0+(?=\D|$)/, "");

const percent = (value) =>
  value === null || value === undefined ? "–" : `${(value * 100).toFixed(value < 0.9995 ? 1 : 0)}%`;

// Now.

function tiles(state) {
  const last = state.history.slice(-RATE_STEPS);
  const recent = (read) => last.reduce((sum, point) => sum + read(point), 0) / Math.max(last.length, 1);
  const attainment = state.observed.attainment;
  const missed = attainment !== null && attainment < state.slo.attainment;
  const facts = [
    ["running", String(state.totals.running)],
    ["waiting", String(state.totals.waiting)],
    ["ended", state.totals.requests.toLocaleString("en")],
    ["requests/s", number(recent((point) => point.rate_rps))],
    ["tokens/s", number(recent((point) => point.tokens_s), 0)],
    ["within targets", percent(attainment), missed],
    ["failed", String(state.totals.failed), state.totals.failed > 0],
    ["migrations", String(state.totals.migrations)],
    ["failovers", String(state.totals.failovers)],
  ];
  keyed(byId("tiles"), facts, (fact) => fact[0],
    (fact) => make("div", {}, make("dt", {}, fact[0]), make("dd", { "data-fact": fact[0] })),
    (tile, [, value, bad]) => {
      setText(tile.lastElementChild, value);
      tile.lastElementChild.className = bad ? "bad" : "";
    });
}

// Pools.

function pools(state) {
  const present = ROLES.filter((role) => role !== "mixed" || state.instances.some((one) => one.role === "mixed"))
    .filter((role) => state.instances.length === 0 || state.instances.some((one) => one.role === role));
  const parent = byId("pools");
  keyed(parent, present, (role) => role,
    (role) => make("div", { class: "pool" },
      make("h3", {}, role, make("span")), make("div", { class: "instances" })),
    (pool, role) => {
      const members = state.instances.filter((one) => one.role === role);
      setText(pool.querySelector("h3 span"),
        members.length === 1 ? "1 instance" : `${members.length} instances`);
      keyed(pool.querySelector(".instances"), members, (one) => one.id, instanceCard, fillInstance);
    });
}

function instanceCard(one) {
  const facts = ["queue", "batch", "step"].map((name) =>
    make("div", {}, make("dt", {}, name), make("dd", { "data-fact": name })));
  return make("article", { class: "instance", "data-instance": one.id, "aria-label": one.id },
    make("h4", {}, one.id, make("span")),
    make("dl", {}, ...facts),
    make("div", { class: "kv", role: "img" },
      make("i", { class: "used" }), make("i", { class: "pinned" }), make("i", { class: "cached" })),
    make("p", { class: "soft", "data-fact": "kv" }));
}

function fillInstance(card, one) {
  card.dataset.state = one.state;
  setText(card.querySelector("h4 span"), one.state === "ready" ? "" : one.state);
  const facts = { queue: String(one.queue_requests), batch: String(one.running_sequences), step: seconds(one.step_s || null) };
  for (const [name, value] of Object.entries(facts)) {
    setText(card.querySelector(`[data-fact="${name}"]`), value);
  }
  const bar = card.querySelector(".kv");
  const share = (blocks) => `${(100 * blocks / Math.max(one.blocks.total, 1)).toFixed(1)}%`;
  const label = `KV: ${share(one.blocks.used)} used, ${share(one.blocks.pinned)} pinned, ${share(one.blocks.cached)} cached of ${one.blocks.total} blocks`;
  bar.setAttribute("aria-label", label);
  bar.title = label;
  setText(card.querySelector('[data-fact="kv"]'), `KV ${share(one.blocks.used)} used, ${share(one.blocks.cached)} cached`);
  for (const kind of ["used", "pinned", "cached"]) {
    bar.querySelector(`.${kind}`).style.width = share(one.blocks[kind]);
  }
}

// Moves fly from card to card; without motion, the cards light up.

function fly(moves) {
  const fresh = seenMoves === null ? [] : moves.filter((move) => !seenMoves.has(move.id));
  seenMoves = new Set(moves.map((move) => move.id));
  for (const move of fresh.slice(-MOST_DOTS)) {
    const source = card(move.source), target = card(move.target);
    if (target === null) continue;
    target.classList.add("touched");
    setTimeout(() => target.classList.remove("touched"), 700);
    if (source !== null && source !== target && !calm.matches) flyDot(move.kind, source, target);
  }
}

const card = (id) => document.querySelector(`[data-instance="${CSS.escape(id)}"]`);

function flyDot(kind, source, target) {
  const parent = byId("flights"), frame = parent.getBoundingClientRect();
  const middle = (element) => {
    const box = element.getBoundingClientRect();
    return `translate(${box.left - frame.left + box.width / 2 - 5}px, ${box.top - frame.top + box.height / 2 - 5}px)`;
  };
  const dot = make("i", { class: `dot ${kind}` });
  parent.append(dot);
  dot.animate([{ transform: middle(source) }, { transform: middle(target) }],
    { duration: 900, easing: "ease-in-out", fill: "both" }).finished.finally(() => dot.remove());
}

function moveList(moves, now) {
  byId("no-moves").hidden = moves.length > 0;
  keyed(byId("moves"), moves.slice().reverse(), (move) => move.id,
    (move) => make("li", { class: move.kind }, make("i", { class: `dot ${move.kind}` }),
      make("span", {}, `${NAMES[move.kind]} ${move.source} → ${move.target}${moveOutcome(move)}`),
      opener(move.request), make("span", { class: "soft" })),
    (row, move) => setText(row.lastElementChild, ago(now - move.at_s)));
}

function ago(value) {
  if (value < 1) return "now";
  return value < 100 ? `${Math.round(value)} s ago` : `${Math.round(value / 60)} min ago`;
}

function moveOutcome(move) {
  if (move.outcome !== "committed") return `: ${move.outcome}`;
  return move.pause_s === undefined ? "" : `, paused ${seconds(move.pause_s)}`;
}

// Plots over time.

const CHARTS = [
  { id: "ttft", title: "Time to first token", unit: seconds, goal: (s) => s.slo.ttft_s,
    lines: [["p50", (p) => p.ttft_s.p50], ["p99", (p) => p.ttft_s.p99]] },
  { id: "tpot", title: "Time per output token", unit: seconds, goal: (s) => s.slo.tpot_s,
    lines: [["p50", (p) => p.tpot_s.p50], ["p99", (p) => p.tpot_s.p99]] },
  { id: "attainment", title: "Within targets", unit: percent, top: 1, goal: (s) => s.slo.attainment,
    lines: [["share", (p) => p.attainment]] },
  { id: "tokens", title: "Tokens per second", unit: (v) => number(v, 0), lines: [["tokens/s", (p) => p.tokens_s]] },
];
const W = 300, H = 130, LEFT = 46, RIGHT = 6, TOP = 8, BOTTOM = 16, SPAN_S = 300;

function charts(state) {
  keyed(byId("charts"), CHARTS, (chart) => chart.id,
    (chart) => make("figure", { id: `chart-${chart.id}` }, make("figcaption"), make("div")),
    (figure, chart) => drawChart(figure, chart, state));
}

function drawChart(figure, chart, state) {
  const lines = chart.lines.map(([name, read]) => ({
    name,
    points: state.history.map((point) => [point.at_s - state.now_s, read(point)]).filter(([, value]) => value !== null),
  }));
  const goal = chart.goal?.(state);
  const highest = Math.max(...lines.flatMap((line) => line.points.map(([, value]) => value)), 0);
  const top = chart.top ?? ceiling(Math.max(highest, goal !== undefined && (highest === 0 || highest > goal / 3) ? goal * 1.1 : 0));
  const x = (at) => (LEFT + (W - LEFT - RIGHT) * (1 + Math.max(at, -SPAN_S) / SPAN_S)).toFixed(1);
  const y = (value) => (H - BOTTOM - (H - TOP - BOTTOM) * Math.min(value / top, 1)).toFixed(1);
  const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": summary(chart, lines) });
  for (const share of [0, 0.5, 1]) {
    svg.append(draw("line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: y(top * share), y2: y(top * share) }));
    svg.append(draw("text", { x: LEFT - 5, y: Number(y(top * share)) + 3, "text-anchor": "end" }, tick(chart.unit, top * share)));
  }
  svg.append(draw("text", { x: LEFT, y: H - 3 }, "5 min ago"), draw("text", { x: W - RIGHT, y: H - 3, "text-anchor": "end" }, "now"));
  if (goal !== undefined && goal <= top) {
    svg.append(draw("line", { class: "goal", x1: LEFT, x2: W - RIGHT, y1: y(goal), y2: y(goal) }));
  }
  lines.forEach((line, place) => svg.append(...strokes(line.points, place, x, y)));
  figure.lastElementChild.replaceChildren(svg);
  const latest = lines.map((line, place) => make("span", { class: lines.length > 1 ? `key${place}` : null }, `${line.name} ${chart.unit(line.points.at(-1)?.[1] ?? null)}`));
  const target = goal === undefined ? [] : [make("span", { class: "goal-key" }, `target ${tick(chart.unit, goal)}`)];
  figure.firstElementChild.replaceChildren(make("div", {}, chart.title, ...target), make("span", {}, ...latest));
}

// A gap in the data is a gap in the line; a lone point is a dot.
function strokes(points, place, x, y) {
  const runs = [];
  for (const [at, value] of points) {
    const run = runs.at(-1);
    if (run !== undefined && at - run.at(-1)[0] < 5) run.push([at, value]);
    else runs.push([[at, value]]);
  }
  return runs.map((run) => run.length === 1
    ? draw("circle", { class: `line${place}`, cx: x(run[0][0]), cy: y(run[0][1]), r: 1.8 })
    : draw("polyline", { class: `line${place}`, points: run.map(([at, value]) => `${x(at)},${y(value)}`).join(" ") }));
}

function ceiling(value) {
  if (value <= 0) return 10;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 8, 10].map((m) => m * power).find((step) => step >= value * 0.999);
}

function summary(chart, lines) {
  const now = lines.map((line) => `${line.name} ${chart.unit(line.points.at(-1)?.[1] ?? null)}`);
  return `${chart.title}, latest: ${now.join(", ")}`;
}

// The plan's prediction beside what is observed.

const COMPARED = [
  ["time to first token, p50", (f) => f.ttft_s?.p50, seconds, 1], ["time to first token, p90", (f) => f.ttft_s?.p90, seconds, 1],
  ["time to first token, p99", (f) => f.ttft_s?.p99, seconds, 1], ["time per token, p50", (f) => f.tpot_s?.p50, seconds, 1],
  ["time per token, p90", (f) => f.tpot_s?.p90, seconds, 1], ["time per token, p99", (f) => f.tpot_s?.p99, seconds, 1],
  ["within targets", (f) => f.attainment, percent, -1], ["requests per second", (f) => f.rate_rps, number, 0],
  ["tokens per second", (f) => f.throughput_tokens_s, number, 0],
];

function plan(state) {
  byId("no-plan").hidden = state.predicted !== null;
  byId("plan").classList.toggle("alone", state.predicted === null);
  keyed(byId("plan").tBodies[0], COMPARED, (row) => row[0],
    (row) => make("tr", {}, make("th", { scope: "row" }, row[0]), make("td"), make("td")),
    (row, [, read, unit, worse]) => {
      const predicted = state.predicted === null ? null : read(state.predicted) ?? null;
      const observed = read(state.observed) ?? null;
      setText(row.children[1], unit(predicted));
      setText(row.children[2], unit(observed));
      const off = predicted && observed !== null ? worse * (observed / predicted - 1) : 0;
      row.children[2].className = off > 0.25 ? "worse" : off < -0.25 ? "better" : "";
      row.children[2].title = Math.abs(off) > 0.25 ? `more than 25% ${off > 0 ? "worse" : "better"} than predicted` : "";
    });
}

function parts(state) {
  const means = PARTS.slice(0, 5).map((name) => [name, state.observed.ttft_parts_s[name] ?? 0]);
  const total = means.reduce((sum, [, value]) => sum + value, 0);
  const label = means.map(([name, value]) => `${name.replace("_", " ")} ${seconds(value)}`).join(", ");
  const bar = make("div", { class: "bar", role: "img", "aria-label": label });
  for (const [place, [, value]] of means.entries()) {
    const piece = make("i", { class: `part${place}` });
    piece.style.width = total > 0 ? `${100 * value / total}%` : "0";
    bar.append(piece);
  }
  const list = make("ul", { class: "parts" }, ...means.map(([name, value], place) =>
    make("li", {}, make("i", { class: `part${place}` }), `${name.replace("_", " ")} `, make("span", { class: "soft" }, total > 0 ? seconds(value) : "–"))));
  byId("parts").replaceChildren(bar, list);
}

// Requests and the timeline of one.

function requests(state) {
  table("running", state.requests, (one) => [one.at ?? "waiting", `${one.prompt_tokens} + ${one.output_tokens}`,
    seconds(Math.max(state.now_s - one.arrived_s, 0))]);
  table("ended", state.ended, (one) => [one.at ?? "–", `${one.prompt_tokens} + ${one.output_tokens}`,
    seconds(one.ttft_s), seconds(one.tpot_s), one.error ?? one.outcome]);
  for (const [place, one] of state.ended.entries()) {
    byId("ended").tBodies[0].rows[place].lastElementChild.className = one.met ? "good" : one.outcome === "abort" ? "soft" : "bad";
  }
}

function table(id, rows, texts) {
  byId(`no-${id}`).hidden = rows.length > 0;
  keyed(byId(id).tBodies[0], rows, (one) => one.id,
    (one) => make("tr", {}, make("td", {}, opener(one.id)), ...texts(one).map(() => make("td"))),
    (row, one) => texts(one).forEach((text, place) => setText(row.children[place + 1], text)));
}

function opener(id) {
  const button = make("button", { type: "button", title: id }, id);
  button.addEventListener("click", () => openDetail(id));
  return button;
}

function openDetail(id) {
  detailOf = id;
  setText(byId("detail-title"), id);
  const moves = shown.moves.filter((move) => move.request === id);
  byId("detail-body").replaceChildren(make("p", { class: "soft" }, "It ended a while ago: only its moves are still known."), moveLines({ moves }));
  fillDetail();
  byId("detail").showModal();
}

function fillDetail() {
  const one = shown.ended.find((ended) => ended.id === detailOf) ?? shown.requests.find((running) => running.id === detailOf);
  if (one === undefined) return;
  byId("detail-body").replaceChildren(facts(one), gantt(one.phases), moveLines(one));
}

function facts(one) {
  const against = (value, target) => make("dd", { class: value > target ? "bad" : null }, seconds(value),
    make("span", { class: "soft" }, ` of ${tick(seconds, target)}`));
  const rows = [
    ["where", make("dd", {}, one.at ?? "waits at the gateway")],
    ["prompt + output", make("dd", {}, `${one.prompt_tokens} + ${one.output_tokens}`)],
    ["first token", against(one.ttft_s, one.slo.ttft_s)],
  ];
  if (one.outcome !== undefined) {
    rows.push(["per token", against(one.tpot_s, one.slo.tpot_s)], ["whole", make("dd", {}, seconds(one.e2e_s))],
      ["outcome", make("dd", { class: one.met ? "good" : "bad" }, one.error ?? one.outcome)]);
  }
  return make("dl", { class: "facts" }, ...rows.map(([name, value]) => make("div", {}, make("dt", {}, name), value)));
}

function gantt(phases) {
  const chart = make("div", { class: "gantt" });
  const end = Math.max(...phases.map((phase) => phase.end_s), 1e-9);
  for (const phase of phases) {
    const bar = make("i", { class: PARTS.includes(phase.name) ? `part${PARTS.indexOf(phase.name)}` : "open" });
    bar.style.left = `${100 * phase.start_s / end}%`;
    bar.style.width = `${100 * (phase.end_s - phase.start_s) / end}%`;
    chart.append(make("span", {}, phase.name.replaceAll("_", " ")), make("span", { class: "track" }, bar), make("span", {}, seconds(phase.end_s - phase.start_s)));
  }
  return chart;
}

function moveLines(one) {
  return make("ul", {}, ...one.moves.map((move) =>
    make("li", {}, `${NAMES[move.kind]} ${move.source} → ${move.target}: ${move.outcome}`
      + (move.why ? ` (${move.why})` : "") + (move.pause_s === undefined ? "" : `, paused ${seconds(move.pause_s)}`))));
}

// The stream.

function show(state) {
  shown = state;
  setText(byId("model"), state.model);
  sayGateways(state.gateways);
  tiles(state);
  pools(state);
  charts(state);
  plan(state);
  parts(state);
  requests(state);
  moveList(state.moves, state.now_s);
  fly(state.moves);
  if (byId("detail").open) fillDetail();
}

function sayGateways(gateways) {
  const silent = gateways.filter((one) => !one.answers).map((one) => one.id);
  const text = silent.length > 0 ? `${silent.join(", ")} ${silent.length > 1 ? "do" : "does"} not answer`
    : gateways.length > 1 ? `${gateways.length} gateways` : "";
  setText(byId("gateways"), text);
  byId("gateways").className = silent.length > 0 ? "bad" : "soft";
}

function say(state, text) {
  byId("link").dataset.state = state;
  setText(byId("link"), text);
}

async function follow() {
  const key = sessionStorage.getItem("tandem-key");
  const headers = key === null ? {} : { authorization: `Bearer ${key}` };
  const answer = await fetch("dashboard/stream", { headers });
  if (answer.status === 401 || answer.status === 403) return askKey(key !== null);
  if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
  byId("key").hidden = true;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return again("the server closed the stream");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    if (events.length > 0) {
      show(JSON.parse(events.at(-1).slice("data: ".length)));
      say("live", "live");
    }
  }
}

function again(why) {
  say("lost", `${why}; trying again`);
  setTimeout(start, RETRY_MS);
}

function askKey(wasWrong) {
  say("waiting", "a key is needed");
  setText(byId("key-error"), wasWrong ? "This key was not accepted." : "");
  byId("key").hidden = false;
  byId("key-text").focus();
}

function start() {
  follow().catch(() => again("no connection"));
}

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("tandem-key", byId("key-text").value);
  start();
});
byId("detail").addEventListener("click", (event) => {
  if (event.target === byId("detail")) byId("detail").close();
});
byId("detail").addEventListener("close", () => { detailOf = null; });
start();
