// The first thing that is seen: what the page is for, prompts to begin with, and what the index holds.

import { byId, button, el } from "./nodes.js";
import { sendPrompt } from "./question.js";
import { on, state } from "./state.js";
import { brief, count, counted, valueName } from "./words.js";

function drawWelcome() {
  byId("welcome").replaceChildren(
    el("h2", {}, "Why did the model say this?"),
    el(
      "p",
      {},
      "Ask the model something. You see which training examples made its answer more or less likely, and which of " +
        "their tokens did it.",
    ),
  );
}

function drawAbout() {
  const { index } = state;
  const prompts = (index.examples ?? []).filter((text) => text.trim());
  const examples = prompts.map((text) =>
    el(
      "li",
      {},
      button(el("span", { dir: "auto" }, brief(text, 110)), () => sendPrompt(text), { class: "prompt" }),
    ),
  );
  byId("about").replaceChildren(
    ...(examples.length ? [el("h2", {}, "Prompts to begin with"), el("ul", { class: "prompts" }, ...examples)] : []),
    el("h2", {}, "The index"),
    facts(index),
  );
}

const LAYOUTS = {
  text: "plain texts",
  completion: "prompts with completions",
  instruction: "instructions with answers",
  messages: "conversations",
};

function facts(index) {
  const rows = `${counted(index.rows, "row")} of ${LAYOUTS[index.layout] ?? index.layout}`;
  const sources = index.sources
    .slice(0, 4)
    .map(({ value, rows: of }) => `${valueName(value, "no source")} ${count(of)}`);
  if (index.sources.length > 4) sources.push(`${index.sources.length - 4} more`);
  const pairs = [
    ["Index", index.name],
    ["Model", index.model],
    ["Corpus", index.rankable === index.rows ? rows : `${rows}, ${count(index.rankable)} of them can be ranked`],
    ["Sources", index.sources.length > 1 ? sources.join(", ") : null],
    ["Gradients", index.projection],
    ["Context", index.context ? counted(index.context, "token") : null],
  ];
  const shown = pairs.filter(([, words]) => words);
  return el("dl", {}, ...shown.flatMap(([name, words]) => [el("dt", {}, name), el("dd", { dir: "auto" }, words)]));
}

function drawStart() {
  const isStart = state.phase === "idle" && !state.answer;
  document.body.classList.toggle("is-start", isStart);
  byId("welcome").hidden = !isStart;
  byId("about").hidden = !isStart;
}

on("index", () => (drawWelcome(), drawAbout(), drawStart()));
on("asked cleared", drawStart);
