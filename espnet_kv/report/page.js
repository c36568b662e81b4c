"use strict";
// Sorts a table by the column whose heading is clicked; what is missing stays last.
function sortBy(heading) {
  const table = heading.closest("table");
  const column = heading.cellIndex;
  const rising = heading.getAttribute("aria-sort") !== "ascending";
  for (const other of heading.parentElement.cells) {
    other.setAttribute("aria-sort", "none");
  }
  heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const asNumber = heading.classList.contains("number");
  const compare = (one, other) => {
    const [a, b] = [one, other].map((row) => row.cells[column].dataset.value);
    if (a === undefined || b === undefined) {
      return (a === undefined) - (b === undefined);
    }
    const order = asNumber ? a - b : a.localeCompare(b, "en", { numeric: true });
    return rising ? order : -order;
  };
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort(compare));
}

for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => sortBy(button.parentElement));
}
