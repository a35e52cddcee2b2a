// A row's whole text, in a dialog.

import { get, isAbort } from "./api.js";
import { anchor, button, byId, copyText, el, problemLine } from "./nodes.js";
import { partsView } from "./row_text.js";
import { state } from "./state.js";
import { brief, count, valueName } from "./words.js";

let flight = null;
let focusAgain = null; // goes back to where the dialog was opened

export async function openRow(row) {
  const dialog = byId("row");
  const opener = document.activeElement;
  flight?.abort();
  const controller = (flight = new AbortController());
  fill(`Row ${count(row)}`, el("p", { class: "wait" }, "The row is being read."));
  if (!dialog.open) {
    focusAgain = anchor(opener);
    dialog.showModal();
  }
  try {
    const found = await get(`/api/rows/${state.index.id}/${row}`, controller.signal);
    fill(
      brief(found.id, 80),
      factsView(found),
      el(
        "div",
        { class: "whole", tabindex: 0, role: "group", "aria-label": "Text of the row" },
        partsView(found.parts),
      ),
    );
  } catch (problem) {
    if (!isAbort(problem))
      fill(
        `Row ${count(row)}`,
        problemLine(problem, () => openRow(row)),
      );
  }
}

function fill(title, ...parts) {
  const dialog = byId("row");
  const close = button("Close", () => dialog.close(), { class: "quiet" });
  const copy = button("Copy the text", () => copyText(textOf(dialog), copy), { class: "quiet" });
  const hasText = parts.some((part) => part.classList.contains("whole"));
  dialog.replaceChildren(
    el("header", {}, el("h2", { id: "row-title", dir: "auto" }, title), el("span", {}, hasText && copy, close)),
    ...parts,
  );
  close.focus();
}

// As it stands in the corpus, control characters included.
const textOf = (dialog) =>
  dialog
    .querySelector(".parts")
    .parts.map(({ text }) => text)
    .join("\n\n");

function factsView({ row, source, columns }) {
  const pairs = [
    ["Row", count(row)],
    ["Source", source === null ? null : valueName(source)],
  ];
  for (const [name, value] of Object.entries(columns ?? {}))
    pairs.push([brief(name, 30), value === null ? null : valueName(value)]);
  const shown = pairs.filter(([, value]) => value !== null);
  return el("dl", {}, ...shown.flatMap(([name, value]) => [el("dt", {}, name), el("dd", { dir: "auto" }, value)]));
}

// A click beside the dialog closes it.
byId("row").addEventListener("click", (event) => event.target === event.currentTarget && event.currentTarget.close());
// The list below may have changed meanwhile: then the browser finds no node to give the focus back to.
byId("row").addEventListener("close", () => {
  flight?.abort();
  if (!document.activeElement?.checkVisibility() || document.activeElement === document.body) focusAgain?.();
});
