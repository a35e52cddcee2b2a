// Second half: the answer, what is chosen in it, and what that changes. `trace_example.js` stands before it.

const state = { query: 0, pinned: null, hovered: null, lit: null, perExample: false };
let chips = []; // of the tokens asked about, by row of the matrices
let examples = [];

// -- the answer

const query = () => DATA.queries[state.query];

function drawAnswer() {
  const { prompt, generated, tokens, contrast, ending, certainty, verdict, overlap } = query();
  chips = [];
  const parts = [
    el("h2", {}, "Prompt"),
    el("div", { class: "text prompt asked", dir: "auto", tabindex: 0 }, prompt),
    el("h2", {}, generated ? "The model said" : "Completion"),
    tokenLine(tokens, "Tokens of the answer"),
  ];
  if (contrast.length) parts.push(el("h2", {}, "Instead of"), tokenLine(contrast, "Tokens of the alternative"));
  if (ending) parts.push(el("p", { class: "certainty" }, `The answer was ${ending}.`));
  parts.push(el("p", { class: "certainty" }, certainty));
  if (verdict) parts.push(el("p", { class: "verdict" }, verdict));
  if (overlap !== null) parts.push(el("p", { class: "certainty" }, overlap));
  parts.push(
    statusView(),
    legendView(
      contrast.length > 0,
      tokens.some((token) => !token.asked),
    ),
  );
  byId("answer").replaceChildren(...parts);
  roam(0);
}

const canChoose = () => examples.some((example) => example.shares);

function tokenLine(tokens, label) {
  const line = el("div", { class: "text answer", dir: "auto", role: "group", "aria-label": label });
  for (const token of tokens) {
    const [gap, bare] = parted(line.hasChildNodes() ? token.text : token.text.trimStart() || token.text);
    const chip = el("span", { class: "chip" }, marked(bare));
    chip.style.setProperty("--p", token.p ?? 0);
    chip.words = token;
    if (!token.asked) chip.classList.add("not-asked");
    else makeChoosable(chip);
    line.append(gap, chip);
  }
  return line;
}

function makeChoosable(chip) {
  chip.row = chips.push(chip) - 1;
  if (!canChoose()) return;
  chip.setAttribute("role", "button"); // a real button would break lines and joined letters around itself
  if (!chip.words.text.trim()) chip.setAttribute("aria-label", chip.words.text.includes("\n") ? "line break" : "space");
}

function statusView() {
  const clear = el("button", { type: "button", id: "clear" }, "All tokens");
  clear.addEventListener("click", () => pin(null));
  const steps = [-1, 1].map((step) => {
    const name = step < 0 ? "Previous token" : "Next token";
    const button = el("button", { type: "button", "aria-label": name }, step < 0 ? "‹" : "›");
    button.addEventListener("click", () =>
      pin(((state.pinned ?? (step < 0 ? 0 : -1)) + step + chips.length) % chips.length),
    );
    return button;
  });
  const node = el(
    "div",
    { class: "status", id: "status" },
    el("p", { "aria-live": "polite" }),
    el("span", {}, ...steps, clear),
  );
  node.hidden = !canChoose() || !chips.length;
  return node;
}

function legendView(hasContrast, hasSpan) {
  const node = el("div", { class: "legend" });
  const basis = examples.find((example) => example.matrix)?.matrix.basis;
  if (basis) {
    const toggle = el(
      "button",
      { type: "button", class: "quiet", id: "scale", "aria-pressed": "false" },
      "Scale each example",
    );
    toggle.addEventListener("click", () => {
      state.perExample = !state.perExample;
      update();
    });
    const ends = el(
      "p",
      { class: "ends" },
      el("span", { id: "least" }),
      el("span", {}, "0"),
      el("span", { id: "most" }),
    );
    node.append(
      el("div", { class: "ramp" }),
      ends,
      el("p", { class: "names" }, el("span", {}, "opposes"), el("span", {}, "helps")),
      toggle,
    );
  }
  const lines = ["The bar under a token of the answer is its probability: full is certain."];
  if (basis === "loss") lines.push("Training tokens are coloured by loss: which token’s own prediction it is.");
  else if (basis) lines.push("Training tokens are coloured by position: where in the text the gradient arises.");
  if (hasSpan) lines.push("Pale tokens are not asked about.");
  if (hasContrast) lines.push("For tokens of the alternative, blue speaks against them and so for the answer.");
  node.append(...lines.map((line) => el("p", {}, line)));
  return node;
}

