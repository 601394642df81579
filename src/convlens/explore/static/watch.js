// The part Watch: the table of runs and the curves of those that are selected, which follow the training.
import { clearError, make, percent, request, showError } from "./app.js";

const MAX_RUNS = 7; // lines that can be told apart
const body = document.getElementById("runs"), curves = document.getElementById("curves");
const connection = document.getElementById("connection"), dialog = document.getElementById("stop");
const selected = new Set();
let states = [], drawn = "", drawing = false, toStop = "";

const duration = (seconds) => {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
};
const when = (value, text) => (value === undefined || value === null ? "–" : text(value));

function row(state) {
  const box = make("input", { type: "checkbox", checked: selected.has(state.run), disabled: !state.epoch });
  box.setAttribute("aria-label", `Curves of ${state.run}`);
  box.addEventListener("change", () => {
    if (box.checked) selected.add(state.run); else selected.delete(state.run);
    if (selected.size > MAX_RUNS) selected.delete(selected.values().next().value);
    show();
  });
  const stop = make("button", { type: "button", className: "plain", textContent: "Stop" });
  stop.setAttribute("aria-label", `Stop ${state.run}`);
  stop.addEventListener("click", () => { toStop = state.run; dialog.showModal(); });
  const name = make("th", { scope: "row" }, make("bdi", { textContent: state.run }));
  if (state.data) name.append(make("span", { className: "quiet", textContent: ` ${state.data}` }));
  const cell = (text) => make("td", { textContent: text });
  const node = make(
    "tr", {}, make("td", {}, box), name, cell(state.problem ? `${state.state}: ${state.problem}` : state.state),
    cell(state.epochs ? `${state.epoch}/${state.epochs}` : "–"),
    cell(when(state.accuracy, (value) => percent(value))),
    cell(when(state.low, (low) => `${percent(low)} to ${percent(state.high)}`)),
    cell(state.split || "–"),
    cell(when(state.images_per_second, (value) => Math.round(value).toLocaleString("en"))),
    cell(state.state === "training" ? when(state.seconds_left, duration) : "–"),
    make("td", {}, ...(state.state === "training" ? [stop] : [])),
  );
  node.dataset.run = state.run;
  node.dataset.state = state.state;
  return node;
}

// Draw the table again, unless nothing in a row has changed: a focused control keeps the focus.
function show() {
  const focused = document.activeElement?.closest?.("tr")?.dataset.run;
  const index = focused && [...document.activeElement.closest("tr").querySelectorAll("input, button")].indexOf(document.activeElement);
  body.replaceChildren(...states.map(row));
  if (focused) {
    const again = [...body.rows].find((each) => each.dataset.run === focused);
    again?.querySelectorAll("input, button")[index]?.focus();
  }
  connection.textContent = states.length ? "" : "There are no runs here.";
  draw();
}

async function draw() {
  const runs = states.filter((state) => selected.has(state.run) && state.epoch);
  const wanted = JSON.stringify(runs.map((state) => [state.run, state.epoch, state.state]));
  if (drawing || wanted === drawn) return;
  if (!runs.length) {
    drawn = wanted;
    curves.replaceChildren(make("p", { className: "quiet", textContent: "Select runs whose epochs have been recorded." }));
    return;
  }
  drawing = true;
  try {
    const answer = await request("/api/watch/curves", { runs: runs.map((state) => state.run) });
    // Rendered by the server's templates, which escape names; the policy of the page runs no scripts in it.
    const parsed = new DOMParser().parseFromString(answer.html, "text/html");
    curves.replaceChildren(...parsed.body.childNodes);
    drawn = wanted;
    clearError();
  } catch (error) {
    showError(error);
    drawn = wanted;
  } finally {
    drawing = false;
  }
  draw(); // an epoch may have ended meanwhile
}

const events = new EventSource("/api/watch/events");
events.addEventListener("message", (event) => {
  const isFirst = !states.length;
  states = JSON.parse(event.data).runs;
  if (isFirst) {
    const first = states.find((state) => state.epoch);
    if (first) selected.add(first.run);
  }
  show();
});
events.addEventListener("error", () => {
  connection.textContent = "The connection was lost; trying again …";
});

document.getElementById("stop-no").addEventListener("click", () => dialog.close());
document.getElementById("stop-yes").addEventListener("click", async () => {
  dialog.close();
  try {
    await request("/api/watch/stop", { run: toStop });
  } catch (error) {
    showError(error);
  }
});
window.addEventListener("pagehide", () => events.close());
