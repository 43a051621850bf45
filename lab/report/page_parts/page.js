"use strict";
// The page's life: tables that sort, and the failures that can be filtered and opened.
// All data lies in the page; nothing is fetched.

const data = JSON.parse(document.getElementById("data").textContent);

// ---- Tables: a click on a heading sorts by it, another the other way round

function valueOf(cell) {
  const text = cell.dataset.value;
  const number = Number(text);
  return text === "" || Number.isNaN(number) ? text : number;
}

function compareValues(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a === "number") return -1; // what has no number comes last
  if (typeof b === "number") return 1;
  return a.localeCompare(b);
}

function sortBy(heading) {
  const ascending = heading.getAttribute("aria-sort") !== "ascending";
  const body = heading.closest("table").tBodies[0];
  const rows = [...body.rows];
  rows.sort((a, b) => {
    const order = compareValues(valueOf(a.cells[heading.cellIndex]), valueOf(b.cells[heading.cellIndex]));
    return ascending ? order : -order;
  });
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  body.append(...rows);
}

for (const button of document.querySelectorAll(".sortable thead button")) {
  button.addEventListener("click", () => sortBy(button.parentElement));
}

// ---- Failures

// An image's answers are numbers in data.chances, of each network and class, in thousandths.
const classCount = data.classes.length;
const imageCount = data.index.length;

function chancesOf(network, image) {
  return data.chances[network].slice(image * classCount, (image + 1) * classCount);
}

// What a filter asks of an image; network 0 is the one compared with.
const predicted = data.networks.map((network) => data.predicted?.[network.key]);
const confidence = data.networks.map((network) => data.confidence?.[network.key]);

function isWrong(network, image) {
  return predicted[network][image] !== data.labels[image];
}

function wayOf(network, image) {
  const first = isWrong(0, image);
  const other = isWrong(network, image);
  if (first && !other) return data.ways.corrected;
  if (!first && other) return data.ways.broken;
  if (first) return predicted[0][image] === predicted[network][image] ? data.ways.same : data.ways.differs;
  return "";
}

const FILTERS = ["true", "predicted", "network", "way", "sure", "agree", "suspect", "index"];
const USUAL = { sure: "0", agree: "100" };
const form = document.getElementById("filters");

function readFilters() {
  const found = {};
  for (const name of FILTERS) {
    const field = form.elements[name];
    if (!field) continue;
    const value = field.type === "checkbox" ? (field.checked ? "1" : "") : field.value.trim();
    if (value !== "" && value !== USUAL[name]) found[name] = value;
  }
  return found;
}

function showFilters(filters) {
  for (const name of FILTERS) {
    const field = form.elements[name];
    if (!field) continue;
    if (field.type === "checkbox") field.checked = filters[name] === "1";
    else field.value = filters[name] ?? USUAL[name] ?? "";
  }
}

function passes(filters, image) {
  if (filters.true !== undefined && data.labels[image] !== Number(filters.true)) return false;
  if (filters.index !== undefined && !String(data.index[image]).startsWith(filters.index)) return false;
  if (filters.suspect !== undefined && !data.suspect[image]) return false;
  if (filters.agree !== undefined && data.agreement[image] > 10 * Number(filters.agree)) return false;
  // The networks that are asked: the one named, or any; what is said of a mistake is of one and the same.
  const named = data.networks.findIndex((network) => network.key === filters.network);
  const asked = named >= 0 ? [named] : data.networks.keys();
  for (const network of asked) {
    if (filters.way !== undefined) {
      // A way is one to another network; of the first, to any.
      const others = network > 0 ? [network] : named === 0 ? [...data.networks.keys()].slice(1) : [];
      if (!others.some((other) => wayOf(other, image) === filters.way)) continue;
    }
    const saidOf = filters.way === data.ways.corrected && network > 0 ? 0 : network;
    if (!isWrong(saidOf, image)) continue;
    if (filters.predicted !== undefined && predicted[saidOf][image] !== Number(filters.predicted)) continue;
    if (filters.sure !== undefined && confidence[saidOf][image] < 10 * Number(filters.sure)) continue;
    return true;
  }
  return false;
}

const sprite = new Image(); // all images, in rows
const grid = document.getElementById("grid");
const more = document.getElementById("more");
const AT_ONCE = 200;
let shown = []; // the images that pass
let drawn = 0; // how many of them have a tile

function percent(thousandths) {
  return `${Math.round(thousandths / 10)} %`;
}

function answersOf(image) {
  return data.networks.map((network, k) => `${network.title}: ${data.classes[predicted[k][image]]} ${percent(confidence[k][image])}`);
}

function makeTile(place) {
  const image = shown[place];
  const tile = document.createElement("button");
  tile.type = "button";
  tile.className = "tile";
  tile.setAttribute("role", "listitem");
  const label = data.classes[data.labels[image]];
  const answers = answersOf(image);
  tile.setAttribute("aria-label", `image ${data.index[image]}, ${label}; ${answers.join("; ")}`);
  const picture = document.createElement("i");
  const column = image % data.columns;
  const row = Math.floor(image / data.columns);
  picture.style.backgroundImage = `url("${sprite.src}")`;
  picture.style.backgroundSize = `${64 * data.columns}px auto`;
  picture.style.backgroundPosition = `${-64 * column}px ${-64 * row}px`;
  tile.append(picture, label);
  answers.forEach((answer, k) => {
    const line = document.createElement("span");
    line.textContent = answer;
    if (isWrong(k, image)) line.className = "wrong";
    tile.append(line);
  });
  tile.addEventListener("click", () => open(place));
  return tile;
}

