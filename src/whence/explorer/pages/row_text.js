// The text of a row, part by part. Its tokens get their colours later, in the same place: nothing moves.

import { el } from "./nodes.js";
import { isStrong, tint } from "./tints.js";
import { marked, visible } from "./words.js";

const UNLABELLED = ["text", "prompt", "completion"]; // told apart by their colour, as in the report
const PALE = ["prompt", "system", "user", "rejected"];

export function partsView(parts) {
  const view = el("div", { class: "parts" });
  view.parts = parts.map(({ role, text }) => partView(view, role, text)).filter(Boolean);
  return view;
}

function partView(view, role, text) {
  const shown = text.replace(/\s+$/, "");
  if (!shown) return null;
  const body = el("div", { class: PALE.includes(role) ? "text prompt" : "text", dir: "auto" }, visible(shown));
  const label = el("span", { class: UNLABELLED.includes(role) ? "unseen" : "role" }, role);
  view.append(el("div", { class: "part" }, role === "text" ? "" : label, body));
  return { text: shown, body };
}

// -- tokens

// The tokens' places in the parts: their texts stand one after the other in what the model read, templates between
// the parts included. null: the texts do not meet, as when a letter is split over two tokens.
function places(parts, train) {
  const whole = train.map(({ text }) => text).join("");
  let from = 0;
  const found = [];
  for (const { text } of parts) {
    const wanted = text.trimStart();
    const skipped = text.length - wanted.length;
    let at = whole.indexOf(wanted, from);
    let length = wanted.length;
    if (at < 0) {
      at = whole.indexOf(wanted.slice(0, 24), from);
      if (at < 0 && from >= whole.trimEnd().length) at = whole.length; // cut before this part
      if (at < 0) return null;
      length = commonLength(whole, at, wanted);
      if (at + length < whole.trimEnd().length) return null;
    }
    found.push({ at, length, skipped });
    from = at + length;
  }
  return found;
}

function commonLength(whole, at, wanted) {
  let length = 0;
  while (length < wanted.length && whole[at + length] === wanted[length]) length++;
  return length;
}

// Puts the tokens where their text stands; returns their nodes.
export function placeTokens(view, train) {
  const found = places(view.parts, train);
  if (!found) return placeAll(view, train);
  let token = 0;
  let start = 0; // of the token, in all of them joined
  const spans = [];
  view.parts.forEach(({ text, body }, number) => {
    const { at, length, skipped } = found[number];
    const end = at + length;
    const content = document.createDocumentFragment();
    content.append(visible(text.slice(0, skipped)));
    while (token < train.length && start + train[token].text.length <= at) start += train[token++].text.length;
    for (let place = at; place < end;) {
      const stop = Math.min(end, start + train[token].text.length);
      appendToken(content, text.slice(skipped + place - at, skipped + stop - at), token, train[token], spans);
      if (stop === start + train[token].text.length) start += train[token++].text.length;
      place = stop;
    }
    const rest = text.slice(skipped + length);
    if (rest)
      content.append(
        el("span", { class: "beyond", title: "The model did not read this: its context ends before." }, visible(rest)),
      );
    body.replaceChildren(content);
  });
  return spans;
}

function appendToken(content, text, place, { supervised }, spans) {
  const gap = /^ +(?=\S)/.exec(text)?.[0] ?? "";
  const span = el("span", { class: supervised ? "token" : "token prompt" }, visible(text.slice(gap.length)));
  span.token = place;
  content.append(gap, span);
  spans.push(span);
}

// Tokens whose texts do not meet the parts are shown as the model read them.
function placeAll(view, train) {
  const body = el("div", { class: "text", dir: "auto" });
  const spans = [];
  train.forEach((token, place) => {
    const span = el("span", { class: token.supervised ? "token" : "token prompt" }, marked(token.text));
    span.token = place;
    spans.push(span);
    body.append(span);
  });
  view.replaceChildren(el("div", { class: "part" }, body));
  return spans;
}

export function colour(spans, train, largest) {
  for (const span of spans) {
    const { share } = train[span.token];
    span.style.backgroundColor = tint(share, largest);
    span.classList.toggle("strong", isStrong(share, largest));
  }
}
