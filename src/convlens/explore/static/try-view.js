// One model's view of the image: prediction, heat map, brush, nearest images, activations.
import { decode, paintMap, paintPixels } from "./colors.js";
import { RequestError, finished, isReplaced, make, percent, probabilityBar, request, showError } from "./app.js";

// A name for this page: its newest request of a kind replaces the older ones on the server.
const page = Math.random().toString(36).slice(2);

// Where a map says nothing it is transparent, so that the image stays visible.
const fromZero = (byte) => Math.min(1, byte / 150);
const fromMiddle = (byte) => Math.min(1, Math.abs(byte - 127.5) / 75);

export class View {
  // `settings` has the method, the promise and the opacity; `onHide` is told where the brush was.
  constructor(run, settings, { onHide, onOpen, onChannel }) {
    this.run = run;
    this.settings = settings;
    this.onHide = onHide;
    this.onOpen = onOpen;
    this.onChannel = onChannel;
    this.element = document.getElementById("view").content.firstElementChild.cloneNode(true);
    this.part = (name) => this.element.querySelector(`[data-part="${name}"]`);
    this.part("name").textContent = run;
    this.part("target").setAttribute("aria-label", `Class of the heat map of ${run}`);
    this.part("target").addEventListener("change", () => this.showHeatMap().catch(showError));
    this.cursor = [0.5, 0.5];
    this.#listenToBrush();
  }

  // Load the model; everything else waits for it.
  async open() {
    this.facts = await request("/api/try/run", { run: this.run });
    const { size, channels, calibrated, device, classes } = this.facts;
    const probs = calibrated ? "calibrated" : "not calibrated";
    this.part("facts").textContent =
      `${classes.length} classes, ${size} px, ${channels === 1 ? "gray" : "color"}, ${probs}, ${device}`;
    this.part("target").append(...classes.map((name) => make("option", { value: name, textContent: name })));
  }

  close() {
    this.#abort?.abort();
    this.element.remove();
  }

  #abort;
  #body = (more) => ({ run: this.run, image: this.image, page, ...more });
  #ask = (name, more = {}) => request(`/api/try/${name}`, this.#body(more), { signal: this.#abort.signal });

  // Answers can overtake each other: only that to the newest request of a kind counts, as on the server.
  #newest = new Map();
  async #askNewest(name, more) {
    const mine = (this.#newest.get(name) || 0) + 1;
    this.#newest.set(name, mine);
    const answer = await this.#ask(name, more);
    if (this.#newest.get(name) !== mine) throw new RequestError(409, { error: "replaced by a newer request" });
    return answer;
  }

  // Show an image by its id. With `brief` only what changes quickly, e.g. for the webcam.
  async show(image, { brief = false } = {}) {
    this.#abort?.abort();
    this.#abort = new AbortController();
    this.image = image;
    this.before = undefined;
    this.element.setAttribute("aria-busy", "true");
    try {
      const work = [this.#showPicture(), this.predict(), this.showHeatMap()];
      if (!brief) work.push(this.showActivations(), this.showNearest());
      await Promise.all(work);
    } finally {
      this.element.setAttribute("aria-busy", "false");
    }
  }

  async #showPicture() {
    const picture = await this.#ask("picture");
    const { width, height, channels } = picture;
    paintPixels(this.part("picture"), decode(picture.pixels), width, height, channels);
    this.part("stage").classList.toggle("small", width <= 64);
    this.mask = new Uint8Array(width * height);
    this.width = width;
    this.height = height;
    this.truth = picture.label;
    this.#paintMask();
    this.#showTruth();
  }

  // Predict, with the hidden parts; resolves when the answer is shown.
  async predict() {
    const hidden = this.mask?.some((bit) => bit) ? encodeBits(this.mask) : "";
    const promise = this.settings.promise;
    const possible = this.facts.promises.includes(promise);
    const answer = await this.#askNewest("predict", { hidden, min_accuracy: possible ? promise : null });
    if (!hidden) this.before = new Map(answer.top.map(({ label, prob }) => [label, prob]));
    this.answer = answer;
    this.#showAnswer(promise !== null && !possible);
  }

  #showAnswer(cannotPromise) {
    const { top, unsure, unlike } = this.answer;
    const [best] = top;
    const verdict = unsure ? "unsure" : best.label;
    this.part("verdict").replaceChildren(
      make("bdi", { textContent: verdict }),
      make("span", { className: "quiet", textContent: unsure ? "" : ` ${percent(best.prob)}` }),
    );
    const notes = [];
    if (unsure) notes.push(`The confidence is too low to promise ${percent(this.settings.promise, 0)} accuracy.`);
    if (cannotPromise) notes.push("This model has too few validation images for that promise.");
    if (unlike) notes.push("Unlike the training images.");
    this.part("notes").replaceChildren(...notes.map((textContent) => make("p", { textContent })));
    this.part("bars").classList.toggle("unsure", unsure);
    this.part("bars").replaceChildren(...top.map((each) => {
      const before = this.before?.get(each.label);
      if (before === undefined || Math.abs(before - each.prob) <= 0.005) return probabilityBar(each);
      const mark = make("span", { className: "before", title: `${percent(before)} with nothing hidden` });
      mark.style.left = percent(before);
      return probabilityBar(each, mark);
    }));
    this.#showTruth();
  }

