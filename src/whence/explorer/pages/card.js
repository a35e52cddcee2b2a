// One training example: its rank and score, what it scores for unrelated questions, where it comes from, its text.
// A card stays the same node while its row stays in the list; only what changes is written anew.

import { button, el } from "./nodes.js";
import { nullView } from "./null_view.js";
import { openRow } from "./row_dialog.js";
import { colour, partsView, placeTokens } from "./row_text.js";
import { largestOf } from "./tints.js";
import { makeUnwalkable, makeWalkable } from "./token_keys.js";
import { brief, count, counted, score, valueName } from "./words.js";

const LONG = { chars: 900, lines: 11 }; // more than this is folded

export class Card {
  constructor(hit) {
    this.rank = el("span", { class: "rank" });
    this.fill = el("i");
    this.bar = el("div", { class: "bar", "aria-hidden": "true" }, this.fill);
    this.figure = el("p", { class: "figure" });
    this.facts = el("div", { class: "facts" });
    this.null = el("div", { class: "null-place" });
    this.isOpen = false;
    this.matrix = null;
    this.node = el(
      "article",
      { class: "example" },
      this.rank,
      this.bar,
      this.figure,
      this.facts,
      this.null,
      this.text(hit),
    );
    this.node.card = this;
  }

  update(hit, { largest, isSmall, isEffect, level, hasNull }) {
    this.hit = hit;
    const rank = Math.abs(hit.rank);
    this.rank.textContent = rank;
    this.node.setAttribute("aria-label", `Rank ${rank}, row ${brief(hit.id)}`);
    this.fill.className = !isEffect ? "alike" : hit.score < 0 ? "opposes" : "helps";
    this.fill.style.width = `${100 * (largest ? Math.abs(hit.score) / largest : 0)}%`;
    this.figure.replaceChildren(el("b", {}, score(hit.score, isSmall)));
    this.node.classList.toggle("without-null", !hasNull);
    this.null.replaceChildren(...(hit.null ? [nullView(hit, level)] : []));
    if (!this.facts.hasChildNodes()) this.facts.append(...factsOf(hit));
  }

  // -- its text

  text(hit) {
    this.parts = partsView(hit.parts);
    const box = el("div", { class: "box" }, this.parts);
    const whole = hit.parts.map(({ text }) => text).join("\n");
    if (whole.length > LONG.chars || whole.split("\n").length > LONG.lines) box.append(this.unfoldButton(whole.length));
    if (hit.cut)
      box.append(
        el(
          "p",
          { class: "cut" },
          `The text goes on after ${count(whole.length)} characters. Open the row to see all of it.`,
        ),
      );
    return box;
  }

  unfoldButton(chars) {
    const words = `Show all ${count(chars)} characters`;
    this.parts.classList.add("folded");
    const unfold = button(words, () => {
      this.isOpen = !this.isOpen;
      this.parts.classList.toggle("folded", !this.isOpen);
      unfold.textContent = this.isOpen ? "Show less" : words;
      unfold.setAttribute("aria-expanded", String(this.isOpen));
      if (!this.isOpen) this.seek();
    });
    unfold.className = "quiet";
    unfold.setAttribute("aria-expanded", "false");
    return unfold;
  }

  // -- its tokens

  take(matrix) {
    this.matrix = matrix;
    this.spans = placeTokens(this.parts, matrix.train);
    this.largest = largestOf(matrix.train.map(({ share }) => share));
    this.node.classList.remove("is-stale");
    makeWalkable(this.parts, `Tokens of ${brief(this.hit.id)}: arrow keys tell what each did`);
    this.seek();
  }

  paint(largest) {
    if (this.matrix) colour(this.spans, this.matrix.train, largest);
  }

  // A folded text shows the place with the strongest token.
  seek() {
    if (!this.matrix || !this.parts.classList.contains("folded") || this.node.matches(":hover")) return;
    const strongest = this.spans.reduce(
      (most, span) =>
        Math.abs(this.matrix.train[span.token].share) > Math.abs(this.matrix.train[most.token].share) ? span : most,
      this.spans[0],
    );
    if (!strongest) return;
    const offset =
      strongest.getBoundingClientRect().top - this.parts.getBoundingClientRect().top + this.parts.scrollTop;
    const top = offset < 0.7 * this.parts.clientHeight ? 0 : offset - 0.4 * this.parts.clientHeight;
    this.parts.scrollTop = top;
    this.parts.classList.toggle("is-inside", top > 0);
  }

  growStale() {
    if (this.matrix) this.node.classList.add("is-stale");
    this.matrix = null;
    makeUnwalkable(this.parts);
  }
}

export function factsOf(hit) {
  const open = button(el("span", { dir: "auto" }, brief(hit.id, 48)), () => openRow(hit.row), {
    class: "id",
    title: "Open the row",
    "aria-label": `Open row ${brief(hit.id, 48)}`,
  });
  const facts = [open];
  if (hit.source !== null) facts.push(el("span", { class: "source", dir: "auto" }, valueName(hit.source)));
  for (const [name, value] of Object.entries(hit.columns ?? {}))
    if (value !== null) facts.push(el("span", { dir: "auto" }, `${brief(name, 30)} `, el("b", {}, valueName(value))));
  if (hit.copies > 1)
    facts.push(el("span", { title: "Rows with the same text are one here." }, counted(hit.copies, "copy", "copies")));
  if (hit.generic)
    facts.push(
      el(
        "span",
        { class: "badge", title: "A generic example: it scores high whatever is asked." },
        "high for any question",
      ),
    );
  return facts;
}
