// Methods side by side: what each lists first, and where they agree. A row that several list is marked; pointing at
// it, or reaching it with the keyboard, shows it in the other columns.

import { isAbort } from "./api.js";
import { streamOfAnswer } from "./answering.js";
import { byId, copyText, button, el, problemLine, redraw, toggle } from "./nodes.js";
import { openRow } from "./row_dialog.js";
import { askedTokens, isReady, labelOf, methodOf, on, state, tell } from "./state.js";
import { brief, counted, listed, score, steps } from "./words.js";

const TOP = 10;

let flight = null;
let columns = new Map(); // by method: its rows, or the problem
let overlaps = [];
let wait = "";
let asked = ""; // what the columns are of

const chosen = () => state.methods.filter((name) => state.index.methods.some((method) => method.name === name));

// The first two methods that are ready, until the reader has chosen.
function suggest() {
  if (state.methods.length) return;
  const ready = state.index.methods.filter(({ is_ready: isOn }) => isOn).map(({ name }) => name);
  const other = ready.find((name) => name === "bm25") ?? ready[1];
  state.methods = [...new Set([ready[0], other])].filter(Boolean);
}

async function compare() {
  if (state.view !== "methods" || !isReady()) return;
  suggest();
  const methods = chosen();
  const wanted = JSON.stringify([state.answer.id, askedTokens(), methods, state.filters, state.isFolding]);
  if (wanted === asked) return draw();
  flight?.abort();
  asked = wanted;
  if (methods.length < 2) return draw();
  const controller = (flight = new AbortController());
  const body = { tokens: askedTokens(), methods, top: TOP, filters: state.filters, fold: state.isFolding };
  overlaps = [];
  columns.clear(); // those of other tokens or rows
  draw();
  try {
    for await (const event of streamOfAnswer("/api/comparisons", body, controller.signal)) {
      if (event.type === "method") columns.set(event.method, event);
      if (event.type === "done") overlaps = event.overlaps;
      wait = waitWords(event);
      draw();
    }
  } catch (problem) {
    if (isAbort(problem)) return;
    asked = "";
    draw(problem);
  }
}

function waitWords({ type, what, done, total, position }) {
  if (type === "progress") return steps(what, done, total);
  return position ? `${counted(position, "question is", "questions are")} before this one.` : "";
}

// -- drawing

function draw(problem = null) {
  const methods = chosen();
  const counts = sharing(methods);
  redraw(
    byId("comparison"),
    choosers(),
    el("p", { class: "overlap", "aria-live": "polite" }, overlapWords(methods)),
    problem && problemLine(problem, compare),
    el("div", { class: "methods" }, ...(methods.length < 2 ? [] : methods.map((name) => columnView(name, counts)))),
  );
}

function choosers() {
  const { methods } = state.index;
  const chips = methods
    .filter(({ is_ready: isOn }) => isOn)
    .map(({ name, label, note }) =>
      toggle(label, chosen().includes(name), () => flip(name), {
        class: "chip-button",
        "data-key": `method-${name}`,
        title: note,
      }),
    );
  const others = methods.filter(({ is_ready: isOn }) => !isOn).map(absentView);
  return el(
    "div",
    { class: "choosers" },
    el("div", { class: "values", role: "group", "aria-label": "Methods" }, ...chips),
    others.length ? el("ul", { class: "absent" }, ...others) : "",
  );
}

// A method that is not ready says what makes it ready.
function absentView({ label, note }) {
  const pieces = note.replace(/^run:/, "Run:").split(/(whence .+?)(?:\.\s|\.?$)/);
  const shown = pieces.flatMap((piece, place) => {
    if (place % 2 === 0) return piece.trim() ? [el("span", {}, piece.trim())] : [];
    const copy = button("Copy", () => copyText(piece, copy), {
      class: "quiet",
      "aria-label": `Copy ${brief(piece, 80)}`,
    });
    return [el("code", {}, piece), copy];
  });
  return el("li", {}, el("span", {}, `${label} is not ready.`), ...shown);
}

function flip(name) {
  const { methods } = state;
  state.methods = methods.includes(name) ? methods.filter((each) => each !== name) : [...methods, name];
  tell("methods");
}

// Of each row, the methods that list it, with its rank there.
function sharing(methods) {
  const ranks = new Map();
  for (const name of methods)
    for (const { row, rank } of columns.get(name)?.helpful ?? [])
      ranks.set(row, [...(ranks.get(row) ?? []), [name, rank]]);
  return ranks;
}

function overlapWords(methods) {
  if (methods.length < 2) return "Choose two or more methods.";
  if (!overlaps.length) return wait || "";
  const pair = ({ a, b, shared }, verb = "") => `${labelOf(a)} and ${labelOf(b)} ${verb}${shared || "none"}`;
  const [first, ...others] = overlaps;
  if (!others.length) return `${pair(first, "share ")} of their top ${first.of}.`;
  return `Of their top ${first.of}, ${listed([pair(first, "share "), ...others.map((each) => pair(each))])}.`;
}

function columnView(name, counts) {
  const found = columns.get(name);
  const head = el("h3", {}, labelOf(name));
  const says = el("p", { class: "says" }, methodOf(name).note);
  const notes = (found?.notes ?? []).map((note) => el("p", { class: "problem" }, note));
  const section = el("section", { "aria-label": labelOf(name) }, head, says, ...notes);
  if (!found) section.append(el("p", { class: "wait" }, "This method is ranking."));
  else if (found.error) section.append(el("p", { class: "problem" }, found.error));
  else if (!found.helpful.length)
    section.append(el("p", { class: "note" }, "No row passes these filters. Remove one of them."));
  else {
    const largest = found.helpful.reduce((most, hit) => Math.max(most, Math.abs(hit.score)), 0);
    section.append(el("ol", {}, ...found.helpful.map((hit) => rowView(name, hit, counts.get(hit.row) ?? [], largest))));
  }
  return section;
}

function rowView(name, hit, ranks, largest) {
  const others = ranks.filter(([method]) => method !== name);
  const where = others.map(([method, rank]) => `${labelOf(method)} ${rank}`).join(", ");
  const text = hit.parts
    .map((part) => part.text.trim())
    .filter(Boolean)
    .join(" ¶ ");
  const open = button("", () => openRow(hit.row), {
    class: others.length ? "row shared" : "row",
    "data-row": hit.row,
    "data-key": `${name}-${hit.row}`,
  });
  open.append(
    el("span", { class: "rank" }, String(hit.rank)),
    el("span", { class: "id", dir: "auto" }, brief(hit.id, 30)),
    el("span", { class: "score" }, score(hit.score, largest <= 1)),
    el("span", { class: "text", dir: "auto" }, brief(text, 160)),
    others.length ? el("span", { class: "also" }, `also ${where}`) : "",
  );
  return el("li", {}, open);
}

function link(event) {
  const row = event.target.closest?.("[data-row]")?.dataset.row ?? null;
  for (const node of byId("comparison").querySelectorAll("[data-row]"))
    node.classList.toggle("is-linked", node.dataset.row === row);
}

for (const name of ["pointerover", "focusin"]) byId("comparison").addEventListener(name, link);
byId("comparison").addEventListener("pointerleave", link);

on("view methods ready settled filters folding", compare);
on("asked cleared", () => {
  flight?.abort();
  asked = "";
  columns = new Map();
});
