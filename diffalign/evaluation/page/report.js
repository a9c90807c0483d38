"use strict";
// A click on a column's head sorts by it: by the number a cell begins with, else by its text; empty cells last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  if (body.rows.length < 2) continue;
  heads.forEach((head, column) => {
    if (head.classList.contains("plain")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent || "name";
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].textContent.trim();
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (!x || !y) return (x ? 0 : 1) - (y ? 0 : 1);
        const gap = parseFloat(x) - parseFloat(y);
        return (Number.isNaN(gap) ? x.localeCompare(y) : gap) * (down ? -1 : 1);
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
