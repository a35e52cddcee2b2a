// What the question waits for: others before it, the model, the pass over the corpus. And what went wrong.

import { ask } from "./answering.js";
import { announce, byId, button, el, problemLine } from "./nodes.js";
import { on, state, tell } from "./state.js";
import { counted, steps } from "./words.js";

function say(words, event = null) {
  const bar = event?.total > 1 ? el("progress", { max: event.total, value: event.done, "aria-label": words }) : null;
  byId("progress").replaceChildren(el("p", { class: "wait" }, words), ...(bar ? [bar] : []));
}

function waiting({ position }) {
  const words = position ? `${counted(position, "question is", "questions are")} before yours.` : "It is your turn.";
  say(words);
  if (position) announce(words);
}

function ended(problem) {
  if (problem) return byId("progress").replaceChildren(problemLine(problem, ask));
  const written = state.tokens.map(({ text }) => text).join("");
  announce("The question is stopped.");
  const about = button("Ask about what is written", () => {
    state.question = { ...state.question, completion: written };
    state.isGenerated = true;
    ask();
    tell("question");
  });
  byId("progress").replaceChildren(
    el("p", { class: "wait" }, "The question was stopped. "),
    el(
      "p",
      { class: "actions" },
      written.trim() && !state.answer ? about : "",
      button("Ask again", ask, { class: "quiet" }),
    ),
  );
}

on("asked", () => {
  say("The question is sent.");
  announce("The question is sent.");
});
on("waiting", waiting);
on("token", () => state.tokens.length === 1 && say("The model is writing."));
on("answer", () => say("The examples are being scored."));
on("progress", (event) => say(steps(event.what, event.done, event.total), event));
on("ready", () => byId("progress").replaceChildren());
on("ended", ended);
on("cleared", () => byId("progress").replaceChildren());
