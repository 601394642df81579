// The part Data: the images of a data set, its copies and unreadable files.
import { count, follow, make, request, showError, usesInWords } from "./app.js";

const find = (id) => document.getElementById(id);
const many = (n, one, more) => `${count(n)} ${n === 1 ? one : more}`;
let facts = null, label = "", page = 0, total = 0, token = 0;
let shown = []; // the images of the page, in order
const pages = new Map(); // answers, so that the next page is there at once

// -- the set

async function showSets() {
  const { sets } = await request("/api/data/sets", {});
  find("set").replaceChildren(...sets.map(({ id, name }) => make("option", { value: id, textContent: name })));
  const wanted = new URLSearchParams(location.search).get("set");
  if (sets.some(({ id }) => id === wanted)) find("set").value = wanted;
  if (sets.length) await openSet();
}

async function openSet() {
  const set = find("set").value;
  facts = null;
  pages.clear();
  find("found").hidden = true;
  find("images").replaceChildren();
  find("classes").replaceChildren();
  const { job } = await request("/api/data/open", { set });
  const content = await follow(find("set-note"), job);
  if (find("set").value !== set) return;
  facts = { set, ...content };
  label = "";
  find("summary").textContent = facts.summary;
  find("split").replaceChildren(...Object.entries(facts.splits).filter(([, n]) => n).map(([name, n]) => {
    const sealed = name === "test" && !facts.test_is_open ? ", sealed" : "";
    return make("option", { value: name, textContent: `${name} (${count(n)}${sealed})` });
  }));
  find("split").dataset.before = find("split").value;
  showClasses();
  await showPage(0);
}

function showClasses() {
  const rows = [["all", "", facts.splits], ...facts.classes.map((each) => [each.name, each.name, each])];
  find("classes").replaceChildren(...rows.map(([text, name, counts]) => {
    const button = make("button", { type: "button", className: "plain", textContent: text });
    button.setAttribute("aria-pressed", String(label === name));
    button.addEventListener("click", () => {
      label = name;
      showClasses();
      showPage(0).catch(showError);
    });
    const cells = ["train", "val", "test"].map((split) => make("td", { textContent: count(counts[split]) }));
    return make("tr", {}, make("th", { scope: "row" }, button), ...cells);
  }));
}

// -- the pages of images

function pageOf(number) {
  const body = { set: facts.set, split: find("split").value, label, page: number };
  const key = JSON.stringify(body);
  if (!pages.has(key)) {
    if (pages.size > 12) pages.delete(pages.keys().next().value);
    const asked = request("/api/data/images", body);
    pages.set(key, asked);
    asked.catch(() => pages.delete(key));
  }
  return pages.get(key);
}

const lastPage = () => Math.max(0, Math.ceil(total / facts.per_page) - 1);

async function showPage(number) {
  const current = ++token;
  const content = await pageOf(number);
  if (current !== token) return;
  page = number;
  total = content.total;
  shown = content.images;
  find("images").replaceChildren(...shown.map((image, i) => thumb(image, () => openImage(i))));
  find("page").value = page + 1;
  find("page").max = lastPage() + 1;
  find("pages").textContent = `of ${count(lastPage() + 1)}`;
  find("images-title").textContent = many(total, "image", "images") + (label ? ` of ${label}` : "");
  find("previous").disabled = page === 0;
  find("next").disabled = page === lastPage();
  if (page < lastPage()) pageOf(page + 1).catch(() => {});
}

function thumb(image, onOpen) {
  const picture = make("img", { src: image.source, alt: "", loading: "lazy", className: facts.large ? "large" : "" });
  const button = make("button", { type: "button", title: image.name }, picture, make("span", { className: "name", textContent: image.label }));
  button.setAttribute("aria-label", `${image.label}: ${image.name}`);
  button.addEventListener("click", onOpen);
  return make("li", {}, button);
}

const turn = (by) => facts && showPage(Math.min(Math.max(page + by, 0), lastPage())).catch(showError);
find("previous").addEventListener("click", () => turn(-1));
find("next").addEventListener("click", () => turn(1));
find("page").addEventListener("change", () => turn((Number(find("page").value) || 1) - 1 - page));
find("set").addEventListener("change", () => openSet().catch(showError));

document.addEventListener("keydown", (event) => {
  if (!facts || event.ctrlKey || event.metaKey || event.altKey) return;
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by || event.target.matches("input, select") || find("sealed").open) return;
  event.preventDefault();
  if (find("image").open) stepImage(by);
  else turn(by);
});

// -- the sealed test split