// -- the examples

function drawExamples() {
  const { helpful, opposing } = query();
  const make = (hits) => hits.map((hit) => new Example(hit));
  const sides = [make(helpful), make(opposing)];
  examples = sides.flat();
  byId("examples").replaceChildren(...sectionsOf(sides[0], false), ...sectionsOf(sides[1], true));
  byId("examples").classList.toggle("without-null", !examples.some(({ hit }) => hit.null));
  for (const example of examples) sight.observe(example.node);
}

const SIDES = {
  high: [
    ["Helpful", "Training on these makes the answer more likely."],
    ["Highest", "None of these helps the answer."],
  ],
  low: [
    ["Opposing", "Training on these makes the answer less likely."],
    ["Lowest", "None of these opposes the answer."],
  ],
};

// A side in two parts: what helps, or opposes, by the score that ranks; and what only ranks there.
function sectionsOf(side, isLow) {
  if (!side.length) return isLow ? [] : [el("p", { class: "note" }, "No example is listed for this query.")];
  const [[title, words], [otherwise, none]] = isLow ? SIDES.low : SIDES.high;
  if (!DATA.isInfluence) return [sectionView(otherwise, "By likeness, which is not influence.", side)];
  const agrees = ({ hit }) => (isLow ? hit.ranked < 0 : hit.ranked > 0);
  const others = side.filter((example) => !agrees(example));
  return [sectionView(title, words, side.filter(agrees)), sectionView(otherwise, none, others)].filter(Boolean);
}

function sectionView(title, words, side) {
  if (!side.length) return null;
  return el("section", {}, el("h2", {}, title, el("small", {}, words)), ...side.map((example) => example.node));
}

// What is near the window is coloured at once, the rest a moment later.
const sight = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      const example = examples.find(({ node }) => node === entry.target);
      if (example) example.near = entry.isIntersecting;
    }
    paintTexts();
  },
  { rootMargin: "800px" },
);

// -- choosing and painting

const active = () => state.hovered ?? state.pinned;
let isWaiting = false;
let later;

function update() {
  if (isWaiting) return;
  isWaiting = true;
  requestAnimationFrame(() => {
    isWaiting = false;
    paint();
  });
}

function pin(row) {
  state.pinned = row;
  state.hovered = null;
  roam(row ?? 0);
  remember();
  update();
}

function hover(row) {
  if (state.hovered === row) return;
  state.hovered = row;
  update();
}

// Values for the tokens of the answer: what a part of an example does to each of them.
function light(values) {
  state.lit = values;
  paintChips();
}

// One token of the answer can be reached with Tab; arrow keys move which.
function roam(row) {
  chips.forEach((chip, each) => chip.hasAttribute("role") && (chip.tabIndex = each === row ? 0 : -1));
}

function paint() {
  const row = active();
  paintChips();
  paintStatus(row);
  const values = examples.map(({ hit, shares }) => (row === null ? hit.ranked : (shares?.[row] ?? 0)) ?? 0);
  const reach = reachOf(Math.min(0, ...values), Math.max(0, ...values));
  for (const example of examples) {
    example.measure(row, reach);
    example.stale = true;
  }
  paintTexts();
}

