(function () {
  // Light and dark: the system preference applies until the button is pressed.
  const root = document.documentElement, theme = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const label = () => { theme.textContent = dark() ? "Light" : "Dark"; theme.setAttribute("aria-label", "Use " + (dark() ? "light" : "dark") + " colors"); };
  theme.hidden = false;
  label();
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; label(); });
  system.addEventListener("change", label);

  // Highlight the current section in the navigation.
  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const a of links.values()) a.removeAttribute("aria-current");
      links.get(entry.target.id).setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-15% 0px -75% 0px" });
  for (const section of document.querySelectorAll("main > section")) observer.observe(section);

  makeSortable(document);

  // The images of a cell. Names are only ever set as text, never as HTML.
  const store = document.getElementById("cells"), shown = document.getElementById("shown");
  if (!store) return;
  const content = JSON.parse(store.textContent);
  const make = (tag, text, className) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };
  const buttons = [...document.querySelectorAll("[data-cell]")];
  const show = (button) => {
    for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
    const key = button.dataset.cell, cell = content.cells[key];
    const [target, pred] = key.split("-").map((i) => content.classes[i]);
    const correct = key.split("-")[0] === key.split("-")[1];
    const title = make("h3");
    title.append(make("bdi", target), correct ? ", correct" : ", predicted as ");
    if (!correct) title.append(make("bdi", pred));
    const partial = cell.images.length < cell.n;
    const order = correct ? "least confident" : "most confident";
    const lead = partial ? "the " + cell.images.length + " " + order + " of " + cell.n.toLocaleString("en") + " images"
      : cell.n + (cell.n === 1 ? " image" : " images, " + order + " first");
    const list = make("ol", undefined, "gallery");
    for (const [source, id, confidence] of cell.images) {
      const item = make("li"), figure = make("figure"), image = make("img"), caption = make("figcaption", (100 * confidence).toFixed(0) + "% confidence");
      image.src = source;
      image.alt = "Image " + id;
      const name = make("span", undefined, "id");
      name.title = id;
      name.append(make("bdi", id));
      caption.append(name);
      figure.append(image, caption);
      item.append(figure);
      list.append(item);
    }
    shown.replaceChildren(title, make("p", lead, "quiet small"), list);
    smooth(list);
    const box = shown.getBoundingClientRect();
    if (box.top > window.innerHeight - 160) shown.scrollIntoView({ block: "nearest" });
  };
  for (const button of buttons) button.addEventListener("click", () => show(button));

  const matrix = document.getElementById("matrix");
  if (matrix) moveByArrowKeys(matrix);

  // Small images are shown pixel by pixel, larger ones smoothly.
  function smooth(container) {
    for (const image of container.querySelectorAll("img")) {
      const update = () => image.classList.toggle("large", image.naturalWidth > 64);
      if (image.complete) update(); else image.addEventListener("load", update);
    }
  }
})();
