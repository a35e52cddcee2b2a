// Helpful examples beside opposing ones. A new ranking moves the cards that stay, and makes only those that are new.

import { Card } from "./card.js";
import { arrange, button, byId, el, problemLine, toggle } from "./nodes.js";
import { rank } from "./ranking.js";
import { isInfluence, isLikeness, on, state, tell } from "./state.js";
import { counted, steps } from "./words.js";

const SIDES = ["helpful", "opposing"];
const WORDS = {
  helpful: ["Helpful", "Training on these makes the answer more likely."],
  opposing: ["Opposing", "Training on these makes the answer less likely."],
  highest: ["Highest", "None of these helps the answer."],
  lowest: ["Lowest", "None of these opposes the answer."],
  alike: ["Most alike", "By likeness of texts, which is not influence."],
  unlike: ["Least alike", "By likeness of texts, which is not influence."],
  first: ["First", "By chance, to compare with."],
  last: ["Last", "By chance, to compare with."],
};

const sides = {}; // of each side: its nodes, and its cards by row
let tabs, more;
let shownSide = "helpful"; // on a narrow screen

export const cardsShown = () =>
  SIDES.flatMap((side) => (sides[side]?.node.offsetParent === null ? [] : (sides[side]?.shown ?? [])));

function build() {
  tabs = el("div", { class: "tabs", role: "group", "aria-label": "Side" });
  for (const side of SIDES) {
    const title = el("span");
    const words = el("small");
    const list = el("div", { class: "cards" });
    const heading = el("h2", {}, title, words);
    sides[side] = {
      title,
      words,
      list,
      node: el("section", { class: "side", "data-side": side }, heading, list),
      cards: new Map(),
      shown: [],
    };
  }
  more = button(
    "",
    () => {
      state.top = Math.min(state.session.limits.top, state.top + 10);
      tell("top");
    },
    { class: "more" },
  );
  byId("examples").replaceChildren(tabs, el("div", { class: "sides" }, ...SIDES.map((side) => sides[side].node)), more);
}

function draw() {
  if (!tabs) build();
  const { ranking } = state;
  byId("results-trouble").replaceChildren();
  byId("examples").removeAttribute("aria-busy");
  byId("examples").classList.remove("is-old");
  const hits = SIDES.flatMap((side) => ranking[side]);
  const largest = hits.reduce((most, hit) => Math.max(most, Math.abs(hit.score)), 0);
  const scale = {
    largest,
    isSmall: largest < 1.01 && largest >= 0.01,
    isEffect: isInfluence(ranking.method),
    level: ranking.level,
    hasNull: hits.some((hit) => hit.null),
  };
  for (const side of SIDES) drawSide(side, ranking[side], scale);
  drawTabs();
  const isFull = ranking.helpful.length >= ranking.matching || state.top >= state.session.limits.top;
  more.hidden = isFull || !ranking.helpful.length;
  more.textContent = `Show ${Math.min(10, state.session.limits.top - state.top)} more on each side`;
  tell("cards");
}

function drawSide(side, hits, scale) {
  const { title, words, list, cards, node } = sides[side];
  const [name, says] = WORDS[headingOf(side, hits)];
  title.textContent = name;
  words.textContent = says;
  const shown = hits.map((hit) => {
    const card = cards.get(hit.row) ?? new Card(hit);
    card.update(hit, scale);
    return [hit.row, card];
  });
  sides[side].cards = new Map(shown);
  sides[side].shown = shown.map(([, card]) => card);
  arrange(list, shown.length ? sides[side].shown.map((card) => card.node) : [emptyView()]);
  node.setAttribute("aria-label", name);
}

function headingOf(side, hits) {
  const isHigh = side === "helpful";
  if (isLikeness(state.ranking.method)) return isHigh ? "alike" : "unlike";
  if (!isInfluence(state.ranking.method)) return isHigh ? "first" : "last";
  const agrees = hits.some(({ score }) => (isHigh ? score > 0 : score < 0));
  return agrees || !hits.length ? side : isHigh ? "highest" : "lowest";
}

function emptyView() {
  const words = state.ranking.matching
    ? "No example is on this side."
    : "No row passes these filters. Remove one of them.";
  return el("p", { class: "note" }, words);
}

function drawTabs() {
  tabs.replaceChildren(
    ...SIDES.map((side) =>
      toggle(sides[side].title.textContent, side === shownSide, () => {
        shownSide = side;
        drawTabs();
        tabs.querySelector('[aria-pressed="true"]').focus();
        tell("cards");
      }),
    ),
  );
  for (const side of SIDES) sides[side].node.classList.toggle("is-shown", side === shownSide);
}

// A line above the lists: how many rows there are.
export function rankingWords() {
  if (!state.ranking) return "";
  const late = el("span", { class: "late" }, state.isColouring ? " Their tokens are being coloured." : "");
  return el("span", {}, `${counted(state.ranking.matching, "row")} ranked.`, late);
}

function progress({ type, what, done, total, position }) {
  if (type === "method" || (type === "queue" && !position)) return;
  const words =
    type === "queue"
      ? `${counted(position, "question is", "questions are")} before this one.`
      : steps(what, done, total);
  byId("results-trouble").replaceChildren(el("p", { class: "wait" }, words));
}

// The old lists stay, paler: they are not of what is asked now.
function fail(problem) {
  byId("examples").removeAttribute("aria-busy");
  byId("examples").classList.add("is-old");
  byId("results-trouble").replaceChildren(problemLine(problem, () => rank({ isNew: true })));
}

function clear() {
  for (const side of SIDES) if (sides[side]) sides[side].cards = new Map();
  byId("examples").replaceChildren();
  byId("results-trouble").replaceChildren();
  tabs = null;
}

on("ranking level", draw);
on("ranking-failed", fail);
on("ranking-progress", progress);
on("ranking-late", () => byId("examples").setAttribute("aria-busy", "true"));
on("asked cleared", clear);
