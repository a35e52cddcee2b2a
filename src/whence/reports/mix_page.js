// Another mixture: a point in a triangle of three domains, and the losses that the law predicts there. Without this
// script the page is of the suggested mixture.
(() => {
  const given = JSON.parse(document.getElementById("data").textContent);
  if (!given.grids?.length) return;
  const { domains, sets, weights, steps, suggested, least, most, caps, losses, grids } = given;
  const box = document.getElementById("try");
  const picture = box.querySelector("svg");
  const select = box.querySelector("select");
  const found = box.querySelector(".found");
  const CORNER = [[220, 36], [24, 372], [416, 372]]; // of the picture, in its units
  const objective = (values) => values.reduce((sum, value, place) => sum + weights[place] * value, 0);
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const digits = (value) => (Math.abs(value) < 10 ? value.toFixed(3) : value.toPrecision(4)).replace("-", "−");
  const signed = (value) => (Math.abs(value) < 0.0005 ? digits(0) : `${value > 0 ? "+" : ""}${digits(value)}`);
  const place = (first, second) => first * (steps + 1) - (first * (first - 1)) / 2 + second;

  let grid, means, at, sliders, point;

  function el(tag, attributes = {}, ...children) {
    const isDrawn = ["polygon", "circle", "text", "path"].includes(tag);
    const node = isDrawn ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  const xy = (counts) =>
    [0, 1].map((axis) => counts.reduce((sum, count, corner) => sum + (count / steps) * CORNER[corner][axis], 0));

  // -- the picture

  function draw() {
    means = grid.losses.map(objective);
    const sorted = [...means].sort((a, b) => a - b);
    const [low, high] = [sorted[0], sorted[Math.floor(0.9 * (sorted.length - 1))]];
    const strength = (mean) => (high > low ? Math.max(0, Math.min(1, (high - mean) / (high - low))) : 0);
    const cells = [];
    for (let i = 0; i < steps; i++)
      for (let j = 0; j < steps - i; j++) {
        cells.push([[i, j], [i + 1, j], [i, j + 1]]);
        if (i + j < steps - 1) cells.push([[i + 1, j], [i, j + 1], [i + 1, j + 1]]);
      }
    const drawn = cells.map((corners) => {
      const mean = corners.reduce((sum, [i, j]) => sum + means[place(i, j)] / 3, 0);
      const points = corners.map(([i, j]) => xy([i, j, steps - i - j]).map((x) => x.toFixed(1)).join(",")).join(" ");
      return el("polygon", { points, class: "cell", "fill-opacity": (0.06 + 0.94 * strength(mean)).toFixed(2) });
    });
    const edge = el("polygon", { class: "edge", points: CORNER.map((corner) => corner.join(",")).join(" ") });
    const names = grid.corners.map((domain, corner) => {
      const [x, y] = CORNER[corner];
      const anchor = ["middle", "start", "end"][corner];
      return el("text", { x: corner ? (corner === 1 ? 0 : 440) : x, y: corner ? y + 22 : y - 14, "text-anchor": anchor }, brief(domains[domain]));
    });
    point = el("circle", { class: "point", r: 9 });
    const [x, y] = xy(suggestedCounts());
    const mark = el("circle", { class: "suggested", r: 4, cx: x, cy: y });
    picture.replaceChildren(...drawn, edge, ...ringOfLowest(), ...names, point, mark);
  }

  const suggestedCounts = () => grid.corners.map((domain) => (steps * suggested[domain]) / grid.share);
  const sharesOf = (counts) => counts.map((count) => (grid.share * count) / steps);
  const doubtsOf = (shares) => grid.corners.flatMap((domain, corner) => doubt(domains[domain], domain, shares[corner]));

  // Around the lowest node that was tried and keeps to the caps, if there is one.
  function ringOfLowest() {
    const allowed = means.map((_, number) => number).filter((number) => !doubtsOf(sharesOf(countsOf(number))).length);
    if (!allowed.length) return [];
    const [cx, cy] = xy(countsOf(allowed.reduce((best, number) => (means[number] < means[best] ? number : best))));
    return [el("circle", { class: "lowest", r: 6, cx, cy })];
  }

  const breakable = (name) => name.split(/(?<=[_/])/).flatMap((part) => [part, el("wbr")]);
  const brief = (name) => (name.length > 22 ? `${name.slice(0, 20)}…` : name);

  function countsOf(number) {
    for (let i = 0; i <= steps; i++)
      for (let j = 0; j <= steps - i; j++) if (place(i, j) === number) return [i, j, steps - i - j];
  }

  // -- the sliders and the table

  function build() {
    sliders = grid.corners.map((domain, corner) => {
      const input = el("input", { type: "range", min: 0, max: steps, step: 1, "aria-label": `Share of ${domains[domain]}` });
      input.addEventListener("input", () => move(shared(corner, Number(input.value))));
      const share = el("output");
      box.querySelector(".sliders").append(el("span", { title: domains[domain] }, domains[domain]), input, share);
      return { input, share };
    });
  }

  // The other two keep their proportion.
  function shared(corner, count) {
    const others = [0, 1, 2].filter((other) => other !== corner);
    const sum = at[others[0]] + at[others[1]];
    const rest = steps - count;
    const first = sum ? Math.round((rest * at[others[0]]) / sum) : Math.floor(rest / 2);
    const counts = [];
    [counts[corner], counts[others[0]], counts[others[1]]] = [count, first, rest - first];
    return counts;
  }

  function tableOf(here) {
    const cell = (text) => el("td", { class: "n" }, text);
    const head = ["here", "suggested", "difference"].map((name) => el("th", { class: "n" }, name));
    const rows = sets.map((name, number) => {
      const apart = here[number] - losses[number];
      const kind = weights[number] ? {} : { class: "unasked" };
      return el("tr", kind, el("td", { class: "name" }, ...breakable(name)), cell(digits(here[number])), cell(digits(losses[number])), cell(signed(apart)));
    });
    const body = el("tbody", {}, ...rows);
    return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "evaluation set"), ...head)), body));
  }

  function move(counts) {
    at = counts;
    show(at, grid.losses[place(at[0], at[1])]);
  }

  function show(counts, here) {
    const [x, y] = xy(counts);
    point.setAttribute("cx", x.toFixed(1));
    point.setAttribute("cy", y.toFixed(1));
    const shares = sharesOf(counts);
    sliders.forEach(({ input, share }, corner) => {
      input.value = at[corner];
      share.textContent = percent(shares[corner]);
      input.setAttribute("aria-valuetext", percent(shares[corner]));
    });
    const apart = objective(here) - objective(losses);
    const size = signed(apart) === digits(0) ? "as that of the suggested mixture" : `${digits(Math.abs(apart))} ${apart > 0 ? "above" : "below"} that of the suggested mixture`;
    found.textContent = [`Predicted mean loss ${digits(objective(here))}, ${size}.`, ...doubtsOf(shares)].join(" ");
    box.querySelector(".numbers").replaceChildren(tableOf(here));
  }

  function doubt(name, domain, share) {
    const slack = 0.0005; // half of the last digit shown
    if (share > caps[domain] + slack) return [`${name} is above its cap of ${percent(caps[domain])}.`];
    if (share > most[domain] + slack) return [`Nothing above ${percent(most[domain])} of ${name} was tried.`];
    if (share < least[domain] - slack) return [`Nothing below ${percent(least[domain])} of ${name} was tried.`];
    return [];
  }

  // -- the pointer

  function nearest(event) {
    const spot = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
    const [[ax, ay], [bx, by], [cx, cy]] = CORNER;
    const area = (by - cy) * (ax - cx) + (cx - bx) * (ay - cy);
    const first = ((by - cy) * (spot.x - cx) + (cx - bx) * (spot.y - cy)) / area;
    const second = ((cy - ay) * (spot.x - cx) + (ax - cx) * (spot.y - cy)) / area;
    const inside = [first, second, 1 - first - second].map((share) => Math.max(0, share));
    const sum = inside.reduce((total, share) => total + share, 0);
    const i = Math.min(steps, Math.round((steps * inside[0]) / sum));
    const j = Math.min(steps - i, Math.round((steps * inside[1]) / sum));
    return [i, j, steps - i - j];
  }

  picture.addEventListener("pointerdown", (event) => {
    picture.setPointerCapture(event.pointerId);
    move(nearest(event));
    event.preventDefault();
  });
  picture.addEventListener("pointermove", (event) => picture.hasPointerCapture(event.pointerId) && move(nearest(event)));

  function choose(number) {
    grid = grids[number];
    box.querySelector(".sliders").replaceChildren();
    draw();
    build();
    const exact = suggestedCounts(); // which is seldom a node of the grid
    at = exact.map(Math.round);
    at[at.indexOf(Math.max(...at))] += steps - at.reduce((sum, count) => sum + count, 0);
    show(exact, losses);
  }

  grids.forEach(({ corners }, number) => select.append(el("option", { value: number }, corners.map((domain) => domains[domain]).join(", "))));
  select.parentElement.hidden = grids.length === 1;
  select.addEventListener("change", () => choose(Number(select.value)));
  box.hidden = false;
  choose(0);
})();
