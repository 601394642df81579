// Tables of reports and of the live page. An ES module; a report contains it in its own script.

// Sort by a click on a heading; unknown values come last in both directions.
export function makeSortable(root) {
  for (const table of root.querySelectorAll(".sortable")) {
    for (const button of table.querySelectorAll("thead button")) {
      button.addEventListener("click", () => {
        const head = button.closest("th"), key = button.dataset.sort;
        const now = head.getAttribute("aria-sort");
        const up = now ? now === "descending" : key === "order";
        for (const th of table.querySelectorAll("th[aria-sort]")) th.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const body = table.tBodies[0], value = (row) => row.dataset[key];
        const rows = [...body.rows].sort((a, b) => {
          if (value(a) === "" || value(b) === "") return (value(a) === "") - (value(b) === "");
          return (up ? 1 : -1) * (value(a) - value(b));
        });
        body.append(...rows);
      });
    }
  }
}

// Arrow keys move between the buttons in the cells of a table.
export function moveByArrowKeys(table) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  table.addEventListener("keydown", (event) => {
    const step = steps[event.key], cell = event.target.closest("td");
    if (!step || !cell) return;
    event.preventDefault();
    let row = cell.parentNode.rowIndex, column = cell.cellIndex;
    for (;;) {
      row += step[0]; column += step[1];
      const next = table.rows[row] && table.rows[row].cells[column];
      if (row < 1 || !next) return;
      const button = next.querySelector("button");
      if (button) { button.focus(); return; }
    }
  });
}
