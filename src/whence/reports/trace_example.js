// First half of the report's script: nodes, numbers, and one training example with its tokens and its null.
// Text reaches the document as text nodes only, never as markup.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const EXCERPT = 200; // tokens of a long example that are shown at once
const LONG = { tokens: 400, chars: 1600, lines: 16 }; // more than this is folded
const STEPS = 32767; // as in page.py
const BINS = { strip: 160, histogram: 30 };
const STRONG = 0.4; // opacity at which pale text would be hard to read
const ZERO = 1 / 3; // of a bar's width, where scores are split and so have parts of either sign
const SOFTNESS = 0.7; // exponent from share of the largest entry to opacity: small entries stay visible

// -- making nodes

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const byId = (id) => document.getElementById(id);

// Newlines of a token keep a faint mark, drawn by the style sheet and so not copied with the text.
function marked(text) {
  const parts = document.createDocumentFragment();
  text.split("\n").forEach((line, number) => {
    if (number) parts.append(el("span", { class: "newline" }, "\n"));
    if (line) parts.append(line);
  });
  if (!text) parts.append(el("span", { class: "empty" }));
  return parts;
}

// A token without the spaces before it, and those: marks under and behind words then leave the gaps between them.
function parted(text) {
  const bare = text.trimStart();
  const gap = text.slice(0, text.length - bare.length);
  return bare && /^ +$/.test(gap) ? [gap, bare] : ["", text];
}

const named = (text) => text.replace(/^ +/, (gap) => "␣".repeat(gap.length)).replaceAll("\n", "↵") || "∅";
// Between isolates, so that right-to-left text leaves the order of the sentence around it alone.
const quoted = (text) => `“\u2068${named(text.trim() || text)}\u2069”`;
const chance = (p) => (p === null ? "p unknown" : `p\u00a0=\u00a0${p < 0.001 ? p.toExponential(1) : p.toFixed(3)}`);

// -- numbers

function number(value, digits = 3) {
  if (value === null || !Number.isFinite(value)) return "n/a";
  const size = Math.abs(value);
  const text = size && (size < 1e-3 || size >= 1e4) ? size.toExponential(digits - 1) : size.toPrecision(digits);
  return (value > 0 ? "+" : value < 0 ? "−" : "") + (size ? text.replace("e-", "e−").replace("e+", "e") : "0");
}

const score = (value) =>
  DATA.isCosine && value !== null
    ? (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(3)
    : number(value, 4);

const weightOf = (value, largest) => (largest > 0 ? Math.min(1, Math.abs(value) / largest) ** SOFTNESS : 0);

function tint(value, largest) {
  const weight = weightOf(value, largest);
  return weight < 0.02 ? "" : `rgb(var(--${value > 0 ? "helpful" : "opposing"}) / ${weight.toFixed(2)})`;
}

const largestOf = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 0);

// -- one training example

class Matrix {
  constructor(packed) {
    Object.assign(this, packed);
    this.width = packed.train.length;
  }

  get entries() {
    const bytes = Uint8Array.from(atob(this.steps), (char) => char.charCodeAt(0));
    const entries = new Int16Array(bytes.buffer); // shape (query tokens, training tokens)
    Object.defineProperty(this, "entries", { value: entries });
    return entries;
  }

  at(row, token) {
    return (this.entries[row * this.width + token] * this.peaks[row]) / STEPS;
  }

  column(token) {
    return this.peaks.map((_, row) => this.at(row, token));
  }

  // Influence of every training token on one query token, or on all of them together.
  values(row) {
    if (row === null) return (this.sums ??= this.peaks.reduce((sums, _, each) => this.add(each, sums), this.zeros()));
    return this.add(row, this.zeros());
  }

  zeros() {
    return new Float64Array(this.width);
  }

  add(row, sums) {
    const { entries, width } = this;
    const unit = this.peaks[row] / STEPS;
    for (let token = 0; token < width; token++) sums[token] += entries[row * width + token] * unit;
    return sums;
  }

  largest(row) {
    return row === null ? this.sumPeak : (this.peaks[row] ?? 0);
  }
}

class Example {
  constructor(hit) {
    this.hit = hit;
    this.matrix = hit.tokens && new Matrix(hit.tokens);
    this.shares = this.matrix ? this.matrix.shares : hit.shares;
    this.spans = [];
    this.start = 0;
    this.near = false;
    this.stale = true;
    this.node = this.build();
  }

