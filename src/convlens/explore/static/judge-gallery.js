// A gallery of thousands of images: only the rows that are in view exist, and load their thumbnails.
import { make, percent, probabilityBar, request, showError } from "./app.js";

const CELL = 112; // pixels: smallest width of a cell
const CAPTION = 44; // height of the text below a thumbnail
const GAP = 10;
const MARGIN = 2; // rows that are kept above and below those in view
const REST = 60; // ms without scrolling after which thumbnails are requested

const find = (id) => document.getElementById(id);
const view = find("window"), list = find("images");
let gallery = "", classes = [], images = { numbers: [] };
let layout = { columns: 1, row: CELL + CAPTION };
let focused = 0; // position of the image that the Tab key reaches
let isDisplaced = false; // the focused image is out of view, and the focus is on the gallery instead
let opened = -1; // position of the image in the dialog
const cells = new Map(); // the elements that exist, by position

// Show a list of images of a gallery from its start.
export function showImages(galleryId, classNames, content) {
  [gallery, classes, images, focused] = [galleryId, classNames, content, 0];
  for (const cell of cells.values()) discard(cell);
  cells.clear();
  view.scrollTop = 0;
  draw();
}

function draw() {
  if (!view.clientWidth) return;
  const columns = Math.max(1, Math.floor((view.clientWidth + GAP) / (CELL + GAP)));
  const width = (view.clientWidth - GAP * (columns - 1)) / columns;
  layout = { columns, row: width + CAPTION + GAP };
  const total = images.numbers.length;
  find("height").style.height = `${Math.ceil(total / columns) * layout.row}px`;
  const top = Math.max(0, Math.floor(view.scrollTop / layout.row) - MARGIN);
  const bottom = Math.ceil((view.scrollTop + view.clientHeight) / layout.row) + MARGIN;
  const first = top * columns, last = Math.min(total, bottom * columns);
  for (const [position, cell] of cells) {
    if (position < first || position >= last) { discard(cell); cells.delete(position); }
  }
  const shown = [];
  for (let position = first; position < last; position++) {
    if (!cells.has(position)) cells.set(position, makeCell(position));
    shown.push(cells.get(position));
    cells.get(position).style.height = `${layout.row - GAP}px`;
    cells.get(position).firstChild.tabIndex = position === focused ? 0 : -1;
  }
  list.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
  list.style.transform = `translateY(${top * layout.row}px)`;
  // Elements that stay are not moved, since that would take away their focus.
  for (const [i, cell] of shown.entries()) {
    if (list.children[i] !== cell) list.insertBefore(cell, list.children[i] || null);
  }
  clearTimeout(resting);
  resting = setTimeout(load, REST);
}

// Request the thumbnails of the cells that exist, not of all those that fast scrolling passes:
// first those in view.
let resting = 0;
function load() {
  const first = Math.floor(view.scrollTop / layout.row) * layout.columns;
  const distance = (position) => (position < first ? Infinity : position);
  const order = [...cells].sort(([a], [b]) => (distance(a) === distance(b) ? a - b : distance(a) - distance(b)));
  for (const [, cell] of order) {
    const image = cell.querySelector("img");
    if (!image.hasAttribute("src")) image.src = image.dataset.source;
  }
}

// Cancel the request of a thumbnail that is not needed any more. The focus stays in the gallery.
function discard(cell) {
  if (cell.contains(document.activeElement)) {
    view.focus({ preventScroll: true });
    isDisplaced = true;
  }
  cell.querySelector("img").removeAttribute("src");
  cell.remove();
}

function makeCell(position) {
  const number = images.numbers[position];
  const target = classes[images.targets[position]], pred = classes[images.preds[position]];
  const image = make("img", { alt: `Image ${number}` });
  image.dataset.source = `/api/judge/thumbnails/${gallery}/${number}`;
  image.addEventListener("load", () => image.classList.toggle("large", image.naturalWidth > 64));
  const answer = make("span", { className: "name" }, make("bdi", { textContent: pred }));
  const truth = make("span", { className: "quiet" });
  if (target === pred) truth.textContent = percent(images.confidence[position]);
  else truth.append(`${percent(images.confidence[position], 0)}, is `, make("bdi", { textContent: target }));
  const button = make("button", { type: "button" }, image, answer, truth);
  button.dataset.position = position;
  button.addEventListener("click", () => open(position));
  const cell = make("li", {}, button);
  cell.setAttribute("aria-setsize", images.numbers.length);
  cell.setAttribute("aria-posinset", position + 1);
  return cell;
}

let waiting = false;
function drawSoon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; draw(); });
}
view.addEventListener("scroll", drawSoon, { passive: true });
view.addEventListener("blur", () => { isDisplaced = false; });
// After a change of size the focused image may be in a row that is out of view.
new ResizeObserver(() => requestAnimationFrame(() => {
  if (isDisplaced || list.contains(document.activeElement)) moveTo(focused);
  else draw();
})).observe(view);

// Scroll until a row is in view, and put the focus on its image.
function moveTo(position) {
  focused = Math.max(0, Math.min(images.numbers.length - 1, position));
  const top = Math.floor(focused / layout.columns) * layout.row;
  if (top < view.scrollTop) view.scrollTop = top;
  else if (top + layout.row > view.scrollTop + view.clientHeight) view.scrollTop = top + layout.row - view.clientHeight;
  draw();
  cells.get(focused)?.firstChild.focus({ preventScroll: true });
}

view.addEventListener("keydown", (event) => {
  const rows = Math.max(1, Math.floor(view.clientHeight / layout.row));
  const steps = {
    ArrowRight: 1, ArrowLeft: -1, ArrowDown: layout.columns, ArrowUp: -layout.columns,
    PageDown: rows * layout.columns, PageUp: -rows * layout.columns, Home: -Infinity, End: Infinity,
  };
  if (!(event.key in steps) || !images.numbers.length) return;
  event.preventDefault();
  moveTo(event.target === view ? focused : Number(event.target.dataset.position) + steps[event.key]);
});

// -- one image

async function open(position) {
  opened = focused = position;
  const number = images.numbers[position], of = gallery;
  find("image-title").textContent = "";
  find("image-bars").replaceChildren();
  find("picture").src = `/api/judge/pictures/${gallery}/${number}`;
  find("image-previous").disabled = position === 0;
  find("image-next").disabled = position === images.numbers.length - 1;
  if (!find("enlarged").open) find("enlarged").showModal();
  try {
    const facts = await request("/api/judge/image", { gallery, number });
    if (opened !== position || gallery !== of) return;
    find("image-title").replaceChildren(make("bdi", { textContent: facts.name }));
    find("image-label").replaceChildren("is ", make("bdi", { textContent: facts.label }), `, image ${number} of its split`);
    find("image-bars").replaceChildren(...facts.top.map((each) => probabilityBar(each)));
    const query = new URLSearchParams({ run: facts.run, split: facts.split, number });
    find("image-try").href = `/try?${query}`;
  } catch (error) {
    find("enlarged").close();
    showError(error);
  }
}

const step = (by) => {
  const next = opened + by;
  if (next >= 0 && next < images.numbers.length) open(next);
};
find("picture").addEventListener("load", () => find("picture").classList.toggle("large", find("picture").naturalWidth > 64));
find("image-previous").addEventListener("click", () => step(-1));
find("image-next").addEventListener("click", () => step(1));
find("image-close").addEventListener("click", () => find("enlarged").close());
find("enlarged").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
find("enlarged").addEventListener("close", () => { opened = -1; moveTo(focused); });
