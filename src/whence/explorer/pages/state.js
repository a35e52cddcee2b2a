// What the page shows, in one place. Whoever changes it tells what changed; whoever draws a part of it listens.

export const state = {
  session: null,
  index: null, // of session.indexes
  view: "examples", // or "methods", "search"
  question: emptyQuestion(),
  phase: "idle", // then "waiting", "writing", "scanning", "ready"; "stopped" and "failed" end it
  tokens: [], // of the completion, as far as it is written: {text, p}
  answer: null, // as the server gives it
  isGenerated: false,
  stretches: [], // [from, to) of the answer's tokens; none: all of them
  isDragging: false,
  method: null,
  filters: emptyFilters(),
  isFolding: true, // rows with the same text are one
  top: 10,
  ranking: null,
  isColouring: false, // the shares of the examples' tokens are on their way
  methods: [], // side by side
  words: "", // of the full-text search
};

// isCut: the completion was cut, so that no token that ends an answer belongs to it.
export function emptyQuestion() {
  const sampling = { length: 64, temperature: 0, seed: 0 };
  return { prompt: "", system: "", history: [], completion: null, contrast: null, isCut: false, ...sampling };
}

export function emptyFilters() {
  return { sources: null, columns: {}, text: "" };
}

const listeners = new Map();

export function on(names, listener) {
  for (const name of names.split(" ")) listeners.set(name, [...(listeners.get(name) ?? []), listener]);
}

export function tell(name, detail) {
  for (const listener of listeners.get(name) ?? []) listener(detail);
}

// The end of an index's path says enough, unless another ends in the same way.
export function nameOf(index) {
  const end = (name) => name.split("/").filter(Boolean).slice(-2).join("/");
  const isAlone = state.session.indexes.filter(({ name }) => end(name) === end(index.name)).length === 1;
  return isAlone ? end(index.name) : index.name;
}

export const isReady = () => state.phase === "ready";
export const isBusy = () => ["waiting", "writing", "scanning"].includes(state.phase);
export const methodOf = (name) => state.index.methods.find((method) => method.name === name);
export const labelOf = (name) => methodOf(name)?.label ?? name;
export const askedTokens = () => (state.stretches.length ? state.stretches : null);

// Methods that compare texts have no opposite: their last rows are only the least alike.
const LIKENESS = ["bm25", "rds", "embedding", "dsir", "tfidf"];
export const isLikeness = (name) => LIKENESS.includes(name);
export const isInfluence = (name) => !isLikeness(name) && name !== "random";

// Whether any tokens are ranked from memory, at once; otherwise each choice is a pass over the corpus.
export const isInstant = (name) => Boolean(methodOf(name)?.of_tokens) && !state.index.isSlow;

export function hasFilters({ sources, columns, text } = state.filters) {
  return sources !== null || Object.keys(columns).length > 0 || text.trim() !== "";
}
