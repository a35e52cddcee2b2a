// Which tokens of the shown examples did it. Asked for in the order in which they are seen, in small batches; given up
// as soon as other tokens are chosen.

import { isAbort } from "./api.js";
import { streamOfAnswer } from "./answering.js";
import { cardsShown } from "./examples.js";
import { byId, problemLine } from "./nodes.js";
import { askedTokens, isInfluence, on, state, tell } from "./state.js";

const BATCH = 6;
const AHEAD = 800; // px beyond the window in which examples are coloured already

let flight = null; // AbortController of the batch under way
let failed = new Set(); // rows that the server could not split
const refusing = new Set(); // indexes that said why they cannot: they are not asked again by themselves
let isEach = false; // each example has a scale of its own
let question = ""; // the colours are of

function near(node) {
  const { top, bottom } = node.getBoundingClientRect();
  return bottom > -AHEAD / 2 && top < innerHeight + AHEAD;
}

// Rows in sight that have no colours yet; the best of both sides first.
function wanted() {
  const cards = cardsShown().filter(({ matrix, node, hit }) => !matrix && !failed.has(hit.row) && near(node));
  return cards.sort((a, b) => Math.abs(a.hit.rank) - Math.abs(b.hit.rank)).slice(0, BATCH);
}

async function next() {
  if (flight || state.isDragging || state.view !== "examples" || !state.ranking) return;
  if (JSON.stringify(state.ranking.tokens) !== JSON.stringify(askedTokens())) return; // the ranking is on its way
  const cards = isInfluence(state.ranking.method) && !refusing.has(state.index.id) ? wanted() : [];
  say(cards.length > 0);
  if (!cards.length) return;
  const controller = (flight = new AbortController());
  const rows = cards.map(({ hit }) => hit.row);
  try {
    for await (const event of streamOfAnswer("/api/matrices", { tokens: askedTokens(), rows, method: state.ranking.method }, controller.signal)) {
      if (flight !== controller) return;
      if (event.type === "matrix") take(event);
    }
    for (const row of rows) if (!cards.find(({ hit }) => hit.row === row).matrix) failed.add(row);
  } catch (problem) {
    if (flight !== controller || isAbort(problem)) return;
    for (const row of rows) failed.add(row);
    if (!problem.isAway) refusing.add(state.index.id);
    say(false);
    byId("results-trouble").replaceChildren(problemLine(problem, retry));
  } finally {
    if (flight === controller) flight = null;
  }
  next();
}

function say(isColouring) {
  if (state.isColouring === isColouring) return;
  state.isColouring = isColouring;
  tell(isColouring ? "colouring" : "coloured");
}

function take(matrix) {
  for (const card of cardsShown()) if (card.hit.row === matrix.row) card.take(matrix);
  paint();
}

// One scale for all examples, so that a pale one says that it matters less; or a scale for each.
function paint() {
  const cards = cardsShown().filter(({ matrix }) => matrix);
  const largest = cards.reduce((most, card) => Math.max(most, card.largest), 0);
  for (const card of cards) card.paint(isEach ? card.largest : largest);
  byId("legend").hidden = !cards.length;
}

function retry() {
  byId("results-trouble").replaceChildren();
  failed = new Set();
  refusing.delete(state.index.id);
  next();
}

function renew() {
  const asked = JSON.stringify([state.answer?.id, askedTokens()]);
  if (asked !== question) {
    question = asked;
    failed = new Set();
    flight?.abort();
    flight = null;
    for (const card of cardsShown()) card.growStale();
  }
  next();
}

byId("scale").addEventListener("click", () => {
  isEach = !isEach;
  byId("scale").setAttribute("aria-pressed", String(isEach));
  paint();
});

let isWaiting = false;
function later() {
  if (isWaiting) return;
  isWaiting = true;
  setTimeout(() => ((isWaiting = false), next()), 120);
}

on("stretches", () => {
  flight?.abort();
  flight = null;
});
on("cards settled view", renew);
on("asked cleared", () => {
  flight?.abort();
  flight = null;
  byId("legend").hidden = true;
  say(false);
});
addEventListener("scroll", later, { passive: true });
addEventListener("resize", later, { passive: true });
