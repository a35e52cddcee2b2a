// "And not this": the shown completion becomes a text to type over. The typed text is what the model did not say, or
// what is asked about instead.

import { ask } from "./answering.js";
import { tokenLine } from "./completion.js";
import { byId, button, el, fit } from "./nodes.js";
import { on, state, tell } from "./state.js";
import { chance, marked, parted } from "./words.js";

function draw() {
  byId("answer").classList.remove("is-editing");
  const place = byId("contrast");
  const { contrast } = state.answer;
  if (!contrast) {
    place.replaceChildren(
      el(
        "p",
        { class: "actions" },
        button("And not this …", edit, { class: "quiet", id: "edit" }),
        state.isGenerated && button("Answer again", again, { class: "quiet" }),
      ),
    );
    return;
  }
  place.replaceChildren(
    el("h2", {}, "And not"),
    contrastLine(contrast.tokens),
    el(
      "p",
      { class: "actions" },
      button("Change it …", edit, { class: "quiet", id: "edit" }),
      button("Clear it", clear, { class: "quiet" }),
    ),
  );
}

function contrastLine(tokens) {
  const line = tokenLine("The alternative");
  line.classList.add("alternative");
  line.setAttribute("role", "group");
  tokens.forEach(({ text, p }, place) => {
    const [gap, bare] = parted(place ? text : text.trimStart() || text);
    const chip = el("span", { class: "chip" }, marked(bare));
    chip.style.setProperty("--p", p ?? 0);
    chip.title = chance(p);
    line.append(gap, chip);
  });
  return line;
}

// The model writes anew: with a temperature, another answer comes.
function again() {
  state.question = { ...state.question, completion: null, isCut: false, contrast: null, seed: state.question.seed + 1 };
  Object.assign(state, { stretches: [], isGenerated: false });
  ask();
  tell("question");
}

function clear() {
  state.question = { ...state.question, completion: state.answer.completion, isCut: state.answer.is_cut, contrast: null };
  ask();
  tell("question");
}

function edit() {
  const { answer } = state;
  const text = el("textarea", { id: "typed", rows: 4, dir: "auto", spellcheck: "false" });
  text.value = answer.contrast?.completion ?? answer.completion;
  const use = button("Ask: why the answer, and not this", () => contrastWith(text.value), { class: "main" });
  const instead = button("Ask about this text instead", () => replaceBy(text.value));
  const update = () => {
    const isSame = text.value === answer.completion || !text.value;
    for (const each of [use, instead]) each.disabled = isSame;
  };
  text.addEventListener("input", () => (update(), fit(text)));
  const form = el(
    "div",
    { class: "edit" },
    el("label", { for: "typed" }, "Type over the answer what it could have been instead."),
    text,
    el("p", { class: "actions" }, use, instead, button("Cancel", close, { class: "quiet" })),
  );
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !use.disabled) contrastWith(text.value);
  });
  byId("contrast").replaceChildren(form);
  byId("answer").classList.add("is-editing");
  update();
  fit(text);
  text.focus();
}

function close() {
  draw();
  byId("edit").focus();
}

function contrastWith(typed) {
  state.question = { ...state.question, completion: state.answer.completion, isCut: state.answer.is_cut, contrast: typed };
  ask();
  tell("question");
}

function replaceBy(typed) {
  state.question = { ...state.question, completion: typed, isCut: false, contrast: null };
  Object.assign(state, { stretches: [], isGenerated: false });
  ask();
  tell("question");
}

on("completion-drawn", draw);
