// The tokens of an example by keyboard: its text takes the focus, and arrow keys go from token to token. What each did
// is said beside it (`tip.js`), and read out as its description.

const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

// A text whose tokens have their colours can be gone through; one without is passed over.
export function makeWalkable(parts, name) {
  parts.tabIndex = 0;
  parts.setAttribute("role", "group");
  parts.setAttribute("aria-label", name);
}

export function makeUnwalkable(parts) {
  for (const name of ["tabindex", "role", "aria-label"]) parts.removeAttribute(name);
}

function next(spans, place, key) {
  if (key === "Home") return 0;
  if (key === "End") return spans.length - 1;
  const step = STEPS[key];
  if (!step) return null;
  return place < 0 ? 0 : Math.max(0, Math.min(spans.length - 1, place + step));
}

function walk(event) {
  const card = event.target.closest?.(".parts[tabindex]")?.closest(".example")?.card;
  if (!card?.spans?.length || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const place = card.spans.indexOf(event.target);
  const to = next(card.spans, place, event.key);
  if (to === null) return;
  event.preventDefault();
  const span = card.spans[to];
  span.tabIndex = -1;
  span.setAttribute("aria-describedby", "tip");
  span.focus();
  if (place >= 0 && place !== to) card.spans[place].removeAttribute("aria-describedby");
}

document.addEventListener("keydown", walk);
