// The part Labels: suspected labels, one image at a time.
import { RequestError, clearError, follow, make, percent, request, showError } from "./app.js";

const find = (id) => document.getElementById(id);
const page = sessionStorage.getItem("page") || crypto.getRandomValues(new Uint32Array(3)).join("-");
sessionStorage.setItem("page", page);
const DECISIONS = { keep: "keep the label", delete: "delete the image", skip: "skipped" };
let review = null, position = 0, token = 0;
let writing = Promise.resolve(), pending = 0; // decisions are sent in the order of the keys

// -- lists

async function showLists(chosen) {
  const { lists, job } = await request("/api/labels/lists", {});
  find("list").replaceChildren(...lists.map((name) => make("option", { value: name, textContent: name })));
  find("empty").hidden = lists.length > 0;
  find("review").hidden = !lists.length;
  if (job) followSearch(job).catch(showError);
  if (!lists.length) return;
  find("list").value = lists.includes(chosen) ? chosen : lists[0];
  await openList();
}

async function openList() {
  const name = find("list").value;
  const content = await request("/api/labels/open", { review: name });
  review = { name, ...content };
  position = 0;
  find("train").disabled = !review.of_files || !find("run").value;
  find("filter-field").hidden = review.classes.length <= 9;
  const none = review.suspects.length === 0;
  find("review").hidden = none;
  find("empty").hidden = !none;
  find("empty").textContent = "No label of this data set is suspected.";
  if (!none) {
    if (find("open-only").checked) position = nextOpen(-1);
    show();
  } else {
    showFacts();
  }
}

const isOpen = (suspect) => !suspect.decision || suspect.decision.kind === "skip";

// The position of the next image to decide on; skipped ones come last.
function nextOpen(from) {
  const order = review.suspects.map((_, i) => (from + 1 + i) % review.suspects.length);
  const fresh = order.find((i) => !review.suspects[i].decision);
  return fresh ?? order.find((i) => isOpen(review.suspects[i])) ?? Math.max(from, 0);
}

function showFacts() {
  const decided = review.suspects.filter((each) => !isOpen(each)).length;
  const listed = review.suspects.length;
  const all = review.total > listed ? ` (the most certain of ${review.total.toLocaleString("en")})` : "";
  find("list-facts").textContent = review.of_files
    ? `${decided} of ${listed.toLocaleString("en")}${all} decided, ${pending ? "being written to" : "in"} ${review.decisions_file}`
    : "The images of this data set are not files, so their labels cannot be corrected.";
}

// -- one image

async function show() {
  const suspect = review.suspects[position], current = ++token;
  find("image-title").textContent = suspect.name;
  find("position").textContent = `${position + 1} of ${review.suspects.length}` + (suspect.split === "test" ? ", test split" : "");
  find("given").textContent = `${suspect.label} (${percent(suspect.score)})`;
  find("suggested").textContent = `${suspect.suggested} (${percent(suspect.p_suggested)})`;
  find("verdict").replaceChildren(suspect.label, make("span", { className: "quiet", textContent: " or " }), suspect.suggested, "?");
  find("copies").textContent = suspect.copies;
  find("copies").hidden = find("copies-title").hidden = !suspect.copies;
  find("filter").value = "";
  showDecision();
  showChoices();
  showFacts();
  if (!review.of_files) return;
  find("picture").removeAttribute("src");
  try {
    const source = await pictureOf(position);
    if (current !== token) return;
    find("picture").src = source;
    find("picture").dataset.number = position;
    const following = nextOpen(position);
    if (following !== position) pictureOf(following).catch(() => {}); // so that it is there at once
  } catch (error) {
    if (current === token) showError(error);
  }
}

const pictures = new Map();
function pictureOf(number) {
  const key = `${review.name} ${number}`;
  if (!pictures.has(key)) {
    if (pictures.size > 20) pictures.delete(pictures.keys().next().value);
    const asked = request("/api/labels/image", { review: review.name, number });
    pictures.set(key, asked.then((content) => content.source));
    asked.catch(() => pictures.delete(key));
  }
  return pictures.get(key);
}

function showDecision() {
  const { decision } = review.suspects[position];
  const text = !decision ? "none yet" : decision.kind === "change" ? `change to ${decision.label}` : DECISIONS[decision.kind];
  find("decision").textContent = text;
  for (const button of find("decide").querySelectorAll("[data-kind]")) {
    button.setAttribute("aria-pressed", String(decision?.kind === button.dataset.kind));
    button.disabled = !review.of_files;
  }
}

// The classes that the label may become: the suggested one first, then those that match the filter.
function choices() {
  const { label, suggested } = review.suspects[position], text = find("filter").value.toLowerCase();
  const others = review.classes.filter((name) => name !== label && name !== suggested);
  return [suggested, ...others].filter((name) => name.toLowerCase().includes(text));
}

function showChoices() {
  const { decision } = review.suspects[position];
  find("choices").replaceChildren(...choices().slice(0, 60).map((name, i) => {
    const button = make("button", { type: "button", className: "plain", disabled: !review.of_files });
    if (i < 9) button.append(make("kbd", { textContent: i + 1 }), " ");
    button.append(name);
    button.setAttribute("aria-pressed", String(decision?.kind === "change" && decision.label === name));
    button.addEventListener("click", () => decide("change", name));
    return make("li", {}, button);
  }));
}

// -- decisions

