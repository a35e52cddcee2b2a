// What the same example scores for unrelated questions, and the mark of its score here.

import { el, svg } from "./nodes.js";
import { number, plain } from "./words.js";

const [WIDE, HIGH] = [150, 34];

export function nullView({ null: found, score, z }, level) {
  const clears = level && z !== null && z > level.z;
  const value = el("b", { class: clears ? "clears" : "" }, `z ${z === null ? "n/a" : plain(z)}`);
  if (level) value.title = `Chance reaches ${plain(level.z)}.`;
  return el("figure", { class: "null" }, histogram(found, score), el("figcaption", {}, value, share(found)));
}

// In words, how many of the unrelated questions the score is above.
function share({ below, of }) {
  const words = below === of ? `above all ${of}` : below ? `above ${below} of ${of}` : `above none of ${of}`;
  return el("span", { title: "of unrelated questions" }, words);
}

function histogram({ mean, edges, counts }, score) {
  const least = Math.min(edges[0], score);
  const span = Math.max(edges.at(-1), score) - least || 1;
  const place = (value) => 1 + ((value - least) / span) * (WIDE - 2);
  const most = Math.max(...counts, 1);
  const bars = counts.flatMap((count, bin) => {
    if (!count) return [];
    const height = Math.max(1, (count / most) * (HIGH - 6));
    const width = Math.max(0.5, place(edges[bin + 1]) - place(edges[bin]) - 0.8);
    return [svg("rect", { x: place(edges[bin]), y: HIGH - height, width, height })];
  });
  const x = place(score);
  const words = `Scores of this example for unrelated questions: mean ${number(mean)}; here ${number(score)}.`;
  return svg(
    "svg",
    { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", "aria-label": words },
    ...bars,
    svg("path", { d: `M0 ${HIGH}H${WIDE}`, class: "base" }),
    svg("path", { d: `M${x} 4V${HIGH}M${x - 3} 0h6L${x} 5z`, class: score < 0 ? "mark opposes" : "mark helps" }),
  );
}
