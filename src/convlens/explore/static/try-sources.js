// Where images come from: files (dropped, pasted, chosen), the webcam, a drawing, the data.
import { make, request, showError, usesInWords } from "./app.js";
import { thumbnail, waitFor } from "./try-view.js";

const find = (id) => document.getElementById(id);
const DRAWN_SHARE = 20 / 28; // of the side: digits of MNIST fill 20 of 28 pixels

// Send an image file to the server; returns {image, name, label}.
export const upload = (file, name) => request(`/api/try/images?name=${encodeURIComponent(name)}`, file);

export function listenToFiles(onFile) {
  const file = find("file");
  find("open-file").addEventListener("click", () => file.click());
  file.addEventListener("change", () => {
    if (file.files.length) onFile(file.files[0]);
    file.value = "";
  });
  // The whole page accepts files, so that a near miss does not replace it by the image.
  let depth = 0;
  const mark = (change) => {
    depth = change === 0 ? 0 : depth + change;
    document.body.classList.toggle("dropping", depth > 0);
  };
  document.addEventListener("dragenter", (event) => { event.preventDefault(); mark(1); });
  document.addEventListener("dragleave", () => mark(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    mark(0);
    const dropped = [...event.dataTransfer.files];
    if (dropped.length) onFile(dropped[0]);
    else showError(Object.assign(new Error("this is not a file"), { fix: "drop an image file from your computer", status: 0 }));
  });
  document.addEventListener("paste", (event) => {
    const pasted = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
    if (pasted) onFile(pasted);
  });
}

// Buttons that show one panel each, and hide the others.
export function listenToPanels(panels) {
  for (const [name, { open = () => {}, close = () => {} }] of Object.entries(panels)) {
    const button = find(`use-${name}`), panel = find(`${name}-panel`);
    const set = (shown) => {
      if (panel.hidden !== shown) return;
      panel.hidden = !shown;
      button.setAttribute("aria-expanded", String(shown));
      if (shown) open(); else close();
    };
    button.addEventListener("click", () => {
      const shown = panel.hidden;
      for (const other of Object.keys(panels)) find(`use-${other}`).dispatchEvent(new CustomEvent("set", { detail: other === name && shown }));
    });
    button.addEventListener("set", (event) => set(event.detail));
  }
}

// -- webcam

export function webcam(onBlob) {
  const video = find("video"), live = find("live");
  let stream = null;
  const take = async (brief) => {
    const side = Math.min(video.videoWidth, video.videoHeight);
    if (!side) return;
    const canvas = make("canvas", { width: side, height: side });
    const left = (video.videoWidth - side) / 2, top = (video.videoHeight - side) / 2;
    canvas.getContext("2d").drawImage(video, left, top, side, side, 0, 0, side, side);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    await onBlob(blob, "webcam.png", brief);
  };
  find("take").addEventListener("click", () => {
    live.checked = false;
    take(false).catch(showError);
  });
  live.addEventListener("change", async () => {
    try {
      while (live.checked && stream) {
        await take(true);
        await new Promise((resolve) => setTimeout(resolve, 30));
      }
    } catch (error) {
      live.checked = false;
      showError(error);
    }
  });
  return {
    async open() {
      try {
        stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
        video.srcObject = stream;
      } catch (error) {
        const reason = navigator.mediaDevices ? error.message : "the browser allows it on this machine and over https only";
        showError(Object.assign(new Error("the webcam cannot be used"), { fix: reason, status: 0 }));
      }
    },
    close() {
      live.checked = false;
      stream?.getTracks().forEach((track) => track.stop());
      stream = video.srcObject = null;
    },
  };
}

// -- drawing

