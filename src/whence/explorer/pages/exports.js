// What can be taken from the view: rows for training with or without these, the ranking, the report, the address, the
// command line and the Python lines.

import { download, isAbort } from "./api.js";
import { ofAnswer, postOfAnswer } from "./answering.js";
import { addressOf } from "./address.js";
import { announce, button, copyText, el, problemLine } from "./nodes.js";
import { wish } from "./ranking.js";
import { labelOf, state } from "./state.js";
import { counted } from "./words.js";

function files() {
  const rows = `the first ${counted(state.ranking?.helpful.length ?? state.top, "row")} by ${labelOf(state.method)}`;
  return [
    ["with", "These rows", `${rows[0].toUpperCase()}${rows.slice(1)}, ready to train on.`],
    ["without", "All rows without these", `The corpus without ${rows}.`],
    ["rows", "The ranking", "Rows with their scores, as whence trace writes them."],
    ["report", "The report", "One HTML page that needs no server."],
  ];
}

export function exportPanel() {
  const trouble = el("div");
  const list = el("ul", { class: "files" });
  for (const [what, label, says] of files()) {
    const node = button(label, () => save(what, node, trouble));
    list.append(el("li", {}, node, el("span", {}, says)));
  }
  const commands = el("div", {}, el("p", { class: "wait" }, "The command is being written."));
  fillCommands(commands);
  return el(
    "div",
    { class: "panel export", role: "region", "aria-label": "Export" },
    el("div", {}, el("h3", {}, "Download"), list, trouble),
    el("div", {}, el("h3", {}, "Link to this view"), linkView(), commands),
  );
}

async function save(what, node, trouble) {
  trouble.replaceChildren();
  node.disabled = true;
  try {
    await ofAnswer((answer) => download("/api/exports", { answer, ...wish(), what }));
    announce("The file is downloaded.");
  } catch (problem) {
    trouble.replaceChildren(problemLine(problem, () => save(what, node, trouble)));
  } finally {
    node.disabled = false;
    node.focus();
  }
}

function linkView() {
  const address = `${location.origin}${location.pathname}${addressOf()}`;
  const field = el("input", { readonly: true, value: address, "aria-label": "Link to this view" });
  return el(
    "div",
    { class: "copy line" },
    field,
    copyButton(() => address, "Copy the link"),
  );
}

const copyButton = (text, label) => {
  const node = button("Copy", () => copyText(text(), node), { "aria-label": label, class: "quiet" });
  return node;
};

async function fillCommands(place) {
  try {
    const { command, python } = await postOfAnswer("/api/commands", wish());
    place.replaceChildren(codeView("Command line", command), codeView("Python", python));
  } catch (problem) {
    if (!isAbort(problem)) place.replaceChildren(problemLine(problem, () => fillCommands(place)));
  }
}

function codeView(title, text) {
  const shown = el("pre", { tabindex: 0, "aria-label": title }, text);
  return el(
    "div",
    { class: "copy" },
    el("h3", {}, title),
    shown,
    copyButton(() => text, `Copy: ${title}`),
  );
}
