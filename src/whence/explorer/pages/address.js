// The view as the address keeps it. Whoever opens the address sees the same: the completion is part of it.

import { emptyFilters, emptyQuestion, state } from "./state.js";

export function addressOf({ question, index, answer, stretches, filters, view } = state) {
  const fields = new URLSearchParams();
  const put = (name, value, usual = "") => {
    const isUsual = value === null || value === undefined || (usual !== null && String(value) === String(usual));
    if (!isUsual) fields.set(name, value);
  };
  put("index", index.id, 0);
  put("view", view, "examples");
  put("prompt", question.prompt);
  put("system", question.system);
  if (question.history.length) put("turns", JSON.stringify(question.history));
  put("completion", answer?.completion ?? question.completion, null);
  if (answer && state.isGenerated) put("generated", 1);
  if (answer ? answer.is_cut : question.isCut) put("cut", 1);
  put("contrast", question.contrast, null);
  put("length", question.length, 64);
  put("temperature", question.temperature, 0);
  put("seed", question.seed, 0);
  put("tokens", stretches.map(([from, to]) => `${from}-${to}`).join(","));
  put("method", state.method, index.methods.find(({ is_ready }) => is_ready)?.name);
  put("methods", state.methods.join(","));
  if (filters.sources) put("sources", JSON.stringify(filters.sources));
  if (Object.keys(filters.columns).length) put("columns", JSON.stringify(filters.columns));
  put("text", filters.text);
  put("fold", state.isFolding ? 1 : 0, 1);
  put("top", state.top, 10);
  put("search", state.words);
  return `#${fields}`;
}

export function remember(isStep = true) {
  const address = addressOf();
  if (address === (location.hash || "#")) return;
  history[isStep ? "pushState" : "replaceState"](null, "", address);
}

// Everything in an address may be wrong: what cannot be read is left out.
export function viewOf(hash, session) {
  const fields = new URLSearchParams(hash.slice(1));
  const whole = (name, usual, most) => {
    const value = Number(fields.get(name) ?? usual);
    return Number.isInteger(value) && value >= 0 && value <= most ? value : usual;
  };
  const index = session.indexes.find(({ id }) => String(id) === fields.get("index")) ?? session.indexes[0];
  const ready = index.methods.filter(({ is_ready }) => is_ready).map(({ name }) => name);
  const temperature = Number(fields.get("temperature") ?? 0);
  return {
    index,
    view: ["methods", "search"].includes(fields.get("view")) ? fields.get("view") : "examples",
    question: {
      ...emptyQuestion(),
      prompt: fields.get("prompt") ?? "",
      system: fields.get("system") ?? "",
      history: turnsOf(jsonOf(fields.get("turns"))),
      completion: fields.get("completion"),
      contrast: fields.get("contrast"),
      isCut: fields.get("cut") === "1",
      length: whole("length", 64, session.limits.max_new_tokens) || 64,
      temperature: temperature >= 0 && temperature <= 5 ? temperature : 0,
      seed: whole("seed", 0, 2 ** 31),
    },
    isGenerated: fields.get("generated") === "1",
    stretches: stretchesOf(fields.get("tokens") ?? ""),
    method: ready.includes(fields.get("method")) ? fields.get("method") : (ready[0] ?? index.methods[0]?.name),
    methods: (fields.get("methods") ?? "").split(",").filter((name) => ready.includes(name)),
    filters: {
      ...emptyFilters(),
      sources: sourcesOf(fields.get("sources")),
      columns: columnsOf(jsonOf(fields.get("columns"))),
      text: fields.get("text") ?? "",
    },
    isFolding: fields.get("fold") !== "0",
    top: Math.min(session.limits.top, whole("top", 10, session.limits.top) || 10),
    words: fields.get("search") ?? "",
  };
}

function jsonOf(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

const isTurn = (turn) => ["user", "assistant"].includes(turn?.role) && typeof turn.content === "string";
const turnsOf = (turns) =>
  Array.isArray(turns) ? turns.filter(isTurn).map(({ role, content }) => ({ role, content })) : [];

function stretchesOf(text) {
  const pairs = [...text.matchAll(/(\d{1,6})-(\d{1,6})/g)].map(([, from, to]) => [Number(from), Number(to)]);
  return pairs.filter(([from, to]) => from < to);
}

function sourcesOf(text) {
  if (text === null) return null;
  const values = jsonOf(text);
  return Array.isArray(values) ? values : [text];
}

function columnsOf(columns) {
  if (!columns || typeof columns !== "object") return {};
  return Object.fromEntries(Object.entries(columns).filter(([, values]) => Array.isArray(values) && values.length));
}
