// Choosing tokens: click, drag, shift and Ctrl with the mouse; drag with a finger; arrows, Shift, Enter and Escape
// with the keyboard. Several stretches are chosen with Ctrl or Cmd.

import { reveal } from "./nodes.js";
import { state, tell } from "./state.js";

let chips = [];
let anchor = 0; // where a stretch begins; Shift moves its other end
let base = []; // stretches that stay while one more is drawn

// -- stretches as data

export function merged(stretches) {
  const sorted = stretches.filter(([from, to]) => from < to).sort(([a], [b]) => a - b);
  const joined = [];
  for (const [from, to] of sorted) {
    const last = joined.at(-1);
    if (last && from <= last[1]) last[1] = Math.max(last[1], to);
    else joined.push([from, to]);
  }
  return joined;
}

const without = (stretches, place) =>
  merged(
    stretches.flatMap(([from, to]) => [
      [from, Math.min(to, place)],
      [Math.max(from, place + 1), to],
    ]),
  );

const holds = (stretches, place) => stretches.some(([from, to]) => from <= place && place < to);
const between = (a, b) => [Math.min(a, b), Math.max(a, b) + 1];
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

// All of it is none of it: the whole answer has no stretch of its own.
const told = (stretches) => (same(stretches, [[0, chips.length]]) ? [] : stretches);

export function choose(stretches, { isDragging = false } = {}) {
  const wanted = told(merged(stretches));
  const hasChanged = !same(wanted, state.stretches);
  const wasDragging = state.isDragging;
  state.isDragging = isDragging;
  state.stretches = wanted;
  if (hasChanged) tell("stretches");
  if (!isDragging && (hasChanged || wasDragging)) tell("settled");
}

export function step(way) {
  const [from, to] = state.stretches[0] ?? [];
  const last = chips.length - 1;
  const place = from === undefined ? (way > 0 ? 0 : last) : way > 0 ? to : from - 1;
  anchor = (place + chips.length) % chips.length;
  choose([[anchor, anchor + 1]]);
  reveal(chips[anchor]);
  roam(anchor, false);
}

// One token can be reached with Tab; arrow keys move which.
function roam(place, isFocused = true) {
  chips.forEach((chip, each) => (chip.tabIndex = each === place ? 0 : -1));
  if (isFocused) chips[place].focus();
}

// -- pointer

// A space belongs to the token after it, as it does in the model's own.
function pointed(event) {
  const node = document.elementFromPoint(event.clientX, event.clientY);
  const chip = node?.matches(".gap") ? node.nextElementSibling : node?.closest(".chip[role]");
  return chip && chips[chip.place] === chip ? chip.place : null;
}

export function listenToStretches(line, newChips) {
  chips = newChips;
  let drag = null; // {place, end, isMore, isRemoving, before}

  line.addEventListener("pointerdown", (event) => {
    const place = pointed(event);
    if (event.button !== 0 || place === null) return;
    const isMore = event.ctrlKey || event.metaKey;
    if (event.shiftKey) {
      event.preventDefault(); // of the browser's own selection of text
    } else {
      base = isMore ? state.stretches : [];
      anchor = place;
    }
    drag = { place, end: null, isMore, isLonger: event.shiftKey, before: state.stretches };
    if (event.pointerType === "mouse") event.preventDefault();
    chips[place].focus({ preventScroll: true });
    roam(place, false);
  });

  const move = (event) => {
    if (!drag) return;
    const place = pointed(event);
    if (place === null || place === drag.end || (drag.end === null && place === drag.place)) return;
    drag.end = place;
    choose([...base, between(anchor, place)], { isDragging: true });
  };

  const release = (event) => {
    if (!drag) return;
    const { place, end, isMore, isLonger, before } = drag;
    drag = null;
    if (event.type === "pointercancel") return choose(before);
    if (end !== null) return choose([...base, between(anchor, end)]);
    if (isLonger) return choose([...base, between(anchor, place)]);
    if (isMore && holds(before, place)) return choose(without(before, place));
    const one = [place, place + 1];
    choose(!isMore && same(before, [one]) ? [] : [...base, one]);
  };

  line.addEventListener("pointermove", move);
  line.addEventListener("pointerup", release);
  line.addEventListener("pointercancel", release);
  // A drag may leave the line: it is followed until the button is up.
  line.addEventListener("pointerdown", (event) => drag && line.setPointerCapture(event.pointerId));
  line.addEventListener("keydown", onKey);
}

// -- keyboard

function onKey(event) {
  const chip = event.target.closest(".chip[role]");
  if (!chip || event.altKey) return;
  const place = chip.place;
  const isMore = event.ctrlKey || event.metaKey;
  if (event.key === "Escape") {
    if (!state.stretches.length) return;
    choose([]);
  } else if (event.key === "Enter" || event.key === " ") {
    choosePlace(place, isMore, event.shiftKey);
  } else if (isMore && event.key.toLowerCase() === "a") {
    choose([]);
  } else {
    const to = destination(event.key, place);
    if (to === null) return;
    roam(to);
    if (event.shiftKey) choose([...base, between(anchor, to)]);
    else if (!isMore) ((anchor = to), (base = []));
  }
  event.preventDefault();
}

function choosePlace(place, isMore, isLonger) {
  if (isLonger) return choose([...base, between(anchor, place)]);
  base = isMore ? without(state.stretches, place) : [];
  anchor = place;
  if (isMore && holds(state.stretches, place)) choose(base);
  else choose(same(state.stretches, [[place, place + 1]]) ? [] : [...base, [place, place + 1]]);
}

function destination(key, place) {
  const way = getComputedStyle(chips[place].parentNode).direction === "rtl" ? -1 : 1;
  const last = chips.length - 1;
  const inside = (to) => Math.max(0, Math.min(last, to));
  if (key === "ArrowRight") return inside(place + way);
  if (key === "ArrowLeft") return inside(place - way);
  if (key === "Home") return 0;
  if (key === "End") return last;
  if (key === "ArrowDown") return onLine(place, 1);
  if (key === "ArrowUp") return onLine(place, -1);
  return null;
}

// The token above or below: of the next line, the one that is nearest.
function onLine(place, way) {
  const here = chips[place].getBoundingClientRect();
  let nearest = place;
  let least = Infinity;
  for (let to = place + way; chips[to]; to += way) {
    const there = chips[to].getBoundingClientRect();
    const rows = Math.abs(there.top - here.top) / here.height;
    if (rows < 0.5) continue;
    if (rows > 2.5 && least < Infinity) break;
    const distance = Math.abs(there.left - here.left) + 1000 * Math.round(rows);
    if (distance < least) [nearest, least] = [to, distance];
  }
  return nearest;
}
