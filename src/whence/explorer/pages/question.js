// The form: a prompt, for models that chat a system prompt and earlier turns, and how the model shall answer.

import { ask, stop } from "./answering.js";
import { byId, button, el, fit } from "./nodes.js";
import { isBusy, on, state, tell } from "./state.js";

let prompt, submit, hint;

export function drawQuestion() {
  const { question, index, session } = state;
  prompt = el("textarea", {
    id: "prompt",
    rows: 2,
    dir: "auto",
    maxlength: session.limits.prompt_chars,
    placeholder: index.layout === "text" ? "Type the beginning of a text." : "Type a prompt.",
  });
  prompt.value = question.prompt;
  prompt.addEventListener("input", () => (fit(prompt), drawSubmit()));
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send(event);
  });
  submit = el("button", { type: "submit", class: "main", id: "ask" }, "Ask");
  hint = el("span", { class: "hint" }, navigator.platform.startsWith("Mac") ? "⌘ Enter" : "Ctrl + Enter");
  byId("question").replaceChildren(
    el("label", { for: "prompt" }, "Prompt"),
    prompt,
    ...(index.is_chat ? [chatDrawer()] : []),
    optionsDrawer(),
    el("p", { class: "actions" }, submit, hint),
  );
  drawSubmit();
  fit(prompt);
}

// -- drawers

function chatDrawer() {
  const { question } = state;
  const system = el("textarea", { id: "system", rows: 2, dir: "auto" });
  system.value = question.system;
  system.addEventListener("input", () => fit(system));
  const turns = el("ol", { class: "turns" });
  question.history.forEach((turn) => turns.append(turnView(turn)));
  const add = button("Add an earlier turn", () => {
    const isUser = turns.children.length % 2 === 0;
    const turn = turnView({ role: isUser ? "user" : "assistant", content: "" });
    turns.append(turn);
    turn.querySelector("textarea").focus();
  });
  add.className = "quiet";
  return el(
    "details",
    { open: Boolean(question.system || question.history.length) },
    el("summary", {}, "System prompt and earlier turns"),
    el("label", { for: "system" }, "System prompt"),
    system,
    turns,
    add,
  );
}

function turnView({ role, content }) {
  const who = el("select", { "aria-label": "Who said it" });
  for (const [value, label] of [
    ["user", "User"],
    ["assistant", "Assistant"],
  ])
    who.append(el("option", { value, selected: value === role }, label));
  const text = el("textarea", { rows: 2, dir: "auto", "aria-label": "What was said" });
  text.value = content;
  text.addEventListener("input", () => fit(text));
  const turn = el(
    "li",
    {},
    who,
    button("Remove", () => turn.remove(), { class: "quiet" }),
    text,
  );
  return turn;
}

function optionsDrawer() {
  const { question, session } = state;
  const field = (id, label, attributes) => {
    const input = el("input", { id, type: "number", ...attributes });
    return el("div", {}, el("label", { for: id }, label), input);
  };
  const given = el("textarea", { id: "given", rows: 2, dir: "auto", placeholder: "The model answers by itself." });
  given.value = state.isGenerated ? "" : (question.completion ?? "");
  given.addEventListener("input", () => (fit(given), drawSubmit()));
  const { length, temperature, seed } = question;
  return el(
    "details",
    { open: temperature > 0 || length !== 64 },
    el("summary", {}, "Length, temperature, your own completion"),
    el(
      "div",
      { class: "numbers" },
      field("length", "Tokens at most", { value: length, min: 1, max: session.limits.max_new_tokens, step: 1 }),
      field("temperature", "Temperature", { value: temperature, min: 0, max: 5, step: "any" }),
      field("seed", "Seed", { value: seed, min: 0, max: 2 ** 31, step: 1 }),
    ),
    el("label", { for: "given" }, "Completion to ask about"),
    given,
  );
}

// -- sending

const value = (id) => byId(id)?.value ?? "";
const numberOf = (id, usual) => {
  const input = byId(id);
  return input.validity.valid && input.value !== "" ? Number(input.value) : usual;
};

function typed() {
  const turns = [...byId("question").querySelectorAll(".turns li")].map((turn) => ({
    role: turn.querySelector("select").value,
    content: turn.querySelector("textarea").value,
  }));
  return {
    prompt: prompt.value,
    system: value("system"),
    history: turns.filter(({ content }) => content.trim()),
    completion: value("given") || null,
    contrast: null,
    isCut: false,
    length: numberOf("length", 64),
    temperature: numberOf("temperature", 0),
    seed: numberOf("seed", 0),
  };
}

export function send(event) {
  event?.preventDefault();
  if (isBusy()) return stop();
  if (!prompt.value.trim()) return prompt.focus();
  state.question = typed();
  Object.assign(state, { stretches: [], isGenerated: false });
  ask();
  tell("question");
}

export function sendPrompt(text) {
  prompt.value = text;
  fit(prompt);
  send();
}

// The same button asks and stops, so that the focus stays on it.
function drawSubmit() {
  submit.textContent = isBusy() ? "Stop" : "Ask";
  submit.classList.toggle("main", !isBusy());
  submit.disabled = !isBusy() && !prompt.value.trim();
  hint.hidden = isBusy();
}

byId("question").addEventListener("submit", send);
on("asked token answer ready ended", () => submit && drawSubmit());
on("asked", () => requestAnimationFrame(() => fit(prompt)));
