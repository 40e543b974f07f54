"use strict";
// What a pointer or a keyboard adds; text, tables and figures are there without it.
{
  const tip = document.getElementById("tip");
  for (const title of document.querySelectorAll("svg .hit > title")) {
    title.parentNode.dataset.tip = title.textContent; // shown at once instead of after a while
    title.remove();
  }
  document.addEventListener("pointermove", (event) => {
    const text = event.target.dataset ? event.target.dataset.tip : undefined;
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${event.clientY > box.height + 20 ? event.clientY - box.height - 12 : event.clientY + 18}px`;
  });

  for (const entry of document.querySelectorAll(".legend li")) { // a series comes and goes
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    button.append(...entry.childNodes);
    entry.append(button);
    button.addEventListener("click", () => {
      const gone = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!gone));
      for (const part of entry.closest("figure").querySelectorAll(`g[data-series="${entry.dataset.series}"]`))
        part.classList.toggle("faded", gone);
    });
  }

  const number = (text) => parseFloat(text.replace(/[,\s]/g, "").replace(/^1\//, ""));
  for (const head of document.querySelectorAll(".tabled thead th")) { // sorted by a column
    const body = head.closest("table").tBodies[0];
    if (body.rows.length < 4 || head.querySelector(".hidden")) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[head.cellIndex].textContent;
      const compare = (a, b) => {
        const x = number(key(a)), y = number(key(b));
        if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y) || key(a).localeCompare(key(b), "en", { numeric: true });
        return x - y;
      };
      body.append(...[...body.rows].sort((a, b) => (down ? -1 : 1) * compare(a, b)));
    });
  }

  for (const command of document.querySelectorAll(".command")) {
    if (!navigator.clipboard) break;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(command.querySelector("code").textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    command.querySelector("p").append(button);
  }
}