// `getFacts` returns what is known of the model: whether its images are dark, and their size.
export function drawing(onBlob, getFacts) {
  const isDark = () => getFacts()?.dark ?? true;
  const canvas = find("canvas"), context = canvas.getContext("2d", { willReadFrequently: true });
  const side = canvas.width;
  let drawn = false, isSending = false, pending = null;
  const clear = () => {
    context.fillStyle = isDark() ? "#000" : "#fff";
    context.fillRect(0, 0, side, side);
    drawn = false;
  };
  // One image at a time: the next one is what is drawn by then.
  const send = async (brief) => {
    pending = pending === null ? brief : pending && brief;
    if (isSending) return;
    isSending = true;
    try {
      while (pending !== null) {
        const isBrief = pending;
        pending = null;
        const source = find("center").checked ? centered() : canvas;
        const blob = await new Promise((resolve) => source.toBlob(resolve, "image/png"));
        await onBlob(blob, "drawing.png", isBrief);
      }
    } catch (error) {
      showError(error);
    } finally {
      isSending = false;
    }
  };
  // The drawing moved to the middle, in the size that digits of MNIST have.
  const centered = () => {
    const pixels = context.getImageData(0, 0, side, side).data, background = isDark() ? 0 : 255;
    let left = side, right = -1, top = side, bottom = -1;
    for (let y = 0; y < side; y++) {
      for (let x = 0; x < side; x++) {
        if (Math.abs(pixels[4 * (y * side + x)] - background) > 64) {
          left = Math.min(left, x); right = Math.max(right, x); top = Math.min(top, y); bottom = Math.max(bottom, y);
        }
      }
    }
    if (right < 0) return canvas;
    const width = right - left + 1, height = bottom - top + 1;
    const scale = (DRAWN_SHARE * side) / Math.max(width, height);
    const copy = make("canvas", { width: side, height: side }), to = copy.getContext("2d");
    to.fillStyle = isDark() ? "#000" : "#fff";
    to.fillRect(0, 0, side, side);
    to.drawImage(canvas, left, top, width, height, (side - scale * width) / 2, (side - scale * height) / 2, scale * width, scale * height);
    return copy;
  };
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * side, ((event.clientY - box.top) / box.height) * side];
  };
  let last = null;
  const draw = (event) => {
    const [x, y] = point(event);
    context.strokeStyle = isDark() ? "#fff" : "#000";
    Object.assign(context, { lineWidth: Math.max(side / 12, (1.5 * side) / (getFacts()?.size || side)), lineCap: "round", lineJoin: "round" });
    context.beginPath();
    context.moveTo(...(last || [x, y]));
    context.lineTo(x, y);
    context.stroke();
    last = [x, y];
    drawn = true;
  };
  canvas.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    last = null;
    draw(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!canvas.hasPointerCapture(event.pointerId)) return;
    draw(event);
    send(true);
  });
  canvas.addEventListener("pointerup", () => { if (drawn) send(false); });
  find("clear").addEventListener("click", clear);
  find("center").addEventListener("change", () => { if (drawn) send(false); });
  return { open: () => { if (!drawn) clear(); } };
}

// -- the data of the run

export function chooser(getRun, getClasses, onImage) {
  const split = find("split"), how = find("how"), label = find("label"), list = find("chosen"), note = find("chosen-note");
  let seed = 0, loadedRun = "", sealedUses = null;

  async function open() {
    const run = getRun();
    if (loadedRun === run) return;
    note.textContent = "reading the data set …";
    list.replaceChildren();
    try {
      const { splits, test_is_open: isOpen, test_uses: uses } = await request("/api/try/splits", { run });
      const option = (value, text) => make("option", { value, textContent: text });
      const names = Object.keys(splits).reverse(); // validation first
      split.replaceChildren(
        ...names.map((name) => option(name, `${name === "val" ? "validation" : "training"} (${splits[name].toLocaleString("en")})`)),
        option("test", isOpen ? "test" : "test (sealed)"),
      );
      sealedUses = isOpen ? null : uses;
      label.replaceChildren(...getClasses().map((name) => option(name, name)));
      loadedRun = run;
      await show();
    } catch (error) {
      note.textContent = error.fix ? `${error.message}: ${error.fix}` : error.message;
    }
  }

  async function show() {
    find("label-field").hidden = how.value !== "class";
    if (split.value === "test" && sealedUses !== null && !(await unseal())) {
      split.selectedIndex = 0;
    }
    note.textContent = "";
    const body = { run: getRun(), split: split.value, how: how.value, label: label.value, seed };
    let answer = await request("/api/try/choose", body);
    if (answer.job) answer = await waitFor(answer.job, note);
    note.textContent = answer.images.length ? "" : how.value === "worst" ? "no mistakes" : "no images";
    list.replaceChildren(...answer.images.map((image) => thumbnail(image, image.name, () => onImage(image))));
  }

  // Ask before the test split is opened, which is logged.
  function unseal() {
    const dialog = find("sealed");
    find("sealed-uses").textContent = `It ${usesInWords(sealedUses)}.`;
    dialog.showModal();
    return new Promise((resolve) => {
      dialog.addEventListener("close", async () => {
        if (dialog.returnValue !== "open") { resolve(false); return; }
        try {
          await request("/api/try/open-test", { run: getRun() });
          sealedUses = null;
          split.querySelector("[value=test]").textContent = "test";
          resolve(true);
        } catch (error) {
          showError(error);
          resolve(false);
        }
      }, { once: true });
    });
  }

  for (const control of [split, how, label]) control.addEventListener("change", () => { seed = 0; show().catch(showError); });
  find("others").addEventListener("click", () => { seed += 1; show().catch(showError); });
  for (const [id, value] of [["keep-sealed", ""], ["open-sealed", "open"]]) {
    find(id).addEventListener("click", () => find("sealed").close(value));
  }
  return { open };
}
