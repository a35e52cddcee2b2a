// Which examples belong to the tokens chosen: one request under way, the latest wish wins, the old list stays until
// the new one is there. Then what chance reaches, where the server has not measured it yet.

import { Problem, isAbort } from "./api.js";
import { postOfAnswer, streamOfAnswer } from "./answering.js";
import { askedTokens, isInstant, isReady, methodOf, on, state, tell } from "./state.js";

const PAUSE = 600; // ms without a change before the level is measured
const PATIENCE = 400; // ms after which a request is given up for a newer one

let flight = null; // {controller, since}
let isWaiting = false;
let pause = null;
let measuring = null; // AbortController of the level under way
const passed = new Set(); // answers, methods and tokens whose pass over the corpus is done

export function wish() {
  const { method, filters, isFolding, top } = state;
  return { tokens: askedTokens(), method, top, fold: isFolding, filters };
}

// Called at every change of what is asked; `isNew`: an older answer is of no use.
export function rank({ isNew = false } = {}) {
  if (!isReady()) return;
  measuring?.abort();
  clearTimeout(pause);
  if (flight && (isNew || performance.now() - flight.since > PATIENCE)) {
    flight.controller.abort();
    flight = null;
  }
  if (flight) isWaiting = true;
  else run();
}

async function run() {
  isWaiting = false;
  const own = (flight = { controller: new AbortController(), since: performance.now() });
  const late = setTimeout(() => tell("ranking-late"), 250);
  try {
    const ranking = await ranked(wish(), own.controller.signal);
    if (flight !== own) return;
    state.ranking = ranking;
    tell("ranking");
  } catch (problem) {
    if (flight === own && !isAbort(problem)) tell("ranking-failed", problem);
  } finally {
    clearTimeout(late);
    if (flight === own) {
      flight = null;
      if (isWaiting) run();
      else settle();
    }
  }
}

// Methods that read the corpus make a pass over it first, in the line; then their ranking is in memory.
async function ranked(asked, signal) {
  if (!isInstant(asked.method)) await pass(asked, signal);
  try {
    return await postOfAnswer("/api/rankings", asked, signal);
  } catch (problem) {
    if (problem.status !== 409) throw problem;
    passed.delete(passOf(asked)); // the server has forgotten the pass since
    if (methodOf(asked.method).of_tokens) state.index.isSlow = true; // this index cannot split scores over tokens
    await pass(asked, signal);
    return postOfAnswer("/api/rankings", asked, signal);
  }
}

const passOf = ({ method, tokens }) => JSON.stringify([state.answer.id, method, tokens]);

async function pass({ tokens, method, fold, filters }, signal) {
  if (passed.has(passOf({ method, tokens }))) return;
  const body = { tokens, methods: [method], top: 1, fold, filters };
  for await (const event of streamOfAnswer("/api/comparisons", body, signal)) {
    if (event.error) throw new Problem(event.error, 500);
    tell("ranking-progress", event);
  }
  passed.add(passOf({ method, tokens }));
}

// After the last request: the level of chance, which takes long. It comes when the reader pauses, after the colours.
function settle() {
  clearTimeout(pause);
  pause = setTimeout(measure, PAUSE);
}

async function measure() {
  const { ranking, view, isDragging, isColouring } = state;
  if (view !== "examples" || isDragging || isColouring || flight) return;
  if (!ranking || ranking.level || ranking.isLevelUnknown || !methodOf(ranking.method)?.of_tokens) return;
  const controller = (measuring = new AbortController());
  try {
    for await (const event of streamOfAnswer(
      "/api/levels",
      { tokens: askedTokens(), method: ranking.method },
      controller.signal,
    )) {
      if (measuring !== controller || controller.signal.aborted) return;
      if (event.type === "level") return takeLevel(ranking, event.level);
      tell("level-progress", event);
    }
    throw new Problem("What chance reaches was not measured to the end.", 500);
  } catch (problem) {
    if (!isAbort(problem) && measuring === controller) tell("level-failed", problem);
  }
}

// The server words the verdict: it is asked again, now that it knows the level.
async function takeLevel(ranking, level) {
  if (state.ranking !== ranking) return;
  ranking.level = level;
  ranking.isLevelUnknown = !level;
  if (!level) return tell("level");
  try {
    const again = await postOfAnswer("/api/rankings", wish());
    if (state.ranking !== ranking) return;
    Object.assign(ranking, { verdict: again.verdict, stands_out: again.stands_out, level: again.level ?? level });
  } catch {
    // The level itself is shown; the sentence about it comes with the next ranking.
  }
  tell("level");
}

on("view coloured", settle);
on("ready", () => rank({ isNew: true }));
on("stretches", () => isInstant(state.method) && rank());
on("settled", () => {
  if (!isInstant(state.method)) rank({ isNew: true });
  else if (!flight) settle();
});
on("method filters folding top", () => rank({ isNew: true }));
on("asked", () => {
  measuring?.abort();
  clearTimeout(pause);
  flight?.controller.abort();
  flight = null;
});
