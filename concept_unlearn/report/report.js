"use strict";
const data = held();
const [set, method, search, changed, list, count, more] =
  ["set", "method", "search", "changed", "examples", "count", "more"].map((id) => document.getElementById(id));
const PAGE = 25;
let limit = PAGE;

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function reply(model, name, i) {
  return model && model.said[name] ? model.said[name][i].trim() : undefined;
}

function metrics(model, name, i) {
  const values = model ? model.values[name] : {};
  return Object.keys(values).map((metric) => [metric, values[metric][i]]);
}

function differs(name, i, after) {
  if (!after) return false;
  const [was, is] = [reply(data.base, name, i), reply(after, name, i)];
  if (was !== undefined && is !== undefined) return was !== is;
  return JSON.stringify(metrics(data.base, name, i)) !== JSON.stringify(metrics(after, name, i));
}

function side(title, model, name, i, other) {
  const box = element("div");
  box.append(element("h4", title));
  const text = reply(model, name, i);
  if (text !== undefined) box.append(element("p", text || "(nothing)", text ? "reply" : "reply quiet"));
  const row = element("div", undefined, "values");
  const before = other ? Object.fromEntries(metrics(other, name, i)) : {};
  for (const [metric, value] of metrics(model, name, i)) {
    const isOther = metric in before && before[metric] !== value;
    row.append(element("span", `${metric.replaceAll("_", " ")} ${value === null ? "–" : value}`, isOther ? "other" : ""));
  }
  if (row.childElementCount) box.append(row);
  return box;
}

function example(name, i, after) {
  const [prompt, answers, isMessage] = data.sets[name][i];
  const item = element("li");
  if (prompt) item.append(element("p", prompt, "prompt"));
  const accepted = element("p", answers.join(" · "), prompt ? "quiet small" : "");
  item.append(accepted);
  const pair = element("div", undefined, "pair");
  pair.append(side(isMessage ? "before, as a message" : "before", data.base, name, i));
  if (after) {
    const box = side(`after, ${after.label}`, after, name, i, data.base);
    if (differs(name, i, after)) box.classList.add("changed");
    pair.append(box);
  }
  item.append(pair);
  return item;
}

function matches(name, i, after, words) {
  const [prompt, answers] = data.sets[name][i];
  const text = [prompt, ...answers, reply(data.base, name, i), reply(after, name, i)].join("\n").toLowerCase();
  return words.every((word) => text.includes(word));
}

function show() {
  const name = set.value, after = data.methods[method.value], words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const all = data.sets[name].map((_, i) => i);
  const found = all.filter((i) => matches(name, i, after, words) && (!changed.checked || differs(name, i, after)));
  list.replaceChildren(...found.slice(0, limit).map((i) => example(name, i, after)));
  count.textContent = `${found.length} of ${all.length} examples`;
  more.hidden = found.length <= limit;
}

// What the page holds; nothing where it was cut off or emptied on its way here.
function held() {
  try {
    const found = JSON.parse(document.getElementById("data").textContent);
    return found.sets ? found : null;
  } catch { return null; }
}

function begin() {
  for (const name of Object.keys(data.sets)) set.append(new Option(`${name} (${data.sets[name].length})`, name));
  data.methods.forEach((own, i) => method.append(new Option(own.label, i)));
  for (const control of [set, method, search, changed]) control.addEventListener("input", () => { limit = PAGE; show(); });
  more.addEventListener("click", () => {
    const first = list.childElementCount;
    limit += PAGE;
    show();
    list.children[first].tabIndex = -1;
    list.children[first].focus();
  });
  show();
}

if (data) begin();
else {
  count.textContent = "This copy of the page has lost its examples: the file was cut off or changed. They are in report.json beside it.";
  more.hidden = true;
  for (const control of [set, method, search, changed]) control.disabled = true;
}
