// Whether the best example stands above chance, in plain words, and what chance reaches.

import { byId, button, el } from "./nodes.js";
import { rank } from "./ranking.js";
import { isInfluence, labelOf, methodOf, on, state } from "./state.js";
import { counted, plain, steps } from "./words.js";

function draw(note = null) {
  const { ranking } = state;
  if (!ranking) return byId("verdict").replaceChildren();
  const { verdict, level, stands_out: standsOut, method } = ranking;
  const left = [leftOutWords(methodOf(method)), ...ranking.notes.map(sentence)].filter(Boolean).join(" ");
  if (!isInfluence(method))
    return show(`${labelOf(method)} does not measure what training on an example does to the answer.`, left, false);
  if (!methodOf(method).of_tokens || ranking.isLevelUnknown)
    return show(
      "",
      `${left} What chance reaches is not measured here: an order alone does not say that the first examples matter.`.trim(),
      false,
    );
  const reaches = level ? levelWords(level) : (note ?? "What chance reaches is being measured.");
  if (verdict) return show(verdict, reaches, standsOut);
  show(bestWords(ranking), reaches, false);
}

const sentence = (note) => `${note[0].toUpperCase()}${note.slice(1).replace(/\.?$/, ".")}`;

// What of the question the method takes no notice of.
function leftOutWords({ label, ignores }) {
  const asked = { span: state.stretches.length && "the tokens chosen", contrast: state.answer?.contrast && "the contrast" };
  const parts = ignores.map((part) => asked[part]).filter(Boolean);
  const why = ignores.includes("span") ? "compares whole texts" : "is of one completion";
  return parts.length ? `Left out: ${parts.join(" and ")}. ${label} ${why}.` : "";
}

function levelWords({ z, words }) {
  const line = words ? words[0].toUpperCase() + words.slice(1).replace(/\.?$/, ".") : `Chance reaches z ${plain(z)}.`;
  return line;
}

function bestWords({ helpful }) {
  const most = Math.max(...helpful.map(({ z }) => z ?? -Infinity));
  return Number.isFinite(most) ? `The best example reaches z ${plain(most)}.` : "";
}

function show(verdict, level, standsOut) {
  const parts = [];
  if (verdict) parts.push(el("p", { class: standsOut ? "verdict stands" : "verdict" }, verdict));
  if (level) parts.push(level instanceof Node ? level : el("p", { class: "level" }, level));
  // Live regions speak at every change: what says the same stays.
  const words = parts.map((part) => part.textContent).join();
  if (byId("verdict").dataset.words === words) return;
  byId("verdict").dataset.words = words;
  byId("verdict").replaceChildren(...parts);
}

function progress({ type, position, done, total, what }) {
  if (type === "queue" && !position) return;
  if (type === "progress" && total < 2) return;
  const words =
    type === "queue" ? `${counted(position, "question is", "questions are")} before it.` : steps(what, done, total);
  if (byId("verdict").querySelector(".level"))
    byId("verdict").querySelector(".level").textContent = `What chance reaches is being measured. ${words}`;
}

function failed(problem) {
  draw(
    el(
      "p",
      { class: "level" },
      `What chance reaches is not known. ${problem.message} `,
      button("Try again", () => rank({ isNew: true }), { class: "quiet" }),
    ),
  );
}

on("ranking level", () => draw());
on("level-progress", progress);
on("level-failed", failed);
on("asked cleared", () => {
  byId("verdict").dataset.words = "";
  byId("verdict").replaceChildren();
});
