// The part Try: one image and what a model makes of it.
import { make, percent, request, showError } from "./app.js";

const run = document.getElementById("run"), file = document.getElementById("file");

file.addEventListener("change", async () => {
  try {
    const { image } = await request(`/api/try/images?name=${encodeURIComponent(file.files[0].name)}`, file.files[0]);
    const { top } = await request("/api/try/predict", { run: run.value, image });
    document.getElementById("top").replaceChildren(...top.map(([name, p]) => make("li", { textContent: `${name} ${percent(p)}` })));
  } catch (error) {
    showError(error);
  }
});