  #showTruth() {
    const node = this.part("truth");
    node.replaceChildren();
    if (this.truth === null || this.truth === undefined || !this.answer) return;
    const right = this.answer.top[0].label === this.truth;
    node.append("label in the data: ", make("bdi", { textContent: this.truth }), right ? " ✓" : " ✗");
    node.classList.toggle("wrong", !right);
  }

  async showHeatMap() {
    const target = this.part("target").value, { method } = this.settings;
    const note = this.part("heat-note");
    try {
      const heat = await this.#askNewest("heat-map", { method, target });
      paintMap(this.part("heat"), decode(heat.maps), heat.map_width, heat.map_height, heat.signed ? "PuOr_r" : "viridis", heat.signed ? fromMiddle : fromZero);
      this.part("heat").hidden = false;
      const layer = heat.layer ? ` at ${heat.layer}, ${heat.map_width}×${heat.map_height}` : "";
      note.replaceChildren(`${heat.title} for `, make("bdi", { textContent: heat.label }), `${layer}`);
    } catch (error) {
      if (isReplaced(error)) throw error;
      this.part("heat").hidden = true;
      note.textContent = error.fix ? `${error.message}: ${error.fix}` : error.message;
    }
    this.setOpacity();
  }

  setOpacity() {
    this.part("heat").style.opacity = this.settings.opacity;
  }

  // -- brush

  // Hide a disc; `x`, `y` and `radius` are shares of the sides.
  hide(x, y, radius) {
    if (!this.mask) return;
    const { width, height } = this;
    const r = Math.max(radius * width, 0.5);
    for (let row = Math.max(0, Math.floor(y * height - r)); row < Math.min(height, y * height + r); row++) {
      for (let column = Math.max(0, Math.floor(x * width - r)); column < Math.min(width, x * width + r); column++) {
        if (Math.hypot(column + 0.5 - x * width, row + 0.5 - y * height) <= r) this.mask[row * width + column] = 1;
      }
    }
    this.#paintMask();
    this.#predictSoon();
  }

  reveal() {
    if (!this.mask) return;
    this.mask.fill(0);
    this.#paintMask();
    this.#predictSoon();
  }

  // One prediction at a time: the next one starts with whatever is hidden by then.
  async #predictSoon() {
    this.isStale = true;
    if (this.isPredicting) return;
    this.isPredicting = true;
    try {
      while (this.isStale) {
        this.isStale = false;
        await this.predict();
        this.updates = (this.updates || 0) + 1;
      }
    } catch (error) {
      showError(error);
    } finally {
      this.isPredicting = false;
    }
  }

  #paintMask() {
    const { width, height, mask } = this;
    const canvas = this.part("brush"), image = new ImageData(width, height);
    const color = this.facts.mean_color;
    for (let i = 0; i < mask.length; i++) {
      if (mask[i]) image.data.set([color[0], color[1], color[2], 255], 4 * i);
    }
    canvas.width = width;
    canvas.height = height;
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  #listenToBrush() {
    const stage = this.part("stage"), cursor = this.part("cursor");
    const move = (x, y) => {
      this.cursor = [x, y];
      const size = 2 * this.settings.brush;
      Object.assign(cursor.style, { left: percent(x), top: percent(y), width: percent(size), height: percent(size) });
    };
    const point = (event) => {
      const box = stage.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    };
    stage.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      event.preventDefault();
      stage.focus({ focusVisible: false });
      stage.setPointerCapture(event.pointerId);
      move(...point(event));
      this.onHide(...this.cursor);
    });
    stage.addEventListener("pointermove", (event) => {
      const steps = event.getCoalescedEvents?.() || [];
      for (const each of steps.length ? steps : [event]) {
        const [fromX, fromY] = this.cursor, [x, y] = point(each);
        move(x, y);
        if (!stage.hasPointerCapture(event.pointerId)) continue;
        // A fast mouse leaves gaps between two events.
        const count = Math.ceil((2 * Math.hypot(x - fromX, y - fromY)) / this.settings.brush) || 1;
        for (let i = 1; i <= count; i++) this.onHide(fromX + ((x - fromX) * i) / count, fromY + ((y - fromY) * i) / count);
      }
    });
    stage.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      const step = steps[event.key];
      if (step) {
        const [x, y] = this.cursor, by = this.settings.brush;
        move(Math.min(1, Math.max(0, x + step[0] * by)), Math.min(1, Math.max(0, y + step[1] * by)));
      } else if (event.key === " ") {
        this.onHide(...this.cursor);
      } else {
        return;
      }
      event.preventDefault();
    });
    move(...this.cursor);
  }

  // -- nearest training images

  async showNearest() {
    const list = this.part("nearest"), note = this.part("nearest-note");
    if (this.isDeclined) return;
    try {
      let answer = await this.#ask("nearest"), seen = 0;
      const showImages = () => list.replaceChildren(...(answer.images || []).map((image) =>
        this.#thumbnail(image, image.same || image.distance.toFixed(3))));
      showImages();
      if (answer.job) {
        // The nearest so far, while more training images are being compared.
        await waitFor(answer.job, note, this.#abort.signal, async (state) => {
          if (state.done === seen) return;
          seen = state.done;
          answer = await this.#ask("nearest");
          showImages();
        }).catch((error) => { if (!isReplaced(error) || error.name === "AbortError" || !answer.images) throw error; });
        answer = await this.#ask("nearest");
        showImages();
      }
      const of = answer.searched < answer.of ? ` of ${answer.of.toLocaleString("en")}` : "";
      note.textContent = `of ${answer.searched.toLocaleString("en")}${of} training images, by cosine distance of the features before the last layer`;
    } catch (error) {
      if (error.name === "AbortError") throw error;
      list.replaceChildren();
      if (isReplaced(error)) this.#offerNearest(note);
      else note.textContent = error.fix ? `${error.message}: ${error.fix}` : error.message;
    }
  }

  // After a cancelled comparison, which the next image would otherwise start again.
  #offerNearest(note) {
    this.isDeclined = true;
    const button = make("button", { type: "button", className: "plain", textContent: "Compare with training images" });
    button.addEventListener("click", () => {
      this.isDeclined = false;
      this.showNearest().catch(showError);
    });
    note.replaceChildren(button);
  }

  #thumbnail = (image, text) => thumbnail(image, text, () => this.onOpen(image));

  // -- activations

  async showActivations() {
    const { layers } = await this.#ask("activations");
    this.layers = layers;
    this.part("layers").replaceChildren(...layers.map((layer) => this.#layer(layer)));
  }

  #layer(layer) {
    const facts = [`${layer.channels} channels`, `${layer.height}×${layer.width}`];
    if (layer.active !== null) facts.push(`${percent(layer.active, 0)} active`);
    if (layer.blank) facts.push(`${layer.blank} blank`);
    if (layer.broken) facts.push(`${layer.broken} NaN`);
    const title = make("h4", {}, make("code", { textContent: layer.layer }), " ", make("span", { className: "quiet", textContent: facts.join(" · ") }));
    const maps = decode(layer.maps), size = layer.map_width * layer.map_height;
    const scale = layer.limits[0] < 0 ? "RdBu_r" : "viridis";
    const grid = make("div", { className: "channels" });
    layer.order.forEach((channel, position) => {
      const canvas = make("canvas");
      paintMap(canvas, maps.subarray(position * size, (position + 1) * size), layer.map_width, layer.map_height, scale);
      const button = make("button", { type: "button", title: `channel ${channel}` }, canvas);
      button.setAttribute("aria-label", `${layer.layer}, channel ${channel}`);
      button.addEventListener("click", () => this.onChannel(this, layer, position));
      grid.append(button);
    });
    if (layer.order.length < layer.channels) {
      const more = make("button", { type: "button", className: "more", textContent: `all ${layer.channels}` });
      more.setAttribute("aria-label", `Show all ${layer.channels} channels of ${layer.layer}`);
      more.addEventListener("click", async () => {
        try {
          const { layers: [all] } = await this.#ask("activations", { layer: layer.layer, channels: layer.channels });
          block.replaceWith(this.#layer(all));
        } catch (error) {
          showError(error);
        }
      });
      grid.append(more);
    }
    const block = make("div", { className: "layer" }, title, grid);
    return block;
  }

  // One channel at its full size, painted on a canvas; returns its facts.
  async showChannel(canvas, layer, channel) {
    const one = await this.#ask("channel", { layer, channel });
    paintMap(canvas, decode(one.maps), one.map_width, one.map_height, one.limits[0] < 0 ? "RdBu_r" : "viridis");
    return one;
  }

  // The images that activate a channel most; resolves to [thumbnails, words].
  async topImages(layer, channel, note, signal) {
    const body = { run: this.run, layer, channel };
    let answer = await request("/api/try/top-images", body, { signal });
    if (answer.job) {
      await waitFor(answer.job, note, signal);
      answer = await request("/api/try/top-images", body, { signal });
    }
    const of = answer.searched < answer.of ? ` of ${answer.of.toLocaleString("en")}` : "";
    note.textContent = `The images that activate it most, of ${answer.searched.toLocaleString("en")}${of} ${answer.split === "val" ? "validation" : "training"} images.`;
    return answer.images.map((image) => this.#thumbnail(image, `peak ${image.peak.toPrecision(3)}`));
  }
}

// A small image that opens when it is clicked.
export function thumbnail(image, text, onClick) {
  const picture = make("img", { src: image.source, alt: "" });
  const label = make("bdi", { className: "name", textContent: image.label ?? image.name });
  const button = make("button", { type: "button", title: image.name }, picture, label, make("span", { className: "quiet", textContent: text }));
  picture.addEventListener("load", () => picture.classList.toggle("large", picture.naturalWidth > 64));
  button.addEventListener("click", onClick);
  return make("li", {}, button);
}

// Wait for long work; its progress and a button that cancels it are shown in `note`.
export async function waitFor(job, note, signal, onProgress = () => {}) {
  const bar = make("progress"), words = make("span"), cancel = make("button", { type: "button", className: "plain", textContent: "Cancel" });
  bar.setAttribute("aria-label", "Progress");
  cancel.addEventListener("click", () => request(`/api/jobs/${job}`, undefined, { method: "DELETE" }).catch(showError));
  note.replaceChildren(bar, words, cancel);
  return finished(job, async (state) => {
    words.textContent = state.title + (state.state === "waiting" ? " (waiting)" : "");
    if (state.total) Object.assign(bar, { max: state.total, value: state.done });
    await onProgress(state);
  }, signal);
}

// Pack zeros and ones into bytes, and these into base64.
function encodeBits(mask) {
  const bytes = new Uint8Array(Math.ceil(mask.length / 8));
  for (let i = 0; i < mask.length; i++) if (mask[i]) bytes[i >> 3] |= 128 >> (i & 7);
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}
