"use strict";
// Any two rows beside each other. All text goes in by textContent: names are names, never markup.
const { rows, metrics, pairs } = JSON.parse(document.getElementById("rows").textContent);
const form = document.getElementById("choose");
const place = document.getElementById("compared");
const [first, second] = [document.getElementById("a"), document.getElementById("b")];

for (const select of [first, second]) {
  const groups = new Map();
  rows.forEach((row, i) => {
    if (!groups.has(row.group)) {
      const group = document.createElement("optgroup");
      group.label = row.group;
      groups.set(row.group, group);
      select.append(group);
    }
    groups.get(row.group).append(new Option(row.name, String(i)));
  });
  select.addEventListener("change", show);
}

// Papers print two decimals of a percent; measured scores have intervals of whole percents, so one is enough.
const decimals = (row) => (row.page === null ? 2 : 1);
const number = (value, metric, digits) => {
  if (value === null || value === undefined) return "–";
  return metric.share ? (100 * value).toFixed(digits) : value.toPrecision(3);
};
const signed = (value, metric, digits) => (value > 0 ? "+" : "") + number(value, metric, digits);

function line(body, heading, cells, head = false) {
  const row = body.insertRow();
  const th = document.createElement("th");
  th.scope = head ? "col" : "row";
  th.textContent = heading;
  row.append(th);
  for (const text of cells) {
    const cell = head ? document.createElement("th") : row.insertCell();
    if (head) row.append(cell), (cell.scope = "col");
    cell.className = "num";
    cell.textContent = text;
  }
}

function difference(a, b, name) {
  const metric = metrics[name];
  const digits = Math.min(decimals(a), decimals(b));
  const [x, y] = [a.metrics[name], b.metrics[name]];
  if (!x || !y) return ["–", "not in both"];
  const paired = pairs[`${a.key} ${b.key}`]?.[name] ?? pairs[`${b.key} ${a.key}`]?.[name]?.map((v, i) => (i < 3 ? -v : v));
  if (paired) {
    const [value, ...ends] = paired.slice(0, 3);
    const [low, high] = ends.sort((p, q) => p - q);
    const verdict = low > 0 || high < 0 ? "apart" : "not apart";
    return [`${signed(value, metric, digits)} [${signed(low, metric, digits)}, ${signed(high, metric, digits)}]`, `${verdict}, paired on ${paired[3]} prompts`];
  }
  const value = signed(x[0] - y[0], metric, digits);
  if (a.group !== b.group) return [value, "not comparable: other prompts or evaluators"];
  if (!a.ranked || !b.ranked) return [value, "not comparable: incomplete"];
  if (x[1] === null || y[1] === null) return [value, "no interval"];
  return [value, x[2] < y[1] || y[2] < x[1] ? "apart, intervals share no point" : "not apart, intervals overlap"];
}

function show() {
  const [a, b] = [rows[Number(first.value)], rows[Number(second.value)]];
  const table = document.createElement("table");
  const body = table.createTBody();
  const interval = (row, name) => {
    const [m, metric, digits] = [row.metrics[name], metrics[name], decimals(row)];
    if (!m) return "–";
    const ends = m[1] === null ? "" : ` [${number(m[1], metric, digits)}, ${number(m[2], metric, digits)}]`;
    return number(m[0], metric, digits) + ends;
  };
  line(table.createTHead(), "", [a.name, b.name, "First minus second", ""], true);
  const plain = (value) => (value === null ? "–" : String(Number(value.toPrecision(4))));
  line(body, "Effective NFE", [plain(a.nfe), plain(b.nfe), "", ""]);
  line(body, "Forward passes", [plain(a.passes), plain(b.passes), "", ""]);
  line(body, "Seconds / video", [plain(a.seconds), plain(b.seconds), "", a.device && a.device !== b.device ? "other device" : ""]);
  for (const name of Object.keys(metrics)) {
    if (a.metrics[name] || b.metrics[name]) {
      const metric = metrics[name];
      const cells = [interval(a, name), interval(b, name), ...difference(a, b, name)];
      line(body, metric.label + (metric.share ? ", %" : "") + (metric.better === "lower" ? " ↓" : ""), cells);
    }
  }
  const scroll = document.createElement("div");
  scroll.className = "scroll";
  scroll.append(table);
  place.replaceChildren(scroll);
}

if (rows.length > 1) {
  form.hidden = false;
  second.value = "1";
  show();
} else {
  place.textContent = "There is only one row.";
}
