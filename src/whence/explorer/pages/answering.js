// One question at a time: its place in the queue, the tokens as the model writes them, the pass over the corpus.
// An answer that the server forgot is asked for again, with the completion that is known.

import { Problem, isAbort, post, stream } from "./api.js";
import { isReady, state, tell } from "./state.js";

let current = null; // AbortController of the question under way
let renewal = null; // promise of a forgotten answer that is asked for again

function requestOf({ prompt, system, history, completion, contrast, isCut, length, temperature, seed }) {
  const { is_chat: isChat, id } = state.index;
  return {
    index: id,
    prompt,
    system: isChat && system.trim() ? system : null,
    history: isChat ? history : [],
    completion: completion || null,
    contrast: contrast || null,
    is_cut: Boolean(completion) && isCut,
    max_new_tokens: length,
    temperature,
    seed,
  };
}

export async function ask() {
  stop();
  const controller = (current = new AbortController());
  Object.assign(state, { phase: "waiting", tokens: [], answer: null, ranking: null, isDragging: false });
  tell("asked");
  try {
    for await (const event of stream("/api/answers", requestOf(state.question), controller.signal)) take(event);
    if (!isReady()) throw new Problem("The answer ended before it was complete. Ask again.", 500);
  } catch (problem) {
    if (current !== controller) return;
    state.phase = isAbort(problem) ? "stopped" : "failed";
    tell("ended", isAbort(problem) ? null : problem);
  }
}

export function stop() {
  current?.abort();
}

// Stops without a word: the page goes on to something else.
export function leave() {
  stop();
  current = null;
}

function take(event) {
  if (event.type === "queue") tell("waiting", event);
  if (event.type === "token") {
    state.phase = "writing";
    state.tokens.push(event);
    tell("token", event);
  }
  if (event.type === "answer") {
    state.phase = "scanning";
    takeAnswer(event.answer);
  }
  if (event.type === "progress") tell("progress", event);
  if (event.type === "ready") {
    state.phase = "ready";
    state.answer.id = event.answer;
    tell("ready");
  }
}

function takeAnswer(answer) {
  state.answer = answer;
  state.tokens = answer.tokens;
  state.isGenerated ||= answer.is_generated;
  const last = answer.tokens.length;
  state.stretches = state.stretches.filter(([from]) => from < last).map(([from, to]) => [from, Math.min(to, last)]);
  tell("answer");
}

// -- requests about the answer

export async function ofAnswer(send) {
  try {
    return await send(state.answer.id);
  } catch (problem) {
    if (!problem.isForgotten) throw problem;
    await renew();
    return send(state.answer.id);
  }
}

export const postOfAnswer = (path, body, signal) => ofAnswer((answer) => post(path, { answer, ...body }, signal));

export async function* streamOfAnswer(path, body, signal) {
  try {
    yield* stream(path, { answer: state.answer.id, ...body }, signal);
  } catch (problem) {
    if (!problem.isForgotten) throw problem;
    await renew();
    yield* stream(path, { answer: state.answer.id, ...body }, signal);
  }
}

const renew = () => (renewal ??= askAgain().finally(() => (renewal = null)));

async function askAgain() {
  const { answer, question } = state;
  const known = requestOf({ ...question, completion: answer.completion, isCut: answer.is_cut });
  for await (const event of stream("/api/answers", known, current?.signal)) {
    if (event.type === "ready" && state.answer === answer) answer.id = event.answer;
  }
}