// Where 0 is on the bars and how long 1 is, as shares of their width. It stays in one place from token to token.
function reachOf(least, most) {
  const span = most - least || 1;
  if (!canChoose()) return { zero: -least / span, unit: 1 / span };
  return { zero: ZERO, unit: Math.min(most ? (1 - ZERO) / most : Infinity, least ? -ZERO / least : Infinity, 1e30) };
}

const largestShown = (row) => largestOf(examples.map(({ matrix }) => (matrix ? matrix.largest(row) : 0)));

function paintTexts(everything = false) {
  const row = active();
  const largest = largestShown(row);
  for (const example of examples) if (example.stale && (example.near || everything)) example.paint(row, largest);
  clearTimeout(later);
  later = setTimeout(paintNext, 100);
}

// What is out of sight follows one by one, when nothing else is to be done.
function paintNext() {
  const row = active();
  examples.find((example) => example.stale)?.paint(row, largestShown(row));
  if (examples.some((example) => example.stale)) later = setTimeout(paintNext);
}

function paintChips() {
  const largest = state.lit ? largestOf(state.lit) : 0;
  chips.forEach((chip, row) => {
    if (chip.hasAttribute("role")) chip.setAttribute("aria-pressed", String(row === state.pinned));
    chip.classList.toggle("previewed", row === state.hovered);
    chip.style.backgroundColor = state.lit ? tint(state.lit[row] ?? 0, largest) : "";
  });
}

function paintStatus(row) {
  const words =
    row === null
      ? "Coloured by all tokens of the answer together."
      : `Coloured by ${quoted(chips[row].words.text)}, ${chance(chips[row].words.p)}, token ${row + 1} of ${chips.length}.`;
  byId("status").firstChild.textContent = words;
  document.body.classList.toggle("is-pinned", state.pinned !== null);
  byId("clear").disabled = state.pinned === null;
  if (!byId("scale")) return;
  byId("scale").setAttribute("aria-pressed", String(state.perExample));
  const largest = largestShown(row);
  byId("least").textContent = state.perExample ? "− its largest" : number(-largest);
  byId("most").textContent = state.perExample ? "+ its largest" : number(largest);
}

// -- the tip

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

const titled = (text) =>
  el("p", {}, el("code", { dir: "auto" }, named(text.length > 60 ? `${text.slice(0, 60)}…` : text)));

function chipLines({ words, row }) {
  const lines = [titled(words.text), chance(words.p)];
  if (!words.asked) lines.push("not asked about");
  else if (chips[row].hasAttribute("role"))
    lines.push(row === state.pinned ? "pinned; click to let go" : "click to pin");
  return lines;
}

function placeLines({ example: { matrix }, token }) {
  const row = active();
  const column = matrix.column(token);
  const value = matrix.values(row)[token];
  const strongest = column.map((entry, each) => [entry, each]).sort(([a], [b]) => Math.abs(b) - Math.abs(a));
  const parts = strongest.slice(0, 3).filter(([entry]) => entry);
  return [
    titled(matrix.train[token]),
    `${number(value)} on ${row === null ? "the answer" : quoted(chips[row].words.text)}`,
    ...(row === null && chips.length > 1
      ? parts.map(([entry, each]) =>
          el("p", { class: "part" }, `${number(entry)} on ${quoted(chips[each]?.words.text ?? "?")}`),
        )
      : []),
    `token ${token + 1}${matrix.supervised[token] === "0" ? ", not trained on" : ""}`,
  ];
}

// -- events

const chipOf = (event) => event.target.closest?.(".chip") ?? null;
const placeOf = (event) => event.target.closest?.(".token")?.place ?? null;