function applyNews(list, { known, changes }) {
  list.known = known;
  for (const [number, decision] of Object.entries(changes)) list.suspects[number].decision = decision;
}

// Move on at once, so that the next key is about the next image; come back if it was not written.
function decide(kind, label = "") {
  if (!review || !review.of_files) return;
  const list = review, number = position, suspect = list.suspects[number], before = suspect.decision;
  suspect.decision = { kind, label };
  pending += 1;
  clearError();
  move(find("open-only").checked ? nextOpen(number) : Math.min(number + 1, list.suspects.length - 1));
  writing = writing.then(async () => {
    const body = { review: list.name, number, decision: kind, label, page, known: list.known };
    const content = await request("/api/labels/decide", body);
    applyNews(list, content);
    if (!content.accepted) {
      throw new Error("Another tab has decided on this image; that decision is shown. Decide again to replace it.");
    }
  }).catch((error) => {
    if (error instanceof RequestError) suspect.decision = before; // it was not written
    if (list === review) move(number);
    report(error);
  }).finally(() => {
    pending -= 1;
    showFacts();
  });
}

function undo() {
  if (!review) return;
  const list = review;
  writing = writing.then(async () => {
    const content = await request("/api/labels/undo", { review: list.name, page, known: list.known });
    applyNews(list, content);
    if (list === review) move(content.number ?? position);
  }).catch(report);
}

// Errors that the page makes itself are messages, too.
function report(error) {
  try {
    showError(error);
  } catch { /* shown */ }
}

function move(to) {
  position = to;
  show();
}

const step = (by) => move((position + by + review.suspects.length) % review.suspects.length);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (!review?.suspects.length || document.querySelector("dialog[open]")) return;
  if (event.target === find("filter")) {
    if (event.key === "Escape") { find("filter").value = ""; showChoices(); find("filter").blur(); }
    if (event.key === "Enter" && choices().length) { find("filter").blur(); decide("change", choices()[0]); }
    return;
  }
  if (event.target.matches("input:not([type=checkbox]), select, textarea")) return;
  const key = event.key.toLowerCase();
  const actions = {
    k: () => decide("keep"), d: () => decide("delete"), s: () => decide("skip"), u: undo,
    arrowleft: () => step(-1), arrowright: () => step(1), "/": () => find("filter").focus(),
  };
  if (/^[1-9]$/.test(key)) {
    const label = choices()[Number(key) - 1];
    if (label !== undefined) decide("change", label);
  } else if (actions[key]) {
    actions[key]();
  } else {
    return;
  }
  event.preventDefault();
});

for (const button of find("decide").querySelectorAll("[data-kind]")) {
  button.addEventListener("click", () => decide(button.dataset.kind));
}
find("undo").addEventListener("click", undo);
find("previous").addEventListener("click", () => step(-1));
find("next").addEventListener("click", () => step(1));
find("filter").addEventListener("input", showChoices);
find("list").addEventListener("change", () => openList().catch(showError));
find("open-only").addEventListener("change", () => {
  if (review?.suspects.length && find("open-only").checked) move(nextOpen(position - 1));
});

// -- finding suspects

async function followSearch(job) {
  find("find").disabled = true;
  try {
    await follow(find("find-note"), job);
    find("find-note").textContent = "done";
    await showLists(find("run").value);
  } catch (error) {
    find("find-note").textContent = error.status === 409 ? "cancelled; finished models are kept" : "";
    if (error.status !== 409) showError(error);
  } finally {
    find("find").disabled = !find("run").value;
  }
}

find("find").addEventListener("click", async () => {
  try {
    const { job } = await request("/api/labels/find", { run: find("run").value, folds: Number(find("folds").value) });
    await followSearch(job);
  } catch (error) {
    showError(error);
  }
});
find("find").disabled = !find("run").value;

// -- training again

const training = () => ({ review: review.name, run: find("run").value, name: find("confirm-name").value.trim() });

async function showCommand() {
  find("confirm-yes").disabled = true;
  try {
    const content = await request("/api/labels/command", training());
    find("confirm-command").textContent = content.command;
    find("confirm-facts").textContent = `${content.change} labels are changed and ${content.delete} images left out.`;
    if (!find("confirm-name").value) find("confirm-name").value = content.name;
    find("confirm-yes").disabled = false;
    return true;
  } catch (error) {
    find("confirm-command").textContent = `${error.message}: ${error.fix || ""}`;
    return false;
  }
}

find("train").addEventListener("click", async () => {
  await writing;
  find("confirm-name").value = "";
  await showCommand();
  find("confirm").showModal();
});
find("confirm-name").addEventListener("change", showCommand);
find("confirm-no").addEventListener("click", () => find("confirm").close());
find("confirm-yes").addEventListener("click", async () => {
  find("confirm-yes").disabled = true;
  try {
    const started = await request("/api/labels/train", training());
    find("confirm").close();
    await followTraining(started.id);
  } catch (error) {
    find("confirm").close();
    showError(error);
  }
});

async function followTraining(id) {
  find("train").disabled = true;
  for (;;) {
    const { state, lines } = await request("/api/labels/training", { training: id });
    find("train-state").textContent = { running: "The training is running.", done: "The training has ended.", failed: "The training has failed." }[state];
    find("train-lines").hidden = !lines.length;
    find("train-lines").textContent = lines.join("\n");
    if (state !== "running") break;
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  find("train").disabled = false;
}

showLists(new URLSearchParams(location.search).get("list")).catch(showError);