  build() {
    const { hit } = this;
    this.fill = el("i");
    this.figure = el("b");
    this.unit = el("span");
    const node = el(
      "article",
      { class: "example" },
      el("span", { class: "rank", "aria-label": `rank ${hit.rank}` }, String(hit.rank).replace("-", "−")),
      el("div", { class: "bar", "aria-hidden": "true" }, this.fill),
      el("p", { class: "figure" }, this.figure, this.unit),
      this.facts(),
      hit.null ? nullView(hit) : "",
      this.text(),
    );
    for (const place of node.querySelectorAll(".bar, .figure")) place.shares = this.shares;
    return node;
  }

  facts() {
    const { hit } = this;
    const facts = el("p", { class: "facts" }, el("span", { class: "id", dir: "auto" }, hit.id));
    if (hit.source !== null) facts.append(el("span", { class: "source", dir: "auto" }, hit.source));
    const fact = (name, value) => facts.append(el("span", {}, `${name} `, el("b", {}, score(value))));
    if (hit.margin != null) {
      const title = "19 of 20 times at most this far from what exact gradients give";
      facts.append(el("span", { title }, "\u00b1 ", el("b", {}, number(hit.margin).replace("+", ""))));
    }
    if (hit.isExact) fact("compressed", hit.score);
    if (hit.exact !== null && (!hit.isExact || hit.exact !== hit.ranked)) fact("exact", hit.exact);
    if (hit.null?.generic) {
      const why = "A generic example: it scores high whatever is asked; --specific corrects for that.";
      facts.append(el("span", { class: "badge", title: why }, "high for any question"));
    }
    return facts;
  }

  // -- its text

  text() {
    const { hit, matrix } = this;
    this.body = el("div", { class: "text", dir: "auto" });
    const box = el("div", { class: "box" }, this.body);
    if (hit.prompt) this.body.append(el("div", { class: "prompt" }, hit.prompt));
    const whole = hit.prompt + (matrix ? matrix.train.join("") : hit.completion);
    this.isFolded = whole.length > LONG.chars || whole.split("\n").length > LONG.lines;
    if (matrix) {
      this.tokens = el("div");
      this.body.append(this.tokens);
      if (matrix.width > LONG.tokens) {
        this.isFolded = true;
        box.prepend(this.stripView());
      }
      this.show(this.matrix.striking);
    } else {
      this.body.append(el("div", {}, hit.prompt ? hit.completion.trimStart() : hit.completion));
    }
    if (this.isFolded) box.append(this.unfoldButton(whole.length));
    return box;
  }

  unfoldButton(chars) {
    const size = this.matrix
      ? `${this.matrix.width.toLocaleString("en")} tokens`
      : `${chars.toLocaleString("en")} characters`;
    const button = el("button", { type: "button", class: "quiet", "aria-expanded": "false" }, `Show all ${size}`);
    this.body.classList.add("folded");
    this.body.tabIndex = 0;
    button.addEventListener("click", () => {
      this.isFolded = !this.isFolded;
      this.body.classList.toggle("folded", this.isFolded);
      button.textContent = this.isFolded ? `Show all ${size}` : "Show less";
      button.setAttribute("aria-expanded", String(!this.isFolded));
      if (this.matrix) this.show(this.matrix.striking);
    });
    return button;
  }

  // Tokens around one of them, or all where the text is unfolded. Only these have nodes.
  show(center) {
    const { train, supervised, width } = this.matrix;
    const count = this.isFolded && width > LONG.tokens ? EXCERPT : width;
    this.start = Math.max(0, Math.min(center - count / 3, width - count)) | 0;
    const end = this.start + count;
    // Put together before it stands in the document, which would look for its direction again at every token.
    const tokens = el("div", {}, rest(this.start, "before"));
    this.spans = train.slice(this.start, end).map((text, offset) => {
      const token = this.start + offset;
      const [gap, bare] = parted(text);
      const span = el("span", { class: supervised[token] === "0" ? "token prompt" : "token" }, marked(bare));
      span.place = { example: this, token };
      tokens.append(token ? gap : "", span);
      return span;
    });
    tokens.append(rest(width - end, "after"));
    this.tokens.replaceWith(tokens);
    this.tokens = tokens;
    if (this.window) {
      this.window.style.left = `${(100 * this.start) / width}%`;
      this.window.style.width = `${(100 * count) / width}%`;
    }
    this.stale = true;
    update();
  }

  // The whole text as one line of colour, on which to move the excerpt.
  stripView() {
    this.strip = el("div", { class: "strip", title: "Where in the text, on its own scale" });
    this.window = el("i");
    const range = el("input", { type: "range", min: 0, max: this.matrix.width - 1, "aria-label": "Place in the text" });
    range.value = this.matrix.striking;
    range.addEventListener("input", () => {
      if (this.isFolded) this.show(Number(range.value));
      else this.spans[range.value].scrollIntoView({ block: "center" });
    });
    this.strip.append(this.window, range);
    return this.strip;
  }

