// Copied, or learned? The longest pieces of the completion that stand word for word in the corpus.

import { isAbort } from "./api.js";
import { postOfAnswer } from "./answering.js";
import { cover, preview } from "./completion.js";
import { byId, button, el, problemLine } from "./nodes.js";
import { openRow } from "./row_dialog.js";
import { on, state } from "./state.js";
import { choose } from "./stretch.js";
import { brief, counted, count } from "./words.js";

async function find() {
  const { answer } = state;
  byId("copied").hidden = true;
  try {
    const found = await postOfAnswer("/api/spans", {});
    if (state.answer === answer) draw(found);
  } catch (problem) {
    if (isAbort(problem) || state.answer !== answer) return;
    byId("copied").hidden = false;
    byId("copied").replaceChildren(el("h2", {}, "Copied, or learned?"), problemLine(problem, find));
  }
}

function draw({ spans, words }) {
  cover(spans.map(({ tokens }) => tokens).filter(Boolean)); // pieces that no tokens hold are only listed
  const pieces = el("details", { open: matchMedia("(min-width: 60.01rem)").matches });
  pieces.append(
    el("summary", {}, counted(spans.length, "piece")),
    el("ul", { class: "pieces" }, ...spans.map(pieceView)),
  );
  byId("copied").replaceChildren(
    el("h2", {}, "Copied, or learned?"),
    el(
      "p",
      { class: "certainty" },
      `${words.replace(/\.?$/, ".")}${spans.length ? " The dotted line marks them." : ""}`,
    ),
    ...(spans.length ? [pieces] : []),
  );
  byId("copied").hidden = false;
}

function pieceView(span) {
  const { text, count: times, tokens } = span;
  const places = el("div", { class: "places", hidden: true });
  const piece = button(
    el("span", { class: "text", dir: "auto" }, brief(text, 120)),
    () => {
      const isOpen = places.hidden;
      if (isOpen && !places.hasChildNodes()) places.append(...placesView(span));
      places.hidden = !isOpen;
      piece.setAttribute("aria-expanded", String(isOpen));
    },
    { class: "piece", "aria-expanded": "false" },
  );
  piece.append(el("small", {}, counted(times, "place")));
  const item = el("li", {}, piece, places);
  item.addEventListener("pointerenter", () => tokens && preview(tokens));
  item.addEventListener("pointerleave", () => preview(null));
  item.addEventListener("focusin", () => tokens && preview(tokens));
  item.addEventListener("focusout", () => preview(null));
  return item;
}

function placesView({ rows, count: times, tokens }) {
  const links = rows.map(({ row, id }) =>
    button(el("span", { dir: "auto" }, brief(id, 40)), () => openRow(row), {
      class: "id",
      "aria-label": `Open row ${brief(id, 40)}`,
    }),
  );
  const more = times > rows.length ? el("span", {}, `and ${count(times - rows.length)} more`) : "";
  return [...links, more, tokens ? button("Ask about these tokens", () => choose([tokens]), { class: "quiet" }) : ""];
}

on("ready", find);
on("asked cleared", () => (byId("copied").hidden = true));