function listenToPointer() {
  document.addEventListener("pointerover", (event) => {
    const [chip, place] = [chipOf(event), placeOf(event)];
    if (event.pointerType !== "touch") hover(chip?.hasAttribute("role") ? chip.row : null);
    const shares = event.target.closest?.(".bar, .figure")?.shares ?? null;
    light(place ? place.example.matrix.column(place.token) : shares);
    if (chip) tell(chipLines(chip), event.clientX, event.clientY);
    else if (place) tell(placeLines(place), event.clientX, event.clientY);
    else hush();
  });
  document.documentElement.addEventListener("pointerleave", () => (hover(null), light(null), hush()));
  addEventListener("scroll", hush, { passive: true });
  byId("answer").addEventListener("click", (event) => {
    const chip = chipOf(event);
    if (chip?.hasAttribute("role") && getSelection().isCollapsed) pin(chip.row === state.pinned ? null : chip.row);
  });
}

function listenToKeys() {
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") return (pin(null), hush());
    const chip = chipOf(event);
    if (!chip?.hasAttribute("role") || event.ctrlKey || event.metaKey || event.altKey) return;
    const way = getComputedStyle(chip.parentNode).direction === "rtl" ? -1 : 1;
    const last = chips.length - 1;
    const to = { ArrowRight: chip.row + way, ArrowLeft: chip.row - way, Home: 0, End: last }[event.key];
    if (to !== undefined) chips[Math.max(0, Math.min(last, to))].focus();
    else if (event.key === "Enter" || event.key === " ") pin(chip.row === state.pinned ? null : chip.row);
    else return;
    event.preventDefault();
  });
  document.addEventListener("focusin", (event) => {
    const chip = chipOf(event);
    if (!chip?.matches(":focus-visible")) return;
    roam(chip.row);
    hover(chip.row);
  });
  document.addEventListener("focusout", (event) => chipOf(event) && hover(null));
}

// -- many queries, and the address

function choose(number, pinned = null) {
  state.query = number;
  Object.assign(state, { pinned: null, hovered: null, lit: null });
  sight.disconnect();
  drawExamples();
  drawAnswer();
  if (pinned !== null && chips[pinned]?.hasAttribute("role")) state.pinned = pinned;
  roam(state.pinned ?? 0);
  byId("queries").selectedIndex = number;
  byId("previous-query").disabled = number === 0;
  byId("next-query").disabled = number === DATA.queries.length - 1;
  paint();
}

function recall() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const whole = (name) => (/^\d{1,6}$/.test(asked.get(name) ?? "") ? Number(asked.get(name)) : null);
  return [Math.min(whole("q") ?? 0, DATA.queries.length - 1), whole("t")];
}

function remember() {
  try {
    history.replaceState(null, "", `#q=${state.query}${state.pinned === null ? "" : `&t=${state.pinned}`}`);
  } catch {
    // A page inside a frame may have no address of its own.
  }
}

function drawPicker() {
  byId("picker").hidden = DATA.queries.length < 2;
  byId("queries").append(
    ...DATA.queries.map(({ prompt }, each) =>
      el("option", {}, `${each + 1}/${DATA.queries.length}  ${prompt.trim().slice(0, 70)}`),
    ),
  );
  const go = (number) => (choose(number), remember());
  byId("queries").addEventListener("change", (event) => go(event.target.selectedIndex));
  byId("previous-query").addEventListener("click", () => go(state.query - 1));
  byId("next-query").addEventListener("click", () => go(state.query + 1));
}

function begin() {
  for (const [name, value] of DATA.settings)
    byId("settings").append(el("dt", {}, name), el("dd", { dir: "auto" }, value));
  byId("notes").append(...DATA.notes.map((note) => el("p", { class: "note" }, note)));
  byId("likeness").hidden = DATA.isInfluence;
  for (const words of document.querySelectorAll(".influence")) words.hidden = !DATA.isInfluence;
  if (DATA.queries.length) {
    drawPicker();
    listenToPointer();
    listenToKeys();
    addEventListener("hashchange", () => choose(...recall()));
    addEventListener("beforeprint", () => paintTexts(true));
    choose(...recall());
  }
  document.documentElement.dataset.ready = "yes";
}

begin();
