// Which rows may be listed: their sources, the values of their columns, words that must occur. What is set stands as
// chips above the examples, each with a way to remove it.

import { byId, button, el, redraw, toggle } from "./nodes.js";
import { emptyFilters, on, state, tell } from "./state.js";
import { brief, count, valueName } from "./words.js";

const FEW = 12; // values shown before "Show all"
const PAUSE = 300; // ms after the last letter

export function filterCount() {
  const { sources, columns, text } = state.filters;
  return (sources?.length ?? 0) + Object.values(columns).flat().length + (text.trim() ? 1 : 0);
}

function change(filters) {
  state.filters = { ...state.filters, ...filters };
  tell("filters");
}

const flipped = (values, value) =>
  values.includes(value) ? values.filter((each) => each !== value) : [...values, value];

function flipSource(value) {
  const sources = flipped(state.filters.sources ?? [], value);
  change({ sources: sources.length ? sources : null });
}

function flipColumn(name, value) {
  const { [name]: values = [], ...others } = state.filters.columns;
  const left = flipped(values, value);
  change({ columns: left.length ? { ...others, [name]: left } : others });
}

// -- the panel

export function filterPanel({ hasWords = true } = {}) {
  const { index, filters } = state;
  const words = el("input", { type: "search", id: "must-occur", dir: "auto", autocomplete: "off" });
  words.value = filters.text;
  let pause;
  words.addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(() => change({ text: words.value }), PAUSE);
  });
  const groups = el("div", { class: "groups" });
  const drawGroups = () => {
    if (document.activeElement !== words) words.value = state.filters.text;
    const chosen = (name) => state.filters.columns[name] ?? [];
    redraw(
      groups,
      groupView("Source", "source", index.sources, state.filters.sources ?? [], flipSource),
      ...index.columns.map(({ name, values }) =>
        groupView(
          brief(name, 30),
          `column-${name}`,
          values.filter(({ value }) => value !== null),
          chosen(name),
          (value) => flipColumn(name, value),
        ),
      ),
    );
  };
  drawGroups();
  const panel = el(
    "div",
    { class: "panel filters", role: "region", "aria-label": "Filters" },
    hasWords && el("div", { class: "field" }, el("label", { for: "must-occur" }, "Words that must all occur"), words),
    groups,
  );
  panel.redraw = drawGroups;
  return panel;
}

function groupView(title, key, values, chosen, flip) {
  if (!values.length || (values.length === 1 && !chosen.length)) return null;
  const chip = ({ value, rows }) =>
    toggle(el("span", { dir: "auto" }, valueName(value)), chosen.includes(value), () => flip(value), {
      class: "chip-button",
      "data-key": `${key}-${value}`,
    });
  const buttons = values.map((entry) => {
    const node = chip(entry);
    node.append(el("small", {}, count(entry.rows), el("span", { class: "unseen" }, " rows")));
    return node;
  });
  const group = el("div", { class: "group", role: "group", "aria-label": title }, el("span", { class: "name" }, title));
  const list = el("div", { class: "values" }, ...buttons.slice(0, FEW));
  if (buttons.length > FEW) {
    const rest = button(`Show all ${buttons.length}`, () => rest.replaceWith(...buttons.slice(FEW)), {
      class: "quiet",
    });
    list.append(rest);
  }
  group.append(list);
  return group;
}

// -- the chips

function drawChips() {
  const { sources, columns, text } = state.filters;
  const chips = [];
  const add = (name, value, remove) => {
    const words = `${name}: ${value}`;
    chips.push(
      button(el("span", { dir: "auto" }, words), remove, {
        class: "removable",
        "aria-label": `Remove the filter ${words}`,
      }),
    );
  };
  for (const value of sources ?? []) add("source", valueName(value), () => flipSource(value));
  for (const [name, values] of Object.entries(columns))
    for (const value of values) add(brief(name, 30), valueName(value), () => flipColumn(name, value));
  if (text.trim()) add("words", brief(text, 40), () => change({ text: "" }));
  if (chips.length > 1) chips.push(button("Clear all", () => change(emptyFilters()), { class: "quiet" }));
  const hadFocus = byId("filter-chips").contains(document.activeElement);
  byId("filter-chips").replaceChildren(...chips);
  byId("filter-chips").hidden = !chips.length;
  if (hadFocus) (chips[0] ?? byId("toolbar").querySelector('[data-key="filters"]')).focus();
}

on("filters ready", () => {
  drawChips();
  for (const panel of document.querySelectorAll(".panel.filters")) panel.redraw();
});
