// The completion as a line of tokens, each over the bar of its probability. They come one by one while the model
// writes; afterwards they can be chosen, and what an example does to each of them shows as its colour.

import { announce, byId, button, el, reveal } from "./nodes.js";
import { isReady, on, state, tell } from "./state.js";
import { listenToStretches, choose, step } from "./stretch.js";
import { isStrong, largestOf, tint } from "./tints.js";
import { counted, marked, parted, quoted } from "./words.js";

let line = null;
let chips = [];
let gaps = []; // the space before each token, if it has one
let covered = new Set(); // tokens that stand word for word in the corpus

export const chipsOf = () => chips;

// -- drawing

export function tokenLine(label) {
  return el("div", { class: "text answer", dir: "auto", "aria-label": label });
}

function append({ text, p }) {
  const [gap, bare] = parted(chips.length ? text : text.trimStart() || text);
  const chip = el("span", { class: "chip" }, marked(bare));
  chip.style.setProperty("--p", p ?? 0);
  chip.words = { text, p };
  chip.place = chips.length;
  const space = gap ? el("span", { class: "gap" }, gap) : null;
  chips.push(chip);
  gaps.push(space);
  line.append(...[space, chip].filter(Boolean));
}

function begin() {
  line = tokenLine("Completion");
  chips = [];
  gaps = [];
  covered = new Set();
}

function drawWriting() {
  begin();
  byId("answer").hidden = true;
  byId("answer").replaceChildren(el("h2", {}, "The model says"), line);
}

function write(event) {
  byId("answer").hidden = false;
  const isAtEnd = line.scrollHeight - line.scrollTop - line.clientHeight < 40;
  append(event);
  if (isAtEnd) line.scrollTop = line.scrollHeight;
}

function draw() {
  const { answer, isGenerated } = state;
  const scrolled = line?.scrollTop ?? 0;
  begin();
  answer.tokens.forEach(append);
  const ending = answer.ending ? ` The answer was ${answer.ending}.` : "";
  byId("answer").replaceChildren(
    el("h2", {}, isGenerated ? "The model said" : "Completion"),
    line,
    statusView(),
    el("p", { class: "certainty" }, `${(answer.certainty ?? "").replace(/\.?$/, ".").replace(/^\.$/, "")}${ending}`),
    el("div", { id: "contrast" }),
  );
  byId("answer").hidden = false;
  line.scrollTop = scrolled;
  makeChoosable();
  paint();
  tell("completion-drawn");
}

function makeChoosable() {
  line.setAttribute("role", "listbox");
  line.setAttribute("aria-multiselectable", "true");
  line.setAttribute("aria-label", "Tokens of the completion");
  for (const chip of chips) {
    chip.setAttribute("role", "option");
    const { text, p } = chip.words;
    if (!text.trim()) chip.setAttribute("aria-label", !text ? "end" : text.includes("\n") ? "line break" : "space");
    chip.setAttribute("aria-selected", "false");
    chip.tabIndex = chip.place ? -1 : 0;
    if (p !== null) chip.setAttribute("aria-description", `probability ${p.toFixed(2)}`);
  }
  listenToStretches(line, chips);
}

function statusView() {
  const node = el(
    "div",
    { class: "status", id: "status" },
    el("p", { "aria-live": "polite" }),
    el(
      "span",
      {},
      button("‹", () => step(-1), { "aria-label": "Previous token" }),
      button("›", () => step(1), { "aria-label": "Next token" }),
      button("All tokens", () => choose([]), { id: "all-tokens" }),
    ),
  );
  return node;
}

// -- what is chosen

function paint() {
  if (!byId("status")) return;
  const chosen = new Set(state.stretches.flatMap(([from, to]) => range(from, to)));
  chips.forEach((chip, place) => {
    const isChosen = chosen.has(place);
    chip.setAttribute("aria-selected", String(isChosen));
    chip.classList.toggle("chosen", isChosen);
    chip.classList.toggle("starts", isChosen && !chosen.has(place - 1));
    chip.classList.toggle("ends", isChosen && !chosen.has(place + 1));
    gaps[place]?.classList.toggle("chosen", isChosen && chosen.has(place - 1));
  });
  line.classList.toggle("is-parted", chosen.size > 0);
  byId("status").firstChild.textContent = statusWords(chosen.size);
  byId("all-tokens").disabled = chosen.size === 0;
  document.body.classList.toggle("is-pinned", chosen.size > 0 && !document.body.classList.contains("is-start"));
}

const range = (from, to) => Array.from({ length: to - from }, (_, place) => from + place);

function statusWords(size) {
  const all = chips.length;
  if (!size)
    return isReady() ? `All ${counted(all, "token")} together. Click or drag over some.` : `${counted(all, "token")}.`;
  const texts = state.stretches.map(([from, to]) =>
    quoted(
      chips
        .slice(from, to)
        .map(({ words }) => words.text)
        .join(""),
      48,
    ),
  );
  return `${texts.join(", ")}: ${size} of ${counted(all, "token")}.`;
}

// -- colours

// What an example does to each of the tokens asked about; null: no example is pointed at.
export function light(values) {
  const largest = largestOf(values ?? []);
  const chosen = state.stretches.length ? state.stretches.flatMap(([from, to]) => range(from, to)) : null;
  // One value a token, or one value a token that is asked about: both are understood.
  const isPart = chosen !== null && values !== null && values.length === chosen.length;
  chips.forEach((chip, place) => {
    const value = values && (isPart ? values[chosen.indexOf(place)] : values[place]);
    chip.style.backgroundColor = value ? tint(value, largest) : "";
    chip.classList.toggle("strong", Boolean(value) && isStrong(value, largest));
  });
}

// -- pieces that stand word for word in the corpus

export function cover(stretches) {
  covered = new Set(stretches.flatMap(([from, to]) => range(from, to)));
  chips.forEach((chip, place) => {
    chip.classList.toggle("copied", covered.has(place));
    gaps[place]?.classList.toggle("copied", covered.has(place) && covered.has(place - 1));
  });
}

export function preview(stretch) {
  const [from, to] = stretch ?? [0, 0];
  chips.forEach((chip, place) => {
    chip.classList.toggle("previewed", place >= from && place < to);
    gaps[place]?.classList.toggle("previewed", place > from && place < to);
  });
  if (stretch && chips[from]) reveal(chips[from]);
}

on("asked", drawWriting);
on("token", write);
on("answer", draw);
on("ready", () => {
  paint();
  announce("The answer is complete, and the examples are ranked.");
});
on("stretches settled", paint);
on("ended", () => {
  if (!state.tokens.length) byId("answer").hidden = state.answer === null;
});
