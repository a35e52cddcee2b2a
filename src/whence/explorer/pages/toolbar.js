// Above the examples: which view, which method ranks, and the panels for filters and export. One panel is open at most.

import { exportPanel } from "./exports.js";
import { filterCount, filterPanel } from "./filters.js";
import { rankingWords } from "./examples.js";
import { byId, choice, el, redraw, toggle } from "./nodes.js";
import { isBusy, isReady, on, state, tell } from "./state.js";

const PANELS = { filters: filterPanel, export: exportPanel };
let open = null;

function draw() {
  byId("results").hidden = !isReady();
  byId("soon").hidden = !isBusy();
  if (!isReady()) return;
  const { view } = state;
  const views = el(
    "div",
    { class: "segments", role: "group", "aria-label": "View of the examples" },
    ...[
      ["examples", "Examples"],
      ["methods", "Methods side by side"],
    ].map(([name, label]) => toggle(label, view === name, () => show(name), { "data-key": `view-${name}` })),
  );
  const panels = el(
    "div",
    { class: "panels" },
    panelButton("filters", filterCount() ? `Filters (${filterCount()})` : "Filters"),
    panelButton("export", "Export"),
  );
  const says = el("span", { class: "says", id: "ranking-words" }, words());
  const how = el("div", { class: "how" }, view === "examples" && methodChoice(), foldChoice(), says);
  redraw(
    byId("toolbar"),
    views,
    ...(view === "examples" ? [panels, how] : [how, panels]), // in the order in which they are seen
  );
  byId("examples").hidden = view !== "examples";
  byId("comparison").hidden = view !== "methods";
  byId("verdict").hidden = view !== "examples";
}

function show(view) {
  state.view = view;
  tell("view");
}

const words = () => (state.view === "examples" ? rankingWords() : "");

function foldChoice() {
  const box = el("input", { type: "checkbox", checked: state.isFolding, "data-key": "fold" });
  box.addEventListener("change", () => {
    state.isFolding = box.checked;
    tell("folding");
  });
  return el("label", { class: "check", title: "Rows with the same text become one." }, box, "Fold copies");
}

function methodChoice() {
  const options = state.index.methods.map(({ name, label, is_ready: isOn }) => [
    name,
    isOn ? label : `${label} (not ready)`,
    !isOn,
  ]);
  const act = (name) => {
    state.method = name;
    tell("method");
  };
  return el(
    "label",
    { class: "by" },
    "Ranked by ",
    choice("Ranked by", options, state.method, act, { "data-key": "method" }),
  );
}

function panelButton(name, label) {
  const node = toggle(label, false, () => openPanel(open === name ? null : name), { "data-key": name });
  node.removeAttribute("aria-pressed");
  node.setAttribute("aria-expanded", String(open === name));
  node.setAttribute("aria-controls", "panel");
  return node;
}

function openPanel(name) {
  open = name;
  byId("panel").replaceChildren(...(name ? [PANELS[name]()] : []));
  draw();
}

byId("panel").addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !open) return;
  const name = open;
  openPanel(null);
  byId("toolbar").querySelector(`[data-key="${name}"]`).focus();
});

on("ready asked ended view filters folding method", draw);
on("ranking colouring coloured", () => byId("ranking-words")?.replaceChildren(words()));
on("settled view top method folding filters", () => open === "export" && byId("panel").replaceChildren(exportPanel()));
on("asked cleared", () => openPanel(null));
on("cleared", draw);
