// The corpus by its words: a view of its own, with the same filters by source and column as the examples.

import { isAbort, post } from "./api.js";
import { factsOf } from "./card.js";
import { filterPanel } from "./filters.js";
import { announce, byId, button, el, problemLine } from "./nodes.js";
import { partsView } from "./row_text.js";
import { hasFilters, nameOf, on, state, tell } from "./state.js";
import { brief, counted } from "./words.js";

const PAGE = 20;
const PAUSE = 220; // ms after the last letter
const LONG = 900; // characters

let flight = null;
let pause = null;
let field, status, list, more, trouble;
let shown = 0;

function build() {
  field = el("input", {
    type: "search",
    id: "words",
    dir: "auto",
    autocomplete: "off",
    placeholder: "Words of the rows you look for",
  });
  field.addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(() => ((state.words = field.value), tell("words")), PAUSE);
  });
  status = el("p", { class: "note", role: "status" });
  list = el("div", { class: "found" });
  trouble = el("div");
  more = button(`Show ${PAGE} more`, () => search(shown), { class: "more" });
  more.hidden = true;
  const form = el(
    "form",
    { role: "search" },
    el("label", { for: "words" }, `Search the corpus of ${nameOf(state.index)}`),
    field,
  );
  form.addEventListener("submit", (event) => event.preventDefault());
  byId("searching").replaceChildren(form, filtersView(), status, trouble, list, more);
}

function filtersView() {
  const hasAny = state.index.sources.length > 1 || state.index.columns.length > 0;
  return hasAny
    ? el(
        "details",
        { open: hasFilters({ ...state.filters, text: "" }) },
        el("summary", {}, "Filters"),
        filterPanel({ hasWords: false }),
      )
    : "";
}

function draw() {
  byId("searching").hidden = state.view !== "search";
  byId("asking").hidden = state.view === "search";
  if (state.view !== "search") return;
  if (!field) build();
  if (field.value !== state.words) field.value = state.words;
  search(0);
}

async function search(offset) {
  flight?.abort();
  const controller = (flight = new AbortController());
  trouble.replaceChildren();
  if (!state.words.trim()) return empty("Type a word or several. Rows in which all of them occur are listed.");
  const body = {
    index: state.index.id,
    text: state.words,
    filters: { ...state.filters, text: "" },
    limit: PAGE,
    offset,
  };
  try {
    const { matching, rows } = await post("/api/search", body, controller.signal);
    if (flight !== controller) return;
    const cards = rows.map(rowView);
    if (offset) list.append(...cards);
    else list.replaceChildren(...cards);
    shown = offset + rows.length;
    more.hidden = shown >= matching || !rows.length;
    status.textContent = matching
      ? `${counted(matching, "row has", "rows have")} all of these words.`
      : "No row has all of these words. Try fewer words, or remove a filter.";
    if (offset) announce(`${counted(rows.length, "more row is", "more rows are")} listed.`);
  } catch (problem) {
    if (!isAbort(problem) && flight === controller) trouble.replaceChildren(problemLine(problem, () => search(offset)));
  }
}

function empty(words) {
  list.replaceChildren();
  more.hidden = true;
  status.textContent = words;
}

function rowView(hit) {
  const parts = partsView(hit.parts);
  for (const { body } of parts.parts) mark(body);
  const length = hit.parts.reduce((sum, { text }) => sum + text.length, 0);
  const node = el(
    "article",
    { class: "hit", "aria-label": `Row ${brief(hit.id)}` },
    el("div", { class: "facts" }, ...factsOf(hit)),
    parts,
  );
  if (length > LONG) {
    parts.classList.add("folded");
    const unfold = button(
      "Show all of it",
      () => {
        const isOpen = !parts.classList.toggle("folded");
        unfold.textContent = isOpen ? "Show less" : "Show all of it";
        unfold.setAttribute("aria-expanded", String(isOpen));
      },
      { class: "quiet", "aria-expanded": "false" },
    );
    node.append(unfold);
  }
  return node;
}

// The words that were looked for, marked where they stand.
function mark(body) {
  const words = state.words
    .trim()
    .split(/\s+/)
    .map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  const pieces = body.textContent.split(new RegExp(`(${words.join("|")})`, "giu"));
  body.replaceChildren(...pieces.map((piece, place) => (place % 2 ? el("mark", {}, piece) : piece)));
}

on("view words filters", draw);
on("index", () => {
  field = null;
  if (state.view === "search") draw();
});