  // -- its colours

  paint(row, largest) {
    this.stale = false;
    if (!this.matrix) return;
    const values = this.matrix.values(row);
    const most = state.perExample ? this.matrix.largest(row) : largest;
    this.spans.forEach((span, offset) => {
      const value = values[this.start + offset];
      span.style.backgroundColor = tint(value, most);
      span.classList.toggle("strong", weightOf(value, most) > STRONG);
    });
    if (this.strip) this.strip.style.backgroundImage = stripes(values, largestOf(values));
  }

  measure(row, reach) {
    const { hit } = this;
    const value = row === null ? hit.ranked : (this.shares?.[row] ?? null);
    const whole = this.matrix && hit.exact !== null ? hit.exact : hit.score;
    const unit = !hit.isExact ? "score" : hit.exact === hit.ranked ? "exact score" : "exact, specific";
    this.figure.textContent = row === null ? score(value) : number(value);
    this.unit.textContent = row === null ? unit : `of ${score(whole)}`;
    this.fill.className = (value ?? 0) < 0 ? "opposes" : "helps";
    this.fill.style.left = `${100 * (reach.zero + Math.min(0, value ?? 0) * reach.unit)}%`;
    this.fill.style.width = `${100 * Math.abs(value ?? 0) * reach.unit}%`;
    this.fill.parentNode.style.setProperty("--zero", `${100 * reach.zero}%`);
  }
}

function rest(count, where) {
  return count ? el("span", { class: "rest" }, `⋯ ${count.toLocaleString("en")} tokens ${where} ⋯`) : "";
}

function stripes(values, largest) {
  const bins = Math.min(BINS.strip, values.length);
  const stops = [];
  for (let bin = 0; bin < bins; bin++) {
    const part = values.slice((bin * values.length) / bins, ((bin + 1) * values.length) / bins);
    const strongest = part.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a), 0);
    const [from, to] = [bin, bin + 1].map((edge) => `${((100 * edge) / bins).toFixed(2)}%`);
    stops.push(`${tint(strongest, largest) || "transparent"} ${from} ${to}`);
  }
  return `linear-gradient(to right, ${stops.join(", ")})`;
}

// -- the null

function nullView({ null: found, isExact, exact, score: compressed }) {
  const own = found.own ?? (isExact ? exact : compressed); // of which z is
  const clears = found.needed !== null && found.z !== null && found.z > found.needed;
  const z = el("b", { class: clears ? "clears" : "" }, `z ${found.z === null ? "n/a" : plain(found.z)}`);
  if (found.needed !== null) z.title = `Chance alone reaches ${plain(found.needed)}.`;
  const caption = el("figcaption", {}, z, el("span", { title: "of unrelated questions" }, above(found)));
  return el("figure", { class: "null" }, found.scores.length && own !== null ? histogram(found, own) : "", caption);
}

const plain = (value) => (value < 0 ? "−" : "") + Math.abs(value).toFixed(2);

function above({ percentile, scores }) {
  if (percentile === null) return "";
  if (percentile >= 100) return `above all ${scores.length}`;
  return percentile <= 0 ? `below all ${scores.length}` : `above ${Number(percentile.toFixed(1))}%`;
}

function histogram(found, own) {
  const [wide, high] = [150, 34];
  const least = found.scores.reduce((a, b) => Math.min(a, b), own);
  const span = found.scores.reduce((a, b) => Math.max(a, b), own) - least || 1;
  const counts = new Array(BINS.histogram).fill(0);
  for (const value of found.scores)
    counts[Math.min(BINS.histogram - 1, ((value - least) / span) * BINS.histogram) | 0]++;
  const step = (wide - 2) / BINS.histogram;
  const most = Math.max(...counts);
  const bars = counts.flatMap((count, bin) => {
    const height = count && Math.max(1, (count / most) * (high - 6));
    return count ? [svg("rect", { x: 1 + bin * step, y: high - height, width: step - 0.8, height })] : [];
  });
  const x = 1 + ((own - least) / span) * (wide - 2);
  const mark = svg("path", {
    d: `M${x} 4V${high}M${x - 3} 0h6L${x} 5z`,
    class: own < 0 ? "mark opposes" : "mark helps",
  });
  const base = svg("path", { d: `M0 ${high}H${wide}`, class: "base" });
  const words = `What this example scores for ${found.scores.length} unrelated questions: mean ${number(found.mean)}; here ${score(own)}`;
  return svg(
    "svg",
    { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": words },
    svg("title", {}, words),
    ...bars,
    base,
    mark,
  );
}
