"use strict";
const data = held();
const [list, pane, search, only, order, count, tally] =
  ["list", "feature", "search", "only", "order", "count", "tally"].map((id) => document.getElementById(id));
const SVG = "http://www.w3.org/2000/svg";
const KEPT = data && `choice of ${data.dictionary} on ${data.scope}: ${data.features.map((f) => f.feature).join(" ")}`;
const decisions = new Map();
for (const [what, features] of Object.entries(data ? data.choice : {})) for (const f of features) decisions.set(f, what);
const begun = data && JSON.stringify(data.choice);
let shown = [], current = null;

// What the page holds; null where it was cut off or emptied on its way here.
function held() {
  try {
    const found = JSON.parse(document.getElementById("data").textContent);
    return found.features.length ? found : null;
  } catch { return null; }
}

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function drawn(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// Where the browser lets it, decisions outlive a reload.
function remember() {
  try { localStorage.setItem(KEPT, JSON.stringify([begun, [...decisions]])); } catch { /* a sandbox has no storage */ }
}

function recall() {
  try {
    const found = JSON.parse(localStorage.getItem(KEPT));
    if (!found || found[0] !== begun) return;
    decisions.clear();
    for (const [feature, what] of found[1]) decisions.set(feature, what);
  } catch { /* likewise */ }
}

const percent = (share) => share === 0 ? "0" : share < 0.0001 ? (100 * share).toExponential(0) + "%" : Number((100 * share).toPrecision(share > .99 ? 3 : 2)) + "%";
const visible = (text) => text.replace(/^ /, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
const signed = (value) => (value > 0 ? "+" : "") + value.toPrecision(2);

function yaml() {
  const rows = ["keep", "drop", "pinned"].map((what) => {
    const own = [...decisions].filter(([, found]) => found === what).map(([feature]) => feature);
    return `${what}: [${own.join(", ")}]\n`;
  });
  return rows.join("") + `dictionary: ${JSON.stringify(data.dictionary)}\n`;
}

function told() {
  const n = (what) => [...decisions.values()].filter((found) => found === what).length;
  tally.textContent = `${n("keep")} kept, ${n("drop")} dropped, ${n("pinned")} pinned`;
}

const texts = new Map((data ? data.features : []).map((f) => [f.feature, [
  String(f.feature), f.label || "", ...f.up.map((t) => t.text), ...f.down.map((t) => t.text),
  ...[f.forget, f.retain].flatMap((s) => s.contexts.map((c) => c.tokens.join(""))),
].join("\n").toLowerCase()]));

const ORDERS = {
  given: () => 0,
  ratio: (a, b) => ratio(b) - ratio(a),
  forget: (a, b) => b.forget.rate.value - a.forget.rate.value,
  retain: (a, b) => b.retain.rate.value - a.retain.rate.value,
  lost: (a, b) => lost(a, "forget") - lost(b, "forget"),
  cost: (a, b) => lost(a, "retain") - lost(b, "retain"),
};
const lost = (f, name) => f.effect ? f.effect[name].logprob : 0;
const ratio = (f) => f.forget.rate.value / (f.retain.rate.high || 1);

function relist() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  shown = data.features.filter((f) => words.every((word) => texts.get(f.feature).includes(word))
    && (!only.value || (decisions.get(f.feature) || "open") === only.value));
  if (order.value !== "given") shown.sort(ORDERS[order.value]);
  list.replaceChildren(...shown.map(row));
  count.textContent = `${shown.length} of ${data.features.length} features`;
  if (shown.length && !shown.includes(current)) show(shown[0]);
  mark();
}

// The tokens on which it fires most, each once: on what is to be forgotten, or else elsewhere.
function strongest(f) {
  const contexts = f.forget.contexts.length ? f.forget.contexts : f.retain.contexts;
  return [...new Set(contexts.map((c) => c.tokens[c.peak].trim()))];
}

function row(f) {
  const item = element("li"), button = element("button");
  button.type = "button";
  button.dataset.feature = f.feature;
  const about = f.label || (strongest(f).length ? strongest(f) : f.up.map((t) => t.text)).slice(0, 5).map((text) => visible(text.trim())).join(" ");
  button.append(element("b", f.feature), element("span", about, "top"), element("span", `${percent(f.forget.rate.value)} | ${percent(f.retain.rate.value)}`, "rates"));
  button.addEventListener("click", () => { show(f); mark(); });
  item.append(button);
  return item;
}

function mark() {
  for (const button of list.querySelectorAll("button")) {
    const feature = Number(button.dataset.feature);
    button.className = decisions.get(feature) || "";
    button.setAttribute("aria-current", String(current !== null && current.feature === feature));
  }
  const own = list.querySelector("[aria-current=true]");
  if (own) own.scrollIntoView({ block: "nearest" });
  told();
}

function decide(what) {
  if (!current) return;
  if (!what || decisions.get(current.feature) === what) decisions.delete(current.feature);
  else decisions.set(current.feature, what);
  remember();
  for (const button of pane.querySelectorAll(".decide [data-what]"))
    button.setAttribute("aria-pressed", String(decisions.get(current.feature) === button.dataset.what));
  mark();
}

function buttons(f) {
  const box = element("div", undefined, "decide");
  for (const [what, label, key] of [["keep", "Keep", "y"], ["drop", "Drop", "n"], ["pinned", "Pin", "p"]]) {
    const button = element("button", label);
    button.type = "button";
    button.title = `${key} on the keyboard`;
    button.dataset.what = what;
    button.style.setProperty("--own", `var(--${what})`);
    button.setAttribute("aria-pressed", String(decisions.get(f.feature) === what));
    button.addEventListener("click", () => decide(what));
    box.append(button);
  }
  box.prepend(step("‹", -1, "k"));
  box.append(step("›", 1, "j"));
  return box;
}

function step(text, by, key) {
  const button = element("button", text, "step");
  button.type = "button";
  button.title = `${key} on the keyboard`;
  button.setAttribute("aria-label", by > 0 ? "Next feature" : "Previous feature");
  button.addEventListener("click", () => move(by));
  return button;
}

function rates(f) {
  const box = element("section");
  box.append(element("h3", "Fires on"));
  for (const name of ["forget", "retain"]) {
    const rate = f[name].rate, line = element("p", undefined, `rate ${name}`);
    line.append(element("span", name, "name"), element("b", percent(rate.value)),
      element("span", `${percent(rate.low)} to ${percent(rate.high)}`, "quiet small"));
    line.title = `95 % interval over ${rate.passages} passages; ${rate.fired} of ${rate.tokens} tokens`;
    box.append(line);
  }
  box.append(element("p", `${f.forget.rate.fired} and ${f.retain.rate.fired} tokens. A unit of it writes a vector of length ${f.norm}.`, "quiet small"), ...similar(f));
  return box;
}

function density(f) {
  const box = element("section"), n = f.edges.length - 1;
  box.append(element("h3", "How strongly, where it fires"));
  const width = 340, height = 84, base = 64, svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Share of firing tokens by activation, on a logarithmic scale" });
  const share = (side) => side.density.map((c) => c / Math.max(side.rate.fired, 1));
  const sides = [["forget", share(f.forget)], ["retain", share(f.retain)]], most = Math.max(...sides.flatMap(([, s]) => s), 1e-9);
  const step = Math.min(width / n, 40);
  sides.forEach(([name, values], j) => values.forEach((value, i) => {
    const tall = base * value / most;
    const bar = drawn("rect", { x: i * step + j * step * .45 + 1, y: base - tall, width: step * .42, height: tall, fill: `var(--${name})` });
    const title = drawn("title", {});
    title.textContent = `${f.edges[i]} to ${f.edges[i + 1]}: ${f[name].density[i]} ${name} tokens`;
    bar.append(title);
    svg.append(bar);
  }));
  svg.append(drawn("path", { d: `M0 ${base + .5}H${n * step}`, stroke: "currentColor", opacity: .3 }));
  const every = Math.max(1, Math.ceil(46 / step));
  f.edges.forEach((value, i) => {
    if (i % every || (i > n - every / 2 && i !== n)) return;
    const label = drawn("text", { x: Math.min(i * step, width - 14), y: height - 4, "font-size": 11, fill: "currentColor", opacity: .7, "text-anchor": i ? "middle" : "start" });
    label.textContent = Number(value.toPrecision(2));
    svg.append(label);
  });
  box.append(svg);
  return box;
}

// What suppressing it alone does: nats that a right answer loses, and questions it still gets right.
function alone(f) {
  const box = element("section"), { kind, ...rest } = f.effect.edit;
  const how = Object.entries(rest).filter(([name, value]) => value !== null && !(name === "above" && value === 0))
    .map(([name, value]) => `${name.replaceAll("_", " ")} ${value.of_norm === undefined ? value : `${value.of_norm} of the norm`}`);
  box.append(element("h3", `Suppressed alone: ${[kind.replaceAll("_", " "), ...how].join(" ")}`));
  for (const name of ["forget", "retain"]) {
    const own = f.effect[name], line = element("p", undefined, `rate ${name}`);
    const right = own.before === null ? "" : `, right ${percent(own.before)} → ${percent(own.after)}`;
    line.append(element("span", name, "name"), element("b", own.touched ? signed(own.logprob) : "0"),
      element("span", `${own.touched ? `± ${(1.96 * own.error).toPrecision(2)} ` : ""}nats${right}`, "quiet small"));
    line.title = `mean change of the log-probability of a right answer; ${own.touched} of ${own.questions} questions touched`;
    box.append(line);
  }
  box.append(element("p", `It touches ${f.effect.forget.touched} of ${f.effect.forget.questions} questions of the concept, and ${f.effect.retain.touched} of ${f.effect.retain.questions} others.`, "quiet small"));
  return box;
}

function title(f) {
  const box = element("div"), heading = element("h2", `Feature ${f.feature}`);
  box.append(heading);
  if (f.label) {
    const label = element("p", f.label, "label");
    label.title = `as ${data.labeller} says`;
    label.append(element("span", ` says ${data.labeller}`, "quiet small"));
    box.append(label);
  }
  if (data.neuronpedia) {
    const link = element("a", "on Neuronpedia", "small");
    link.href = `${data.neuronpedia}/${f.feature}`;
    link.target = "_blank";
    link.rel = "noopener noreferrer";
    heading.append(" ", link);
  }
  return box;
}

function chips(title, tokens) {
  const box = element("div");
  box.append(element("h3", title));
  const own = element("div", undefined, "chips");
  for (const { text, logit } of tokens) {
    const chip = element("span", visible(text), "chip");
    chip.append(element("small", signed(logit)));
    own.append(chip);
  }
  box.append(own);
  return box;
}

function writes(f) {
  const box = element("section");
  if (!f.norm) box.append(element("p", "Its decoder row is zero: it writes nothing, and no edit of it does anything.", "note"));
  else if (data.has_lens) box.append(chips("Raises", f.up), chips("Lowers", f.down));
  else box.append(element("p", "It writes where the unembedding does not read.", "quiet small"));
  return box;
}

function similar(f) {
  const heading = element("h3", "Writes most like");
  heading.style.marginTop = ".9rem";
  const own = element("div", undefined, "chips"), here = new Map(data.features.map((g) => [g.feature, g]));
  for (const { feature, cosine } of f.nearest) {
    const known = here.get(feature), chip = element(known ? "button" : "span", feature, "chip");
    if (known) { chip.type = "button"; chip.addEventListener("click", () => { show(known); mark(); }); }
    chip.append(element("small", cosine.toFixed(2)));
    own.append(chip);
  }
  if (!f.nearest.length) own.append(element("span", "nothing", "quiet small"));
  return [heading, own];
}

function context(found, largest) {
  const box = element("div", undefined, "context"), where = element("div", undefined, "where"), text = element("p");
  where.append(element("b", found.acts[found.peak]), element("span", `${found.part} passage ${found.passage + 1}, token ${found.position + 1}`, found.part === "near" ? "near" : ""));
  found.tokens.forEach((token, i) => {
    if (!found.acts[i]) return text.append(token);
    const own = element("span", token, i === found.peak ? "peak" : "");
    own.style.setProperty("--a", Math.max(.12, found.acts[i] / largest));
    own.title = `${found.acts[i]}`;
    text.append(own);
  });
  box.append(where, text);
  return box;
}

function side(f, name, title, largest) {
  const box = element("section", undefined, name), heading = element("h3", title, "name");
  box.append(heading, ...f[name].contexts.map((c) => context(c, largest)));
  if (!f[name].contexts.length)
    box.append(element("p", f[name].rate.fired ? "It fires only on what every chat begins with." : "It never fires here.", "quiet"));
  return box;
}

function middle(f, fires) {
  const parts = [...(fires ? [density(f)] : []), ...(f.effect ? [alone(f)] : [])], box = element("div", undefined, "stack");
  box.append(...parts);
  return parts.length ? [box] : [];
}

function show(f) {
  current = f;
  const head = element("div", undefined, "head"), facts = element("div", undefined, "facts"), sides = element("div", undefined, "sides");
  head.append(title(f), buttons(f));
  const largest = Math.max(...["forget", "retain"].flatMap((name) => f[name].contexts.map((c) => c.acts[c.peak])), 1e-9);
  const fires = f.edges.length > 0;
  facts.append(rates(f), ...middle(f, fires), writes(f));
  sides.append(side(f, "forget", "On what is to be forgotten", largest), side(f, "retain", "On what is to be kept", largest));
  const parts = [head];
  if (!fires) parts.push(element("p", "It never fires on this scope: there is nothing to see of it, and an edit of an active feature does nothing here.", "note"));
  pane.replaceChildren(...parts, facts, sides);
  pane.scrollTop = 0;
}

function move(by) {
  if (!shown.length) return;
  const i = shown.indexOf(current);
  show(shown[Math.min(Math.max(i + by, 0), shown.length - 1)]);
  mark();
}

const KEYS = {
  j: () => move(1), k: () => move(-1), y: () => decide("keep"), n: () => decide("drop"), p: () => decide("pinned"), u: () => decide(null),
  "/": () => search.focus(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === search) {
    if (event.key === "Escape" || event.key === "Enter") search.blur();
    return;
  }
  if (!data || event.target instanceof HTMLSelectElement || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
});

for (const control of [search, only, order]) control.addEventListener("input", relist);
document.getElementById("save").addEventListener("click", () => {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([yaml()], { type: "application/yaml" }));
  link.download = "choice.yaml";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
document.getElementById("copy").addEventListener("click", async (event) => {
  const button = event.currentTarget, was = button.textContent;
  try { await navigator.clipboard.writeText(yaml()); button.textContent = "Copied"; } catch { window.prompt("The choice as YAML", yaml()); }
  setTimeout(() => { button.textContent = was; }, 1200);
});
if (data) {
  for (const option of order.querySelectorAll("[data-effect]")) option.hidden = option.disabled = !data.features.some((f) => f.effect);
  recall();
  relist();
} else {
  pane.replaceChildren(element("p", "This copy of the page has lost what it should show: the file was cut off or changed. Make it anew with concept-unlearn inspect, or in Python with Inspection.load(folder).save(folder).", "note"));
  for (const control of document.querySelectorAll("button, input, select")) control.disabled = true;
}
