// What is pointed at, in a few words beside it: the probability of a token of the answer, the share of a token of an
// example. Pointing at the score of an example colours the answer: which of its tokens the example moves.

import { light } from "./completion.js";
import { byId, el } from "./nodes.js";
import { state } from "./state.js";
import { chance, number, titled } from "./words.js";

const tip = byId("tip");

function tell(lines, x, y) {
  tip.replaceChildren(...lines.map((line) => (line instanceof Node ? line : el("p", {}, line))));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const below = y + 18 + height < innerHeight;
  tip.style.left = `${Math.max(6, Math.min(x + 10, innerWidth - width - 6))}px`;
  tip.style.top = `${Math.max(6, below ? y + 18 : y - height - 12)}px`;
}

const hush = () => (tip.hidden = true);

function chipLines(chip) {
  const lines = [titled(chip.words.text), chance(chip.words.p)];
  if (chip.classList.contains("copied")) lines.push("stands word for word in the corpus");
  return lines;
}

function tokenLines({ matrix }, place) {
  const { text, share, supervised } = matrix.train[place];
  const of = matrix.exact ? `, ${Math.round((100 * share) / matrix.exact)}% of ${number(matrix.exact)}` : "";
  const about = state.stretches.length ? "the tokens chosen" : "the answer";
  return [
    titled(text),
    `${number(share)} on ${about}${of}`,
    `token ${place + 1}${supervised ? "" : ", not trained on"}`,
  ];
}

function point(target, x, y) {
  const chip = target.closest?.(".chip[role]");
  const token = target.closest?.(".token");
  const card = target.closest?.(".example")?.card;
  light(card?.matrix && target.closest(".bar, .figure, .null-place, .id") ? card.matrix.query : null);
  if (chip?.words) tell(chipLines(chip), x, y);
  else if (token && card?.matrix) tell(tokenLines(card, token.token), x, y);
  else hush();
}

document.addEventListener("pointerover", (event) => {
  if (event.pointerType !== "touch" || event.target.closest?.(".token"))
    point(event.target, event.clientX, event.clientY);
  else hush();
});
document.documentElement.addEventListener("pointerleave", () => (light(null), hush()));
function pointAtFocus(target) {
  if (!target?.matches?.(":focus-visible")) return hush();
  const { left, bottom } = target.getBoundingClientRect();
  point(target, left, bottom - 12);
}
document.addEventListener("focusin", ({ target }) => target.matches?.(":focus-visible") && pointAtFocus(target));
document.addEventListener("focusout", () => (light(null), hush()));
addEventListener("keydown", (event) => event.key === "Escape" && hush());
// A token that has the focus may have scrolled into view for it.
addEventListener("scroll", () => pointAtFocus(document.activeElement?.closest(".token")), { passive: true });