function drawMore() {
  const upTo = Math.min(shown.length, drawn + AT_ONCE);
  const tiles = [];
  for (let place = drawn; place < upTo; place += 1) tiles.push(makeTile(place));
  grid.append(...tiles);
  drawn = upTo;
  more.hidden = drawn === shown.length;
}

function update() {
  const filters = readFilters();
  form.elements.sure_shown.value = `${form.elements.sure.value} %`;
  if (form.elements.agree) form.elements.agree_shown.value = `${form.elements.agree.value} %`;
  shown = [];
  for (let image = 0; image < imageCount; image += 1) if (passes(filters, image)) shown.push(image);
  document.getElementById("count").textContent = `${shown.length} of ${imageCount} images`;
  grid.replaceChildren();
  drawn = 0;
  drawMore();
  return filters;
}

// ---- The address: #failures?true=3&network=baseline can be shared

function keepInAddress(filters) {
  const query = new URLSearchParams(filters).toString();
  history.replaceState(null, "", query ? `#failures?${query}` : "#failures");
}

function readAddress() {
  const [, query] = decodeURI(location.hash).split("?");
  if (query !== undefined) {
    showFilters(Object.fromEntries(new URLSearchParams(query)));
    document.getElementById("failures").scrollIntoView();
  }
  update();
}

function ask(filters) {
  showFilters(filters);
  keepInAddress(update());
  document.getElementById("count").scrollIntoView({ block: "center" });
}

// ---- An image, opened

const dialog = document.getElementById("opened");
let openedPlace = 0;

function canvasOf(side, smooth) {
  const canvas = document.createElement("canvas");
  canvas.width = side;
  canvas.height = side;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = smooth;
  return [canvas, context];
}

function drawImage(context, image, side) {
  const x = 32 * (image % data.columns);
  const y = 32 * Math.floor(image / data.columns);
  context.drawImage(sprite, x, y, 32, 32, 0, 0, side, side);
}

function drawHeat(network, image, side) {
  const [canvas, context] = canvasOf(side, false);
  drawImage(context, image, side);
  const [rows, columns] = data.heatShape;
  const cells = data.heat[network].subarray(image * rows * columns, (image + 1) * rows * columns);
  const [small, smallContext] = canvasOf(columns, false);
  small.height = rows;
  const pixels = smallContext.createImageData(columns, rows);
  cells.forEach((value, k) => pixels.data.set([...data.colours[value], 115], 4 * k));
  smallContext.putImageData(pixels, 0, 0);
  context.imageSmoothingEnabled = true;
  context.drawImage(small, 0, 0, side, side);
  canvas.className = "heat";
  return canvas;
}

function chancesList(chances, colour) {
  const list = document.createElement("div");
  list.className = "chances";
  data.classes.forEach((name, k) => {
    const bar = document.createElement("b");
    bar.style.width = `${chances[k] / 10}%`;
    bar.style.color = colour;
    const texts = [name, percent(chances[k])].map((text) => {
      const span = document.createElement("span");
      span.textContent = text;
      return span;
    });
    list.append(texts[0], bar, texts[1]);
  });
  return list;
}

function panel(heading, ...content) {
  const box = document.createElement("section");
  const title = document.createElement("strong");
  title.textContent = heading;
  box.append(title, document.createElement("br"), ...content);
  return box;
}

function open(place) {
  openedPlace = (place + shown.length) % shown.length;
  const image = shown[openedPlace];
  const side = 224;
  const [canvas, context] = canvasOf(side, false);
  drawImage(context, image, side);
  const label = data.classes[data.labels[image]];
  document.getElementById("opened-title").textContent = `Image ${data.index[image]}: ${label} (${openedPlace + 1} of ${shown.length})`;
  const panels = [panel("the image", canvas)];
  if (data.people) {
    const people = data.people.slice(image * classCount, (image + 1) * classCount);
    panels[0].append(document.createElement("br"), "people:", chancesList(people, "gray"));
  }
  data.networks.forEach((network, k) => {
    const answer = `${network.title}: ${data.classes[predicted[k][image]]} ${percent(confidence[k][image])}`;
    panels.push(panel(answer, drawHeat(k, image, side), chancesList(chancesOf(network.key, image), network.colour)));
  });
  document.getElementById("opened-body").replaceChildren(...panels);
  if (!dialog.open) dialog.showModal();
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

if (form) {
  sprite.src = URL.createObjectURL(new Blob([bytesOf(data.sprite)], { type: data.spriteKind }));
  data.heat = data.networks.map((network) => bytesOf(data.heatmaps[network.key]));
  form.addEventListener("input", () => keepInAddress(update()));
  form.addEventListener("reset", () => setTimeout(() => keepInAddress(update())));
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", drawMore);
  for (const cell of document.querySelectorAll(".cell")) {
    const { true: label, predicted: called, network } = cell.dataset;
    cell.addEventListener("click", () => ask({ true: label, predicted: called, network }));
  }
  for (const bar of document.querySelectorAll(".bar")) {
    const { network, way } = bar.dataset;
    bar.addEventListener("click", () => ask({ network, way }));
  }
  for (const button of dialog.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => open(openedPlace + Number(button.dataset.step)));
  }
  dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") open(openedPlace + 1);
    if (event.key === "ArrowLeft") open(openedPlace - 1);
  });
  dialog.addEventListener("close", () => grid.children[openedPlace]?.focus());
  addEventListener("hashchange", readAddress);
  readAddress();
}
