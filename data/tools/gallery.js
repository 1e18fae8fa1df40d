"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const count = n => n.toLocaleString("en");
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 210, WIDTH = 270;
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
function drawing(name, attributes = {}, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// An image with its boxes, as large as fits; its overlay is made again when the filters change.
function frame(image, width, height) {
  const scale = Math.min(width / image.w, height / image.h);
  const made = element("div", {class: "frame"});
  made.style.width = image.w * scale + "px";
  made.style.height = image.h * scale + "px";
  if (image.src) made.append(element("img", {src: image.src, alt: image.name, loading: "lazy"}));
  made.append(overlay(image, scale, at("names").checked || width > WIDTH));
  return made;
}
function overlay(image, scale, named) {
  const chosen = at("class").value;
  const made = drawing("svg", {viewBox: `0 0 ${image.w} ${image.h}`, preserveAspectRatio: "none"});
  if (!at("boxes").checked) return made;
  const largestFirst = [...image.boxes].sort((a, b) => b[2] * b[3] - a[2] * a[3]);
  const texts = [];
  for (const [x, y, w, h, label, crowd] of largestFirst) {
    if (chosen !== "" && Number(chosen) !== label) continue;
    const kind = data.classes[label];
    const box = drawing("rect", {x, y, width: Math.max(w, 0), height: Math.max(h, 0), stroke: kind.color,
      class: crowd ? "box crowd" : "box"});
    box.append(drawing("title", {}, `${kind.name}${crowd ? " (crowd, or ignored)" : ""}: ${w} x ${h} at ${x}, ${y}`));
    made.append(box);
    if (named) {
      const size = 12 / scale;
      texts.push(drawing("text", {x: Math.min(Math.max(x, 0), image.w) + 2 / scale,
        y: Math.max(y - 3 / scale, size), "font-size": size, "stroke-width": 3 / scale}, kind.name));
    }
  }
  made.append(...texts);
  return made;
}
function caption(image) {
  const counts = new Map();
  for (const box of image.boxes) counts.set(box[4], (counts.get(box[4]) || 0) + 1);
  const boxes = [...counts].map(([label, n]) => `${n} ${data.classes[label].name}`).join(", ") || "no box";
  const text = element("div", {class: "text"}, element("b", {}, image.name),
    element("div", {class: "quiet"}, `id ${image.id}, ${image.w} x ${image.h}: ${boxes}`));
  if (image.problem) text.append(element("div", {class: "problem"}, image.problem));
  return text;
}

const cards = data.images.map((image, place) => {
  const thumbnail = element("div", {class: "image"}, frame(image, WIDTH, HEIGHT));
  const card = element("article", {}, thumbnail, caption(image));
  thumbnail.onclick = () => enlarge(place);
  const words = [image.name, image.id, ...new Set(image.boxes.map(box => data.classes[box[4]].name))];
  return {image, card, thumbnail, text: words.join("\n").toLowerCase(),
    smallest: Math.min(Infinity, ...image.boxes.map(box => box[2] * box[3]))};
});
const orders = {file: () => 0, most: (a, b) => b.image.boxes.length - a.image.boxes.length,
  fewest: (a, b) => a.image.boxes.length - b.image.boxes.length, small: (a, b) => a.smallest - b.smallest};
const tests = {all: () => true, empty: image => !image.boxes.length, crowd: image => image.boxes.some(box => box[5]),
  outside: image => image.boxes.some(([x, y, w, h]) => x < -1 || y < -1 || x + w > image.w + 1 || y + h > image.h + 1),
  tiny: image => image.boxes.some(box => Math.min(box[2], box[3]) < 8), problem: image => Boolean(image.problem)};
let visible = [];

function show() {
  const words = at("search").value.toLowerCase().split(/\s+/).filter(Boolean), chosen = at("class").value;
  const fits = ({image, text}) => words.every(word => text.includes(word)) && tests[at("only").value](image)
    && (chosen === "" || image.boxes.some(box => box[4] === Number(chosen)));
  const sorted = [...cards].sort(orders[at("order").value]);
  visible = sorted.filter(fits);
  for (const {image, thumbnail} of visible) thumbnail.replaceChildren(frame(image, WIDTH, HEIGHT));
  at("cards").replaceChildren(...visible.map(({card}) => card));
  if (!visible.length) at("cards").append(element("p", {class: "nothing quiet"}, "No image here is like that."));
  const boxes = visible.reduce((sum, {image}) => sum
    + image.boxes.filter(box => chosen === "" || box[4] === Number(chosen)).length, 0);
  at("shown").textContent = `${count(visible.length)} of ${count(cards.length)} images, ${count(boxes)} boxes`;
  for (const row of at("classes").rows) row.classList.toggle("chosen", row.dataset.label === chosen);
  histogram(chosen === "" ? data.classes : [data.classes[Number(chosen)]]);
}
function histogram(classes) {
  const counts = data.edges.map((_, bin) => classes.reduce((sum, kind) => sum + kind.sizes[bin], 0));
  const last = Math.max(8, counts.findLastIndex(n => n > 0) + 1), highest = Math.max(1, ...counts);
  const svg = at("sizes"), left = 6, bottom = 160, step = (440 - 2 * left) / last;
  svg.replaceChildren();
  counts.slice(0, last).forEach((n, bin) => {
    const height = 135 * n / highest;
    const bar = drawing("rect", {x: left + bin * step + 1, y: bottom - height, width: step - 2, height,
      fill: classes.length === 1 ? classes[0].color : "#5b7fb5"});
    bar.append(drawing("title", {}, `${data.edges[bin]} to ${data.edges[bin + 1] || "any"} pixels: ${count(n)} boxes`));
    svg.append(bar);
    if (bin % 2 === 0) svg.append(drawing("text", {x: left + bin * step, y: bottom + 14, "text-anchor": "middle"},
      data.edges[bin]));
  });
  const lower = bin => left + bin * step;
  for (const [side, bin] of [[32, 10], [96, 13 + 0.17]]) if (bin < last) {
    svg.append(drawing("line", {x1: lower(bin), x2: lower(bin), y1: 14, y2: bottom, stroke: "#999",
      "stroke-dasharray": "3 3"}), drawing("text", {x: lower(bin) + 3, y: 22}, side === 32 ? "medium" : "large"));
  }
  svg.append(drawing("line", {x1: left, x2: 440 - left, y1: bottom, y2: bottom, stroke: "#999"}));
  const total = counts.reduce((sum, n) => sum + n, 0), name = classes.length === 1 ? ` of ${classes[0].name}` : "";
  at("sizescaption").textContent = `${count(total)} boxes${name} by size: square root of the area, pixels as stored;`
    + " medium from 32, large from 96 (COCO)";
}
function enlarge(place) {
  const dialog = at("large"), image = data.images[place];
  const move = by => {
    const now = visible.findIndex(({image: one}) => one === image) + by;
    if (visible[now]) enlarge(data.images.indexOf(visible[now].image));
  };
  const buttons = [["close", () => dialog.close()], ["next", () => move(1)], ["previous", () => move(-1)]];
  const text = caption(image);
  text.prepend(...buttons.map(([name, action]) => {
    const button = element("button", {}, name);
    button.onclick = action;
    return button;
  }));
  dialog.replaceChildren(frame(image, innerWidth * .92, innerHeight * .8), text);
  dialog.onkeydown = event => {
    if (event.key === "ArrowRight") move(1);
    if (event.key === "ArrowLeft") move(-1);
  };
  dialog.onclick = event => { if (event.target === dialog) dialog.close(); };
  if (!dialog.open) dialog.showModal();
}

const total = data.classes.reduce((sum, kind) => sum + kind.boxes, 0);
const crowds = data.classes.reduce((sum, kind) => sum + kind.crowds, 0);
at("summary").textContent = `${count(data.numImages)} images (${count(data.numEmpty)} without a box), `
  + `${count(total)} boxes, ${crowds ? count(crowds) + " crowd or ignored regions, " : ""}`
  + `${count(data.classes.length)} classes. `
  + (data.images.length < data.numImages ? `${count(data.images.length)} of the images are in this page; the figures `
    + "are of all." : "");
at("crowdhead").hidden = !crowds;
const most = Math.max(1, ...data.classes.map(kind => kind.boxes));
at("class").append(element("option", {value: ""}, "all classes"));
data.classes.forEach((kind, label) => {
  const swatch = element("i", {class: "color"}), bar = element("span");
  swatch.style.background = bar.style.background = kind.color;
  bar.style.width = 100 * kind.boxes / most + "%";
  const row = element("tr", {"data-label": label}, element("td", {}, swatch, kind.name),
    element("td", {}, count(kind.boxes)), element("td", {}, count(kind.images)),
    ...(crowds ? [element("td", {}, count(kind.crowds))] : []), element("td", {class: "share"}, bar));
  row.onclick = () => { at("class").value = at("class").value === String(label) ? "" : String(label); show(); };
  at("classes").append(row);
  at("class").append(element("option", {value: label}, `${kind.name} (${count(kind.boxes)})`));
});
for (const id of ["search", "class", "only", "order", "boxes", "names"]) at(id).oninput = show;
show();
