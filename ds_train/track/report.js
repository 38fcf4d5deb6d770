// Hover and touch: the values under the pointer, and the same place on every other chart.
const data = JSON.parse(document.getElementById("data").textContent);
const markers = data.markers;
const ids = Object.keys(data).filter((key) => key !== "markers");
const charts = ids.map((id) => ({...data[id], area: document.querySelector(`#${id} .area`)}));

// toPrecision writes a thousand as 1.00e+3.
function three(value) {
  return Math.abs(value) >= 999.5 ? value.toFixed(0) : value.toPrecision(3);
}

function shown(value, unit) {
  if (unit === "%") return `${(100 * value).toPrecision(3)} %`;
  if (unit === "MB") return value >= 1024 ? `${three(value / 1024)} GB` : `${three(value)} MB`;
  if (unit === "ms") return value >= 1000 ? `${three(value / 1000)} s` : `${three(value)} ms`;
  return Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return x - xs[low] < xs[high] - x ? low : high;
}

function clear() {
  document.querySelectorAll(".tip").forEach((tip) => tip.remove());
  charts.forEach(({area}) => { area.querySelector(".cross").style.display = "none"; });
}

function line(color, name, value) {
  const [row, key, label, number] = ["div", "i", "span", "b"].map((tag) => document.createElement(tag));
  row.className = "row";
  key.className = "key";
  key.style.background = `var(--c${color})`;
  label.textContent = name;
  number.textContent = value;
  row.append(key, label, number);
  return row;
}

function show(chart, share) {
  clear();
  const at = chart.x[0] + share * (chart.x[1] - chart.x[0]);
  charts.forEach(({area}) => {
    Object.assign(area.querySelector(".cross").style, {display: "block", left: `${100 * share}%`});
  });
  const tip = document.createElement("div");
  tip.className = "tip";
  const axis = chart.area.parentElement.querySelector(".axis").textContent;
  const counted = axis === "step" || axis === "tokens";
  tip.append(`${axis} ${shown(counted ? Math.round(at) : at, "")}`);
  const slack = 0.02 * (chart.x[1] - chart.x[0]);
  for (const {name, color, x, y} of chart.curves) {
    // A run that ended before has no value here.
    if (at >= x[0] - slack && at <= x[x.length - 1] + slack) tip.append(line(color, name, shown(y[nearest(x, at)], chart.unit)));
  }
  const near = markers.filter((marker) => Math.abs(marker.x - at) < 0.008 * (chart.x[1] - chart.x[0]));
  for (const text of new Set(near.map((marker) => marker.text))) tip.append(Object.assign(document.createElement("div"), {textContent: text}));
  chart.area.append(tip);
  const room = chart.area.clientWidth, wide = tip.offsetWidth;
  const left = share < 0.5 ? share * room + 10 : share * room - wide - 10;
  tip.style.left = `${Math.max(-40, Math.min(left, room - wide))}px`;
}

for (const chart of charts) {
  const move = (event) => {
    const box = chart.area.getBoundingClientRect();
    show(chart, Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
  };
  chart.area.addEventListener("pointermove", move);
  chart.area.addEventListener("pointerdown", move);
  chart.area.addEventListener("pointerleave", clear);
}
