// The part Try: one image, and what one or two models make of it.
import { clearError, isReplaced, make, request, showError } from "./app.js";
import { chooser, drawing, listenToFiles, listenToPanels, upload, webcam } from "./try-sources.js";
import { View } from "./try-view.js";

const find = (id) => document.getElementById(id);
const settings = {
  method: find("method").value,
  opacity: find("opacity").value / 100,
  brush: find("brush-size").value / 100,
  promise: null,
};
let views = [], image = null;

// -- models

const runs = { first: find("run"), second: find("other") };

function openView(run) {
  const view = new View(run, settings, {
    onHide: (x, y) => { for (const each of views) each.hide(x, y, settings.brush); },
    onOpen: (chosen) => setImage(chosen),
    onChannel: openChannel,
  });
  view.ready = view.open();
  return view;
}

async function setRuns() {
  const wanted = [runs.first.value, runs.second.value].filter((run, i, all) => run && all.indexOf(run) === i);
  for (const view of views) if (!wanted.includes(view.run)) view.close();
  const kept = new Map(views.map((view) => [view.run, view]));
  views = wanted.map((run) => kept.get(run) || openView(run));
  find("views").replaceChildren(...views.map((view) => view.element));
  find("views").classList.toggle("two", views.length === 2);
  await Promise.all(views.map((view) => view.ready));
  await Promise.all(views.filter((view) => image && view.image !== image.image).map((view) => view.show(image.image)));
}

for (const select of Object.values(runs)) {
  select.addEventListener("change", () => setRuns().catch(showError));
}

// -- the image

// Show an image that the server has: {image, name, label}.
async function setImage(chosen, options = {}) {
  image = chosen;
  find("image-name").textContent = chosen.name;
  clearError();
  document.body.classList.add("has-image");
  try {
    await Promise.all(views.map((view) => view.ready.then(() => view.show(chosen.image, options))));
  } catch (error) {
    showError(error);
  }
}

async function setFile(file, name = file.name, brief = false) {
  try {
    await setImage(await upload(file, name), { brief });
  } catch (error) {
    showError(error);
  }
}

const firstFacts = () => views[0].facts;
listenToFiles((file) => setFile(file));
const sources = {
  webcam: webcam(setFile),
  draw: drawing(setFile, firstFacts),
  choose: chooser(() => runs.first.value, () => firstFacts().classes, (chosen) => setImage(chosen)),
};
listenToPanels(sources);

// -- tools

find("method").addEventListener("change", (event) => {
  settings.method = event.target.value;
  for (const view of views) if (view.image) view.showHeatMap().catch(showError);
});
find("opacity").addEventListener("input", (event) => {
  settings.opacity = event.target.value / 100;
  for (const view of views) view.setOpacity();
});
find("brush-size").addEventListener("input", (event) => { settings.brush = event.target.value / 100; });
find("reveal").addEventListener("click", () => { for (const view of views) view.reveal(); });
find("promise").addEventListener("change", (event) => {
  settings.promise = event.target.value ? Number(event.target.value) : null;
  for (const view of views) if (view.image) view.predict().catch(showError);
});

// -- one channel

let shownChannel = null;

async function openChannel(view, layer, position) {
  const dialog = find("channel"), channel = layer.order[position];
  shownChannel?.abort.abort();
  shownChannel = { view, layer, position, abort: new AbortController() };
  find("channel-title").replaceChildren(make("code", { textContent: layer.layer }), ` channel ${channel}`);
  find("channel-images").replaceChildren();
  find("channel-note").textContent = "";
  if (!dialog.open) dialog.showModal();
  try {
    const { mean, max, map_width: width, map_height: height } = await view.showChannel(find("channel-map"), layer.layer, channel);
    find("channel-facts").textContent = `${width}×${height}, mean ${mean.toPrecision(3)}, maximum ${max.toPrecision(3)}`;
    const images = await view.topImages(layer.layer, channel, find("channel-note"), shownChannel.abort.signal);
    find("channel-images").replaceChildren(...images);
    for (const item of images) item.firstChild.addEventListener("click", () => dialog.close());
  } catch (error) {
    if (!isReplaced(error)) find("channel-note").textContent = error.message;
  }
}

function stepChannel(by) {
  const { view, layer, position } = shownChannel;
  const count = layer.order.length;
  openChannel(view, layer, (position + by + count) % count);
}

find("channel").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") stepChannel(-1);
  else if (event.key === "ArrowRight") stepChannel(1);
});
find("channel").addEventListener("close", () => shownChannel?.abort.abort());
find("channel-close").addEventListener("click", () => find("channel").close());
find("channel-previous").addEventListener("click", () => stepChannel(-1));
find("channel-next").addEventListener("click", () => stepChannel(1));

// -- start

// `?run=NAME&other=NAME&split=val&number=17` opens these runs and that image; without a number, an
// example of the validation split, so that there is something to see.
async function start() {
  const query = new URLSearchParams(location.search);
  for (const [key, select] of [["run", runs.first], ["other", runs.second]]) {
    if ([...select.options].some((option) => option.value === query.get(key))) select.value = query.get(key);
  }
  try {
    await setRuns();
  } catch (error) {
    showError(error);
    return;
  }
  const number = query.get("number");
  const body = number === null
    ? { split: "val", how: "random", count: 1 }
    : { split: query.get("split") || "val", how: "number", number: Number(number) };
  try {
    const { images } = await request("/api/try/choose", { run: runs.first.value, ...body });
    if (!image && images.length) await setImage(images[0]);
  } catch (error) {
    if (number !== null) showError(error); // an example is not needed
  }
}

start();
