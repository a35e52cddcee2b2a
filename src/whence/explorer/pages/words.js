// How texts, numbers and chances read on the page.

import { el } from "./nodes.js";

const TURNS = /[\u202a-\u202e\u2066-\u2069]/g; // marks that change the direction of what follows
const TAGS = /[\u{e0000}-\u{e007f}]/gu; // invisible letters

// Control characters as symbols that are seen: a text cannot hide, reverse or colour anything.
export function visible(text) {
  return text
    .replaceAll("\r\n", "\n")
    .replace(/[\0-\x08\x0b-\x1f]/g, (char) => String.fromCharCode(0x2400 + char.charCodeAt(0)))
    .replaceAll("\x7f", "\u2421")
    .replace(/[\x80-\x9f]/g, "\ufffd")
    .replace(TURNS, "\u21c6")
    .replace(TAGS, "\u25af");
}

// One line that stands for a text: a title, a chip, a name in a sentence.
export function brief(text, most = 60) {
  const line = visible(text.slice(0, 4 * most))
    .replace(/\s+/g, " ")
    .trim();
  return line.length > most ? `${line.slice(0, most - 1)}…` : line;
}

// Newlines of a token keep a faint mark, drawn by the style sheet and so not copied with the text.
export function marked(text) {
  const parts = document.createDocumentFragment();
  visible(text)
    .split("\n")
    .forEach((line, number) => {
      if (number) parts.append(el("span", { class: "newline" }, "\n"));
      if (line) parts.append(line);
    });
  if (!text) parts.append(el("span", { class: "empty" }));
  return parts;
}

// A token without the spaces before it, and those: marks under and behind words then leave the gaps between them.
export function parted(text) {
  const bare = text.trimStart();
  const gap = text.slice(0, text.length - bare.length);
  return bare && /^ +$/.test(gap) ? [gap, bare] : ["", text];
}

const named = (text) =>
  visible(text)
    .replace(/^ +/, (gap) => "␣".repeat(gap.length))
    .replaceAll("\n", "↵") || "∅";

// Between isolates, so that right-to-left text leaves the order of the sentence around it alone.
export const quoted = (text, most = 40) => {
  const name = named(text.trim() || text);
  return `“\u2068${name.length > most ? `${name.slice(0, most - 1)}…` : name}\u2069”`;
};

export const titled = (text) =>
  el("p", {}, el("code", { dir: "auto" }, named(text.length > 60 ? `${text.slice(0, 60)}…` : text)));

export const chance = (p) =>
  p === null || p === undefined ? "p unknown" : `p\u00a0=\u00a0${p && p < 0.001 ? p.toExponential(1) : p.toFixed(3)}`;

const sign = (value) => (value > 0 ? "+" : value < 0 ? "−" : "");

export function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "n/a";
  const size = Math.abs(value);
  const text = size && (size < 1e-3 || size >= 1e4) ? size.toExponential(digits - 1) : size.toPrecision(digits);
  return sign(value) + (size ? text.replace("e-", "e−").replace("e+", "e") : "0");
}

// Scores between −1 and 1, as cosines are, keep three decimals, so that they stand under each other.
export const score = (value, isSmall) =>
  isSmall && Number.isFinite(value) ? sign(value) + Math.abs(value).toFixed(3) : number(value, 4);

export const plain = (value, digits = 2) => sign(value).replace("+", "") + Math.abs(value).toFixed(digits);

export const count = (value) => value.toLocaleString("en");

export const counted = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

// How far something is, in a sentence.
export const steps = (what, done, total) => (total > 1 ? `${what}: ${count(done)} of ${count(total)}.` : `${what}.`);

export const listed = (words) =>
  words.length < 2 ? (words[0] ?? "") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;

// A value of a column or a source, which may be missing.
export const valueName = (value, missing = "none") =>
  value === null || value === "" ? missing : brief(String(value), 40);
