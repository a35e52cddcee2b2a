// Starts the page: the session, the view that the address asks for, and the ways between views.

import { get } from "./api.js";
import { remember, viewOf } from "./address.js";
import { ask, leave } from "./answering.js";
import { byId, choice, el, problemLine, toggle } from "./nodes.js";
import { drawQuestion } from "./question.js";
import { emptyFilters, isReady, nameOf, on, state, tell } from "./state.js";
import "./progress.js";
import "./welcome.js";
import "./completion.js";
import "./contrast.js";
import "./ranking.js";
import "./verdict.js";
import "./examples.js";
import "./matrices.js";
import "./toolbar.js";
import "./filters.js";
import "./compare.js";
import "./spans.js";
import "./search.js";
import "./tip.js";

let lastHash = location.hash; // the browser tells of some changes twice

async function begin() {
  try {
    state.session = await get("/api/session");
  } catch (problem) {
    return byId("trouble").replaceChildren(problemLine(problem, begin));
  }
  byId("trouble").replaceChildren();
  if (!state.session.indexes.length)
    return byId("trouble").replaceChildren(
      problemLine({ message: "No index is open. Start the page with whence explore INDEX." }),
    );
  recall();
  document.documentElement.dataset.ready = "yes";
}

// -- the address

const sameQuestion = (a, b) => JSON.stringify(keyOf(a)) === JSON.stringify(keyOf(b));
const keyOf = ({ index, question }) => [
  index?.id,
  {
    ...question,
    completion: question.completion ?? state.answer?.completion ?? null,
    isCut: question.completion ? question.isCut : (state.answer?.is_cut ?? false),
  },
];

// What the address asks for becomes the view. The same question is not asked again.
function recall() {
  lastHash = location.hash;
  const view = viewOf(location.hash, state.session);
  const isSame = state.index !== null && view.question.prompt !== "" && sameQuestion(view, state) && isReady();
  const isOtherIndex = state.index !== view.index;
  if (isSame) delete view.question;
  Object.assign(state, view);
  if (isSame) for (const what of ["stretches", "settled", "method", "filters", "folding", "view"]) tell(what, "recalled");
  else start(isOtherIndex);
  drawHead();
}

function start(isOtherIndex) {
  leave();
  Object.assign(state, { phase: "idle", answer: null, tokens: [], ranking: null });
  tell("cleared");
  byId("answer").hidden = true;
  byId("results").hidden = true;
  if (isOtherIndex) tell("index");
  drawQuestion();
  tell("view", "recalled");
  if (state.question.prompt.trim()) ask();
}

addEventListener("popstate", recall);
addEventListener("hashchange", () => location.hash !== lastHash && recall());

function keep(isStep) {
  remember(isStep);
  lastHash = location.hash;
}

on("question", () => keep(true));
on("answer", () => keep(false));
on("settled method methods filters folding view", (detail) => detail !== "recalled" && keep(true));
on("top words", () => keep(false));
on("view index", () => drawHead());

// -- the head

function drawHead() {
  const { indexes } = state.session;
  const isSearch = state.view === "search";
  const go = (view) => () => {
    state.view = view;
    tell("view");
  };
  const focused = byId("views").contains(document.activeElement) && document.activeElement.dataset.key;
  byId("views").replaceChildren(
    toggle("Ask the model", !isSearch, go("examples"), { "data-key": "ask" }),
    toggle("Search the corpus", isSearch, go("search"), { "data-key": "search" }),
  );
  if (focused) byId("views").querySelector(`[data-key="${focused}"]`).focus();
  byId("picker").hidden = false;
  const options = indexes.map((index) => [String(index.id), nameOf(index)]);
  byId("picker").replaceChildren(
    indexes.length > 1
      ? choice("Index", options, String(state.index.id), chooseIndex)
      : el("span", { dir: "auto", title: indexes[0].name }, nameOf(indexes[0])),
  );
  document.title = state.question.prompt.trim() ? `${state.question.prompt.trim().slice(0, 60)} · Whence` : "Whence";
}

// Another index is another model: the prompt stays in its field, and nothing is asked yet.
function chooseIndex(id) {
  const index = state.session.indexes.find((each) => String(each.id) === id);
  const { prompt } = state.question;
  const method = index.methods.find(({ is_ready: isOn }) => isOn)?.name ?? null;
  Object.assign(state, { index, method, methods: [], stretches: [], filters: emptyFilters(), isGenerated: false });
  Object.assign(state.question, { completion: null, contrast: null, prompt: "" });
  start(true);
  state.question.prompt = prompt;
  drawQuestion();
  keep(true);
  byId("picker").querySelector("select").focus();
}

begin();
