// The part Judge: the figures of a run on a split, its images, and the comparison of two runs.
import { clearError, count, follow, make, request, showError, usesInWords } from "./app.js";
import { showImages } from "./judge-gallery.js";
import { makeSortable, moveByArrowKeys } from "./tables.js";

const find = (id) => document.getElementById(id);
let judged = null; // the answer about the run and split that are shown
let shownSplit = "val";
let newest = 0; // requests for figures that are not the newest are dropped

// -- figures

// The sections are rendered by templates of the report, which escape names. A parsed document runs
// no scripts, and the policy of the page would refuse them.
function parsed(html) {
  const nodes = new DOMParser().parseFromString(html, "text/html").body;
  makeSortable(nodes);
  for (const image of nodes.querySelectorAll("img")) image.loading = "lazy";
  return [...nodes.childNodes];
}

const card = (id, title, html) => {
  const heading = make("h2", { id: `${id}-title`, textContent: title });
  const section = make("section", { className: "card" }, heading, ...parsed(html));
  section.setAttribute("aria-labelledby", heading.id);
  return section;
};

const folded = (title, ...children) => {
  const details = make("details", { className: "card" }, make("summary", {}, make("h2", { textContent: title })));
  details.append(...children);
  return details;
};

const missing = (lines) => lines.map((line) => make("p", { className: "note", textContent: line }));

async function showFigures() {
  const run = find("run").value, split = find("split").value, mine = ++newest;
  let content;
  clearError();
  try {
    const { job } = await request("/api/judge/figures", { run, split });
    content = await follow(find("figures-note"), job);
  } catch (error) {
    if (mine !== newest) return;
    clear(); // what is shown is of another run or split
    throw error;
  }
  if (mine !== newest) return;
  judged = content;
  shownSplit = split;
  showSeal();
  const html = new Map(content.sections.map((section) => [section.id, section]));
  const top = (id) => (html.has(id) ? [card(id, html.get(id).title, html.get(id).html)] : []);
  find("summary").replaceChildren(...top("summary"), ...missing(content.missing));
  find("confusion").replaceChildren(...top("confusion"));
  listenToCells();
  const others = content.sections.filter(({ id }) => id !== "summary" && id !== "confusion");
  find("sections").replaceChildren(
    ...others.map((section) => folded(section.title, ...parsed(section.html))),
    ...content.inside.map(insideSection),
  );
  find("comparison").replaceChildren();
  find("gallery").hidden = !content.gallery;
  await Promise.all([
    content.gallery && openGallery(mine),
    find("other").value && find("other").value !== run && compare(mine),
  ]);
}

function clear() {
  judged = null;
  for (const id of ["seal", "summary", "comparison", "confusion", "sections"]) find(id).replaceChildren();
  find("gallery").hidden = true;
}

// A section that takes some seconds is computed when it is opened.
function insideSection({ id, title }) {
  const note = make("div", { className: "progress quiet small" });
  const details = folded(title, note), gallery = judged.gallery;
  let asked = false;
  details.addEventListener("toggle", async () => {
    if (!details.open || asked) return;
    asked = true;
    try {
      const { job } = await request("/api/judge/section", { gallery, section: id });
      const answer = await follow(note, job);
      details.append(...missing(answer.missing), ...parsed(answer.html));
    } catch (error) {
      asked = false;
      details.open = false;
      showError(error);
    }
  });
  return details;
}

async function compare(mine) {
  const runs = [find("run").value, find("other").value];
  const { job } = await request("/api/judge/compare", { runs, split: shownSplit });
  const content = await follow(find("figures-note"), job);
  if (mine !== newest) return;
  const [first, ...others] = content.sections.filter(({ id }) => id === "differences").concat(
    content.sections.filter(({ id }) => id !== "differences"),
  );
  const section = card("comparison", "Comparison", first ? first.html : "");
  section.querySelector("h2").after(make("p", { className: "verdict", textContent: content.verdict }), ...missing(content.missing));
  find("comparison").replaceChildren(section, ...others.map((each) => folded(each.title, ...parsed(each.html))));
}

// -- the sealed test split