find("split").addEventListener("change", () => {
  if (!facts) return; // another set is being opened
  if (find("split").value !== "test" || facts.test_is_open) {
    find("split").dataset.before = find("split").value;
    showPage(0).catch(showError);
    return;
  }
  const uses = facts.test_uses;
  find("sealed-uses").textContent = facts.can_open_test
    ? `It ${usesInWords(uses)}.`
    : "Train on this set first; the test split is then opened in the run.";
  find("open-sealed").disabled = !facts.can_open_test;
  find("sealed").showModal();
});
find("sealed").addEventListener("close", () => {
  if (facts && !facts.test_is_open) find("split").value = find("split").dataset.before;
});
find("keep-sealed").addEventListener("click", () => find("sealed").close());
find("open-sealed").addEventListener("click", async () => {
  try {
    const { test_uses: uses } = await request("/api/data/open-test", { set: facts.set });
    facts.test_is_open = true;
    facts.test_uses = uses;
    const option = [...find("split").options].find(({ value }) => value === "test");
    option.textContent = `test (${count(facts.splits.test)})`;
    find("split").dataset.before = "test";
    find("sealed").close();
    await showPage(0);
  } catch (error) {
    find("sealed").close();
    showError(error);
  }
});

// -- one image

let opened = -1;

async function openImage(number) {
  opened = number;
  await showImage(shown[number]);
}

async function showImage(image) {
  find("image-title").textContent = image.label;
  find("image-facts").textContent = `${image.name}, ${image.split}:${image.number}`;
  find("views").replaceChildren();
  find("picture").src = image.source;
  find("image-previous").hidden = find("image-next").hidden = opened < 0;
  if (!find("image").open) find("image").showModal();
  const current = ++token;
  try {
    const content = await request("/api/data/image", { set: facts.set, split: image.split, number: image.number });
    if (current !== token) return;
    find("picture").src = content.source;
    find("image-facts").textContent = `${image.name}, ${image.split}:${image.number}, ${content.size}×${content.size} pixels for the network`;
    find("views-title").textContent = content.views.length
      ? `In epochs 1 to ${content.views.length} of a training with ${content.recipe}`
      : `${content.recipe} augments nothing`;
    find("views").replaceChildren(...content.views.map((source, i) =>
      make("li", {}, make("img", { src: source, alt: `Epoch ${i + 1}`, className: content.size > 96 ? "large" : "" }))));
  } catch (error) {
    find("image").close();
    showError(error);
  }
}

function stepImage(by) {
  if (opened >= 0) openImage((opened + by + shown.length) % shown.length);
}

find("image-previous").addEventListener("click", () => stepImage(-1));
find("image-next").addEventListener("click", () => stepImage(1));
find("image-close").addEventListener("click", () => find("image").close());

// -- copies and unreadable files

find("check").addEventListener("click", async () => {
  if (!facts) return;
  find("check").disabled = true;
  try {
    const { job } = await request("/api/data/check", { set: facts.set });
    showFound(await follow(find("check-note"), job));
  } catch (error) {
    showError(error);
  } finally {
    find("check").disabled = false;
  }
});

function showFound(found) {
  const across = (copies) => (copies.across_splits ? `, ${count(copies.across_splits)} of them in more than one split` : "");
  find("found-facts").textContent =
    `${many(found.images, "readable image", "readable images")}. ${many(found.exact.total, "group", "groups")} of equal images${across(found.exact)}; ` +
    `${many(found.near.total, "pair that looks", "pairs that look")} the same${across(found.near)}; ` +
    `${many(found.unreadable_total, "unreadable file", "unreadable files")}.`;
  find("found-groups").replaceChildren(
    ...found.problems.map((text) => make("p", { className: "note", textContent: text })),
    ...groupsOf("Equal images", found.exact), ...groupsOf("Images that look the same", found.near), ...unreadable(found),
    ...(found.notes.length ? [make("h3", { textContent: "Notes" }), make("ul", {}, ...found.notes.map((text) => make("li", { textContent: text })))] : []),
  );
  find("found").hidden = false;
  find("found").scrollIntoView({ block: "nearest" });
}

function groupsOf(title, copies) {
  if (!copies.total) return [];
  const shownOf = copies.groups.length < copies.total ? `, the first ${copies.groups.length} of ${count(copies.total)}` : "";
  return [make("h3", { textContent: title + shownOf }), ...copies.groups.map((group) => {
    const remarks = [group.across_splits && "in more than one split", group.two_labels && "under two labels", group.more && `and ${group.more} more`];
    const images = group.images.map((image) => (image.sealed
      ? make("li", { className: "sealed", textContent: "an image of the sealed test split" })
      : image.source ? thumb(image, () => { opened = -1; showImage(image); }) : make("li", { textContent: image.name })));
    return make("div", { className: "group" }, make("ul", { className: "thumbs" }, ...images), make("p", { className: "quiet small", textContent: remarks.filter(Boolean).join(", ") }));
  })];
}

function unreadable(found) {
  if (!found.unreadable_total) return [];
  const items = found.unreadable.map(({ name, label: of, reason }) => make("li", {}, make("code", { textContent: name }), ` (${of}): ${reason}`));
  if (found.unreadable_hidden) items.push(make("li", { textContent: `${count(found.unreadable_hidden)} of the sealed test split` }));
  return [make("h3", { textContent: "Unreadable files" }), make("ul", { className: "small" }, ...items)];
}

showSets().catch(showError);
