// Another budget: the slider's step is drawn into the table of sources. Without this script the table is of the choice.
(() => {
  const { steps, chosen, pool, largest, rankable } = JSON.parse(document.getElementById("data").textContent);
  const box = document.getElementById("budget");
  const slider = box.querySelector("input");
  const [size, words] = box.querySelectorAll("output, p");
  const lines = [...document.querySelectorAll("#sources tbody tr")];
  const total = pool.reduce((sum, rows) => sum + rows, 0);
  const counted = (number) => number.toLocaleString("en");
  const percent = (share) => `${(100 * share).toFixed(1)}%`;

  function draw() {
    const [rows, tokens, score, bySource, tokensBySource] = steps[slider.value];
    const isChosen = rows === chosen;
    size.textContent = `${counted(rows)} ${rows === 1 ? "row" : "rows"}`;
    slider.setAttribute("aria-valuetext", `${size.textContent}${isChosen ? ", as chosen" : ""}`);
    const parts = [`${percent(rows / rankable)} of the ${counted(rankable)} that may be chosen`];
    if (tokens) parts.push(`${counted(tokens)} tokens`);
    parts.push(`the last one scores ${Number(score.toPrecision(4))}`);
    words.textContent = `${isChosen ? "As chosen: " : ""}${parts.join(", ")}.${isChosen ? "" : ` To choose so many: --count ${rows}.`}`;
    lines.forEach((line, place) => {
      const count = bySource[place];
      const share = count / rows;
      const cells = line.querySelectorAll("td.n");
      const lift = (share / (pool[place] / total)).toFixed(2);
      const numbers = [counted(count), percent(share), null, lift, tokens ? counted(tokensBySource[place]) : null];
      numbers.forEach((number, column) => number !== null && (cells[column].textContent = number));
      line.querySelector("rect.chosen").setAttribute("width", Math.max(0.3, (100 * share) / largest).toFixed(2));
    });
  }

  slider.max = steps.length - 1;
  slider.value = steps.findIndex(([rows]) => rows === chosen);
  slider.addEventListener("input", draw);
  box.hidden = false;
  draw();
})();