function showSeal() {
  const test = find("split").querySelector("[value=test]");
  test.textContent = judged.test_is_open ? "test" : "test, sealed";
  const used = usesInWords(judged.test_uses);
  const chose = judged.validation_chose_epoch ? ", which chose the epoch, so the numbers are slightly optimistic" : "";
  const text = shownSplit === "test"
    ? `The test split of this run ${used}, this time included. convlens never uses it to choose anything.`
    : `These are validation images${chose}. The test split of this run ${used}.`;
  find("seal").replaceChildren(make("p", { className: shownSplit === "test" ? "quiet" : "note", textContent: text }));
}

function askToOpen() {
  const other = find("other").value;
  const used = judged && judged.run === find("run").value ? judged.test_uses : null;
  find("sealed-uses").textContent = used === null ? "" : `It ${usesInWords(used)}.`;
  find("sealed-both").hidden = !other || other === find("run").value;
  find("sealed").showModal();
}

function keepSealed() {
  find("sealed").close();
  find("split").value = "val";
  showFigures().catch(showError);
}

find("keep-sealed").addEventListener("click", keepSealed);
find("sealed").addEventListener("cancel", (event) => { event.preventDefault(); keepSealed(); });
find("open-sealed").addEventListener("click", async () => {
  find("sealed").close();
  try {
    for (const run of new Set([find("run").value, find("other").value].filter(Boolean))) {
      await request("/api/judge/open-test", { run });
    }
    await showFigures();
  } catch (error) {
    find("split").value = shownSplit;
    showError(error);
  }
});

// Another run is sealed on its own: whatever is chosen, test figures are shown only after the question.
for (const id of ["run", "other", "split"]) {
  find(id).addEventListener("change", () => {
    if (id !== "split") find("split").value = "val";
    const isOpen = judged && judged.run === find("run").value && judged.test_is_open && !find("other").value;
    if (find("split").value === "test" && !isOpen) askToOpen();
    else showFigures().catch(showError);
  });
}

// -- images

let pressed = null; // the cell whose images are shown

function listenToCells() {
  pressed = null;
  const matrix = find("matrix");
  if (matrix) moveByArrowKeys(matrix);
  for (const button of find("confusion").querySelectorAll("[data-cell]")) {
    button.addEventListener("click", () => {
      const [target, pred] = button.dataset.cell.split("-");
      find("target").value = target;
      find("pred").value = pred;
      find("only").value = "all";
      if (find("order").value === "number") find("order").value = "worst";
      press(button);
      list().catch(showError);
      find("gallery").scrollIntoView({ block: "nearest" });
    });
  }
}

function press(button) {
  pressed?.setAttribute("aria-pressed", "false");
  pressed = button;
  pressed?.setAttribute("aria-pressed", "true");
}

async function openGallery(mine) {
  const any = () => make("option", { value: "", textContent: "any" });
  for (const id of ["target", "pred"]) {
    const names = judged.classes.map((name, number) => make("option", { value: String(number), textContent: name }));
    find(id).replaceChildren(any(), ...names);
  }
  find("only").value = "wrong";
  try {
    const { job } = await request("/api/judge/load", { gallery: judged.gallery });
    await follow(find("load-note"), job);
  } catch (error) { // the images have moved or changed; the figures do not need them
    find("gallery").hidden = true;
    for (const button of find("confusion").querySelectorAll("[data-cell]")) button.disabled = true;
    throw error;
  }
  if (mine === newest) await list();
}

let newestList = 0; // answers to older requests are dropped
async function list() {
  const gallery = judged.gallery, classes = judged.classes, mine = ++newestList;
  const chosen = (id) => (find(id).value === "" ? null : Number(find(id).value));
  const content = await request("/api/judge/list", {
    gallery, target: chosen("target"), pred: chosen("pred"), only: find("only").value, order: find("order").value,
  });
  if (mine !== newestList || judged?.gallery !== gallery) return;
  const shown = content.numbers.length;
  const first = shown < content.total ? `, of which the first ${count(shown)} are listed` : "";
  find("gallery-note").textContent = `${count(content.total)} of ${count(judged.images)} images${first}`;
  showImages(gallery, classes, content);
}

for (const id of ["target", "pred", "only", "order"]) {
  find(id).addEventListener("change", () => {
    press(null);
    list().catch(showError);
  });
}

const wanted = new URLSearchParams(location.search).get("run");
if ([...find("run").options].some((option) => option.value === wanted)) find("run").value = wanted;
if (find("run").value) showFigures().catch(showError);
