// What the pages of all parts share: requests, messages, elements, the theme button.

// A request to the server. `body` is sent as JSON unless it is a Blob. Errors are `RequestError`s.
export class RequestError extends Error {
  constructor(status, content) {
    super(content.error || "the server did not answer as expected");
    this.status = status;
    this.fix = content.fix || "";
    this.content = content;
  }
}

export async function request(path, body, options = {}) {
  const isFile = body instanceof Blob;
  const init = { method: options.method || (body === undefined ? "GET" : "POST"), signal: options.signal };
  if (body !== undefined) {
    init.body = isFile ? body : JSON.stringify(body);
    init.headers = { "content-type": isFile ? "application/octet-stream" : "application/json" };
  }
  let response;
  try {
    response = await fetch(path, init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError(0, { error: "the server does not answer", fix: "is convlens explore still running?" });
  }
  const content = await response.json().catch(() => ({}));
  if (!response.ok) throw new RequestError(response.status, content);
  return content;
}

// Wait for long work; `onProgress` gets {state, done, total, text}, and is waited for.
export async function finished(job, onProgress = () => {}, signal = undefined) {
  for (;;) {
    const state = await request(`/api/jobs/${job}`, undefined, { signal });
    await onProgress(state);
    if (state.state === "done") return state.result;
    if (state.state === "failed") throw new RequestError(422, state);
    if (state.state === "cancelled") throw new RequestError(409, { error: "cancelled" });
    await new Promise((resolve) => setTimeout(resolve, 250));
  }
}

// Follow a job in a note: a progress bar, a button that cancels the job, and what it says.
export function follow(note, job) {
  const bar = make("progress"), text = make("span", { className: "quiet" });
  const cancel = make("button", { type: "button", className: "plain", textContent: "Cancel" });
  bar.setAttribute("aria-label", "Progress");
  cancel.addEventListener("click", () => request(`/api/jobs/${job}`, undefined, { method: "DELETE" }).catch(showError));
  note.replaceChildren(bar, cancel, text);
  return finished(job, (state) => {
    if (state.total) { bar.max = state.total; bar.value = state.done; } else bar.removeAttribute("value");
    text.textContent = state.text || state.title;
  }).finally(() => note.replaceChildren());
}

// Whether an error only says that something newer has replaced the request.
export const isReplaced = (error) => error.name === "AbortError" || error.status === 409;

export function showError(error) {
  if (isReplaced(error)) return;
  const box = document.getElementById("messages");
  const close = make("button", { type: "button", className: "plain", textContent: "Close" });
  const text = error.fix ? `${error.message}: ${error.fix}` : error.message;
  const note = make("div", { className: "note" }, make("p", { textContent: text }), close);
  close.addEventListener("click", () => note.remove());
  box.replaceChildren(note);
  if (!(error instanceof RequestError)) throw error;
}

export const clearError = () => document.getElementById("messages").replaceChildren();

// An element with properties and children. Text is only ever set as text, never as HTML.
export function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export const count = (n) => n.toLocaleString("en");
const times = (n) => (n === 1 ? "once" : `${count(n)} times`);

// How often a test split has been used: "has been used once".
export const usesInWords = (n) => (n ? `has been used ${times(n)}` : "has never been used");

export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;

// A class and its probability, as an item of a list `bars`; `marks` lie on the bar.
export function probabilityBar({ label, prob }, ...marks) {
  const fill = make("span", { className: "fill" });
  fill.style.width = percent(prob);
  return make(
    "li", {}, make("bdi", { className: "name", textContent: label, title: label }),
    make("span", { className: "bar-track" }, fill, ...marks), make("span", { className: "share", textContent: percent(prob) }),
  );
}

// Light and dark: the system preference applies until the button is pressed.
const root = document.documentElement, theme = document.getElementById("theme");
const system = window.matchMedia("(prefers-color-scheme: dark)");
export const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";

function labelTheme() {
  theme.textContent = isDark() ? "Light" : "Dark";
  theme.setAttribute("aria-label", `Use ${isDark() ? "light" : "dark"} colors`);
}

if (localStorage.getItem("theme")) root.dataset.theme = localStorage.getItem("theme");
theme.hidden = false;
labelTheme();
theme.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
  labelTheme();
});
system.addEventListener("change", labelTheme);
